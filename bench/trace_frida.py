"""Frida's Stalker on a process, in a process of its own: python trace_frida.py PID compile|block.

Says `following` when all threads are followed; at the end of its input it prints how many blocks it has seen. Needs the
package frida (wxWindows licence), which dynacut does not: see trace_peers.py.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(pid: int, event: str) -> None:
    frida = importlib.import_module("frida")
    session = frida.attach(pid)
    script = session.create_script((Path(__file__).parent / "targets/stalker.js").read_text())
    script.load()
    script.exports_sync.follow(event)
    print("following", flush=True)
    sys.stdin.read()
    print(script.exports_sync.count(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
