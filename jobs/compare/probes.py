"""Requests by which `dynacut compare` sees a server as its clients do: redis PING, HTTP GET, TCP connect, a command."""

from __future__ import annotations

import argparse
import http.client
import socket
import ssl
import subprocess
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

from dynacut.shared.errors import DynacutError

REPLY_TIMEOUT = 60.0
"""Seconds until a request without a reply has failed."""
FAILURES = (OSError, http.client.HTTPException)
"""What a request raises that is not answered."""
_GUESS_TIMEOUT = 1.0
_MAX_LINE = 512
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Conversation(Protocol):
    """A connection to a server."""

    ended: bool
    """The server has said, in its last reply, that it closes the connection: the next request needs another one."""

    def ask(self) -> None:
        """Sends one request and reads the whole reply; raises one of FAILURES if none comes."""

    def close(self) -> None:
        """Closes the connection."""


class Probe(Protocol):
    """A way of asking a server whether it serves."""

    @property
    def label(self) -> str:
        """What is asked, for people."""

    @property
    def talks(self) -> bool:
        """Whether requests go over a connection that is kept, and not only over new ones."""

    @property
    def kept_pause(self) -> float | None:
        """Seconds between two requests on a connection that is kept; None if there is no connection to keep."""

    @property
    def fresh_pause(self) -> float:
        """Seconds between two requests that each have a connection of their own."""

    def open(self, timeout: float = REPLY_TIMEOUT) -> Conversation:
        """Connects; raises one of FAILURES if that cannot be done."""


@dataclass(frozen=True)
class RedisProbe:
    """PING over RESP. A server that wants a password first answers as well."""

    host: str
    port: int
    talks = True
    kept_pause = 0.0
    fresh_pause = 0.005

    @property
    def label(self) -> str:
        """See Probe."""
        return f"redis PING, {_shown(self.host, self.port)}"

    def open(self, timeout: float = REPLY_TIMEOUT) -> Conversation:
        """See Probe."""
        return _Redis(_connected(self.host, self.port, timeout))


class _Redis:
    ended = False

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.close = connection.close

    def ask(self) -> None:
        self._socket.sendall(b"PING\r\n")
        reply = b""
        while not reply.endswith(b"\r\n"):
            part = self._socket.recv(_MAX_LINE)
            reply += part
            if not part or len(reply) > _MAX_LINE:
                raise ConnectionError("the connection was closed, or the reply is not redis's")
        if not reply.startswith((b"+PONG", b"-NOAUTH")):
            raise ConnectionError(f"not a reply to PING: {reply[:40]!r}")


@dataclass(frozen=True)
class HttpProbe:
    """GET over HTTP/1.1, with keep-alive where the connection is kept. Any whole reply counts, whatever its status."""

    host: str
    port: int
    path: str = "/"
    tls: bool = False
    talks = True
    kept_pause = 0.0
    fresh_pause = 0.005

    @property
    def label(self) -> str:
        """See Probe."""
        return f"GET {'https' if self.tls else 'http'}://{_shown(self.host, self.port)}{self.path}"

    def open(self, timeout: float = REPLY_TIMEOUT) -> Conversation:
        """See Probe."""
        return _Http(self, timeout)


class _Http:
    def __init__(self, probe: HttpProbe, timeout: float) -> None:
        kind = http.client.HTTPConnection
        if probe.tls:
            context = ssl.create_default_context()
            context.check_hostname = False  # the server is known by its pid; its certificate does not matter here
            context.verify_mode = ssl.CERT_NONE
            kind = partial(http.client.HTTPSConnection, context=context)  # type: ignore[assignment]
        self._client = kind(probe.host, probe.port, timeout=timeout)
        self._client.connect()
        self._client.auto_open = 0
        self._path = probe.path
        self.ended = False
        self.close = self._client.close

    def ask(self) -> None:
        self._client.request("GET", self._path)
        response = self._client.getresponse()
        self.ended = response.will_close
        response.read()


@dataclass(frozen=True)
class TcpProbe:
    """Connects; on a kept connection it only looks whether it is still open.

    The kernel accepts connections for a process that stands still, so a short stop does not show.
    """

    host: str
    port: int
    talks = False
    kept_pause = 0.001
    fresh_pause = 0.005

    @property
    def label(self) -> str:
        """See Probe."""
        return f"TCP connect, {_shown(self.host, self.port)}"

    def open(self, timeout: float = REPLY_TIMEOUT) -> Conversation:
        """See Probe."""
        return _Tcp(_connected(self.host, self.port, timeout))


class _Tcp:
    ended = False

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self.close = connection.close

    def ask(self) -> None:
        try:
            if not self._socket.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("the server has closed the connection")
        except BlockingIOError:
            pass  # open, and nothing to read


@dataclass(frozen=True)
class CommandProbe:
    """A shell command that succeeds, with exit status 0, as long as the server serves."""

    command: str
    talks = False
    kept_pause = None
    fresh_pause = 0.001

    @property
    def label(self) -> str:
        """See Probe."""
        return f"command {self.command}"

    def open(self, timeout: float = REPLY_TIMEOUT) -> Conversation:
        """See Probe."""
        return _Command(self.command, timeout)


class _Command:
    ended = True

    def __init__(self, command: str, timeout: float) -> None:
        self._command = command
        self._timeout = timeout

    def ask(self) -> None:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            done = subprocess.run(self._command, shell=True, timeout=self._timeout, check=False, **streams)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            raise TimeoutError("no answer in time") from None
        if done.returncode:
            raise ConnectionError(f"exit status {done.returncode}")

    def close(self) -> None:
        pass


def endpoint(text: str) -> tuple[str, int]:
    """[HOST:]PORT, for argparse; without HOST it is 127.0.0.1.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"not [HOST:]PORT: {text!r}")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def http_probe(text: str) -> HttpProbe:
    """A URL, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is not one of HTTP.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"not a URL such as http://127.0.0.1:8080/: {text!r}")
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return HttpProbe(parts.hostname, port or (443 if tls else 80), path, tls)


def guessed(pids: Sequence[int]) -> Probe | None:
    """A probe for the first TCP port that one of these processes listens at: redis PING if that is answered, HTTP GET
    if that is, else TCP connect. None if they do not listen, or not answer."""
    found = _listening(pids)
    kinds: list[type[RedisProbe] | type[HttpProbe] | type[TcpProbe]] = [RedisProbe, HttpProbe, TcpProbe]
    for kind in kinds:
        for host, port in found:
            probe = kind(host, port)
            if answers(probe):
                return probe
    return None


def answers(probe: Probe) -> bool:
    """Whether a request is answered."""
    try:
        with closing(probe.open(_GUESS_TIMEOUT)) as conversation:
            conversation.ask()
    except FAILURES:
        return False
    return True


def _listening(pids: Sequence[int]) -> list[tuple[str, int]]:
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error as error:
        raise DynacutError(f"the sockets of the process cannot be seen: {error}", "give a probe, or be root") from None
    found = {
        (_ANY.get(each.laddr.ip, each.laddr.ip), int(each.laddr.port))
        for each in connections
        if each.laddr and each.status == psutil.CONN_LISTEN and each.pid in pids
    }
    return sorted(found, key=lambda place: (place[1], ":" in place[0]))


def _connected(host: str, port: int, timeout: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
