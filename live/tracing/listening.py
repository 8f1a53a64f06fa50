"""Whether somebody listens on a TCP port, as the kernel tells it, without a connection to it.

A connection would be a client of the program: what it does for the first one would be taken for start-up.
"""

from __future__ import annotations

from pathlib import Path

from dynacut.shared.errors import DynacutError

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"


def check_unused(port: int) -> None:
    """Raises:
    DynacutError: somebody listens on the port already: a program to be started would seem to be ready at once.
    """
    if is_listening(port):
        raise DynacutError(
            f"TCP port {port} is in use already, so it cannot tell when the program is ready",
            "end what listens there (`ss -ltnp` shows it), or give a port of the program's own",
        )


def is_listening(port: int) -> bool:
    """Whether a socket of this network namespace listens on the port, on whatever address.

    Source: proc_pid_net(5); local_address is ADDRESS:PORT in hexadecimal, st is 0A for TCP_LISTEN.
    """
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue  # no IPv6 on this machine
        for line in lines:
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
