"""The workload of a web server for `dynacut trim`: python http_workload.py PORT [--reload PID].

Every kind of request that the server is to serve, over kept and closed connections; with --reload, SIGHUP, and the
return when other workers serve. Fails by an exception.
"""

from __future__ import annotations

import http.client
import os
import signal
import sys
import time
from pathlib import Path

_TIMEOUT = 20.0


def _request(
    client: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    client.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
    response = client.getresponse()
    return response.status, response.read()


def requests(port: int) -> None:
    """All requests, each answered as it must be."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    for size in (1, 5_000, 100_000):
        name, body = f"/upload-{size}", bytes(range(256)) * (size // 256 + 1)
        assert _request(client, "PUT", name, body)[0] in (201, 204)
        assert _request(client, "GET", name) == (200, body)
        assert _request(client, "GET", name, Range="bytes=10-19") == (206, body[10:20])
        assert _request(client, "GET", name, Range="bytes=999999999-")[0] == 416
        assert _request(client, "HEAD", name) == (200, b"")
        assert _request(client, "DELETE", name)[0] in (200, 204)
        assert _request(client, "GET", name)[0] == 404
    assert _request(client, "GET", "/")[0] == 200
    client.close()
    for path in ("/", "/missing"):
        single = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        assert _request(single, "GET", path, Connection="close")[0] in (200, 404)
        single.close()


def reload(pid: int) -> None:
    """SIGHUP; returns when the workers of before are gone and others are there."""
    before = _children(pid)
    os.kill(pid, signal.SIGHUP)
    deadline = time.monotonic() + _TIMEOUT
    while (now := _children(pid)) & before or not now:
        assert time.monotonic() < deadline, f"the workers {before} stay; there are {now}"
        time.sleep(0.02)


def _children(pid: int) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


if __name__ == "__main__":
    requests(int(sys.argv[1]))
    if sys.argv[2:3] == ["--reload"]:
        reload(int(sys.argv[3]))
        requests(int(sys.argv[1]))
