"""From another terminal to a running trace: the name of the phase that begins now."""

from __future__ import annotations

import os
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from dynacut.shared.errors import DynacutError, ExitStatus

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}")


def check_phase_name(name: str) -> str:
    """Returns the name if it can be part of a file name; DynacutError (usage) otherwise."""
    if not _NAME.fullmatch(name):
        raise DynacutError(f"{name!r} is no name for a phase", "use letters, digits, - and _", status=ExitStatus.USAGE)
    return name


def _address(pid: int) -> bytes:
    return b"\0dynacut-trace-%d" % pid


@dataclass(frozen=True)
class PhaseRequest:
    """Somebody's wish that a phase begins; sender: the address to tell when it has."""

    name: str
    sender: bytes


class PhaseListener:
    """Where a trace of a process hears of phases. Abstract socket (unix(7)): it goes with the tracer."""

    def __init__(self, pid: int) -> None:
        """Opens it; DynacutError if another trace of the process is under way."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            self._socket.bind(_address(pid))
        except OSError:
            raise DynacutError(f"process {pid} is being traced already", "end that trace first") from None

    def __enter__(self) -> PhaseListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For select()."""
        return self._socket.fileno()

    def receive(self) -> PhaseRequest | None:
        """What somebody asks for; None if nobody does, or nobody who may."""
        try:
            data, control, _, sender = self._socket.recvmsg(64, socket.CMSG_SPACE(12))
        except BlockingIOError:
            return None
        uids = [
            struct.unpack("=iii", content)[1]
            for level, kind, content in control
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS
        ]
        name = data.decode(errors="replace")
        if not (uids and uids[0] in (0, os.geteuid()) and _NAME.fullmatch(name)):
            return None
        return PhaseRequest(name, sender or b"")

    def answer(self, request: PhaseRequest, text: str) -> None:
        """Tells who has asked that the phase has begun."""
        with suppress(OSError):  # it may have given up waiting
            self._socket.sendto(text.encode(), request.sender)


def begin_phase(pid: int, name: str, *, timeout: float = 60.0) -> str:
    """Tells the trace of a process that a phase begins, and waits until it has: what is hit from now on is of it.

    Returns what the trace says of the phase that has ended.

    Raises:
        DynacutError: the process is not being traced, or the trace does not answer in time (seconds).
    """
    check_phase_name(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind("")  # the kernel finds an abstract name: unix(7), autobind
        client.settimeout(timeout)
        try:
            client.sendto(name.encode(), _address(pid))
            return client.recv(4096).decode(errors="replace")
        except TimeoutError:
            raise DynacutError(f"the trace of process {pid} does not answer", "look at its terminal") from None
        except OSError:
            raise DynacutError(
                f"process {pid} is not being traced", "start `dynacut trace --pid P -o FILE` in another terminal"
            ) from None
