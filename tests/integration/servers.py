"""Real servers for the tests: on loopback, in temporary directories and sessions of their own, ended by pid."""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import ClassVar, Self, TypeAlias

import psutil

from dynacut.shared.proc import task_status, thread_ids

START_TIMEOUT = 60.0
"""Seconds until a server must answer."""
END_TIMEOUT = 5.0
"""Seconds between SIGTERM and SIGKILL."""
REPLY_TIMEOUT = 30.0
"""Seconds until a client gives up on a reply."""

_PR_SET_CHILD_SUBREAPER = 36


class ServerMissing(Exception):  # noqa: N818
    """The server is not installed; the message names the package."""


class ServerFailed(Exception):  # noqa: N818
    """The server did not start; the message holds its log."""


def become_subreaper() -> None:
    """Makes orphans of our children ours: the kernel gives them to us, not to pid 1, and we can reap them.

    Source: PR_SET_CHILD_SUBREAPER in prctl(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    """Returns as soon as condition() is true; TimeoutError naming `what` when that takes too long."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout} s")
        time.sleep(0.002)


def is_gone(pid: int) -> bool:
    """Reaps the process if it is ours; tells whether /proc/PID is gone."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not Path(f"/proc/{pid}").exists()


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


class Server(ABC):
    """A server process with its directory: started by `with`, ended at its end.

    pid: the process started, for nginx the master. port: on 127.0.0.1. directory: its files, log and all.
    """

    program: ClassVar[str]
    package: ClassVar[str]

    def __init__(self) -> None:
        self._temporary = TemporaryDirectory(prefix=f"dynacut-{self.program}-", ignore_cleanup_errors=True)
        self.directory = Path(self._temporary.name)
        # mkdtemp's 0700 would shut out workers that run as somebody else.
        self.directory.chmod(0o755)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; the server must have been started."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has written so far, on stdout, stderr and to its error log."""
        return (self.directory / "log").read_text(errors="replace")

    def is_running(self) -> bool:
        """Whether the server still lives; a zombie does not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Starts the server and returns when it answers.

        Raises:
            ServerMissing: it is not installed.
            ServerFailed: it ended, or did not answer in time.
        """
        path = shutil.which(self.program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
        if path is None:
            raise ServerMissing(f"{self.program} is not installed (Debian: apt-get install {self.package})")
        become_subreaper()
        for remaining in (2, 1, 0):  # somebody else may take the port between the look and the start
            self.port = free_port()
            if self._start_once(Path(path)):
                return self
            if remaining:
                self.end()
        log = self.log
        self.end()
        raise ServerFailed(f"{self.program} did not start:\n{log}")

    def _start_once(self, program: Path) -> bool:
        command = self._prepare(program)
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )
        self._process = process
        deadline = time.monotonic() + START_TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                if self._is_ready():
                    return True
            time.sleep(0.002)
        return False

    @abstractmethod
    def _prepare(self, program: Path) -> list[str]:
        """Writes the configuration for self.port; gives the command line."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server answers; OSError counts as no."""

    def end(self) -> None:
        """Ends the server and what it has forked, and returns when /proc holds none of them any more."""
        process, self._process = self._process, None
        if process is None:
            return
        family = _session(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(END_TIMEOUT)
        wait_until(lambda: all(is_gone(each.pid) for each in family), f"the end of {self.program}")

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._temporary.cleanup()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end()
        finally:
            self._temporary.cleanup()


def _session(sid: int) -> list[psutil.Process]:
    """Our descendants in this session: as a subreaper, we keep also those whose parent is gone."""
    members = []
    for child in psutil.Process().children(recursive=True):
        with suppress(ProcessLookupError):
            if os.getsid(child.pid) == sid:
                members.append(child)
    return members


class RedisError(Exception):
    """An error reply, such as `ERR unknown command`. It is returned, not raised."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RedisError) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


Reply: TypeAlias = "str | int | RedisError | list[Reply] | None"


class RedisConnection:
    """A connection that speaks RESP2, the protocol of redis. Not for several threads at once."""

    def __init__(self, port: int, timeout: float = REPLY_TIMEOUT) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def command(self, *words: str | bytes | int) -> Reply:
        """Sends one command and gives its reply: texts as str, errors as RedisError values, nil as None.

        Raises:
            OSError: no reply (TimeoutError), or the connection is lost (ConnectionError).
        """
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        self._socket.sendall(b"*%d\r\n%s" % (len(encoded), parts))
        return self._reply()

    def _reply(self) -> Reply:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest.decode()
            case b"-":
                return RedisError(rest.decode(errors="replace"))
            case b":":
                return int(rest)
            case b"*":
                return None if rest == b"-1" else [self._reply() for _ in range(int(rest))]
            case b"$":
                if rest == b"-1":
                    return None
                data = self._file.read(int(rest) + 2)
                if len(data) != int(rest) + 2:
                    raise ConnectionError("redis closed the connection")
                return data[:-2].decode(errors="surrogateescape")
        raise ConnectionError(f"not RESP: {line!r}")

    def close(self) -> None:
        """Closes the connection."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Redis(Server):
    """redis-server; options as in redis.conf, such as {"io-threads": 4}."""

    program = "redis-server"
    package = "redis-server"

    def __init__(self, options: Mapping[str, str | int] | None = None) -> None:
        super().__init__()
        self._options = dict(options or {})
        self._connection: RedisConnection | None = None

    def _prepare(self, program: Path) -> list[str]:
        options: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": str(self.directory),
            "daemonize": "no",
            "save": '""',
            "appendonly": "no",
            "enable-debug-command": "yes",
            **self._options,
        }
        configuration = self.directory / "redis.conf"
        configuration.write_text("".join(f"{name} {setting}\n" for name, setting in options.items()))
        return [str(program), str(configuration)]

    def _is_ready(self) -> bool:
        # A thread that is amid pthread_create, in which glibc blocks its own signal 32 as well, has another mask soon.
        if any(task_status(self.pid, tid).blocked >> 31 & 1 for tid in thread_ids(self.pid)):
            return False
        connection = self.connect()
        information = connection.command("INFO", "server")
        # The port may be somebody else's redis.
        if not isinstance(information, str) or f"process_id:{self.pid}\r\n" not in information:
            connection.close()
            return False
        self._connection = connection
        return True

    def connect(self, timeout: float = REPLY_TIMEOUT) -> RedisConnection:
        """A further connection, to be closed by the caller."""
        return RedisConnection(self.port, timeout)

    def command(self, *words: str | bytes | int) -> Reply:
        """A command over the one connection that is open since the start. See RedisConnection.command."""
        assert self._connection is not None, "not started"
        return self._connection.command(*words)

    def disconnect(self) -> None:
        """Closes the connection that is open since the start, and waits until the server has seen it."""
        with self.connect() as other:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            wait_until(lambda: str(other.command("CLIENT", "LIST")).count(" addr=") == 1, "the end of the connection")

    def end(self) -> None:
        """See Server.end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().end()


HttpReply: TypeAlias = tuple[int, dict[str, str], bytes]
"""Status, headers with names in lower case, body."""


class HttpConnection:
    """A keep-alive connection. A connection that the server closes is not opened again: that is an error."""

    def __init__(self, port: int, timeout: float = REPLY_TIMEOUT) -> None:
        self._client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self._client.connect()
        self._client.auto_open = 0

    def request(self, method: str, path: str, body: bytes | str | None = None) -> HttpReply:
        """Sends a request and reads the whole reply.

        Raises:
            OSError, http.client.HTTPException: no reply, or the connection is lost.
        """
        data = body.encode() if isinstance(body, str) else body
        self._client.request(method, path, data)
        response = self._client.getresponse()
        return response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HttpServer(Server):
    """What the web servers have in common: a docroot that PUT, DELETE and MKCOL write to."""

    def __init__(self) -> None:
        super().__init__()
        self.docroot = self.directory / "docroot"
        self.docroot.mkdir()
        (self.docroot / "index.html").write_text("hello\n")

    @property
    def workers(self) -> list[int]:
        """The pids of the processes that serve: the children, or the process itself where there are none."""
        return sorted(child.pid for child in psutil.Process(self.pid).children()) or [self.pid]

    def connect(self, timeout: float = REPLY_TIMEOUT) -> HttpConnection:
        """A keep-alive connection, to be closed by the caller."""
        return HttpConnection(self.port, timeout)

    def request(self, method: str, path: str, body: bytes | str | None = None) -> HttpReply:
        """One request over a connection of its own."""
        with self.connect() as connection:
            return connection.request(method, path, body)


_NGINX = """\
daemon off;
user root;
worker_processes {workers};
pid {directory}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 256; }}
http {{
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {directory}/docroot;
    location / {{
      dav_methods PUT DELETE MKCOL;
      create_full_put_path on;
    }}
  }}
}}
"""


class Nginx(HttpServer):
    """nginx with its dav module: a master and its workers."""

    program = "nginx"
    package = "nginx"

    def __init__(self, workers: int = 2) -> None:
        super().__init__()
        self._workers = workers

    def _prepare(self, program: Path) -> list[str]:
        configuration = self.directory / "nginx.conf"
        configuration.write_text(_NGINX.format(workers=self._workers, directory=self.directory, port=self.port))
        return [str(program), "-p", str(self.directory), "-e", "stderr", "-c", str(configuration)]

    def _is_ready(self) -> bool:
        # A fork that has not yet become a worker still shows the master's command line.
        children = psutil.Process(self.pid).children()
        serving = [child for child in children if "worker process" in " ".join(child.cmdline())]
        return len(serving) == self._workers and self.request("GET", "/")[0] == 200


_LIGHTTPD = """\
server.modules = ( "mod_webdav" )
server.bind = "127.0.0.1"
server.port = {port}
server.document-root = "{directory}/docroot"
server.upload-dirs = ( "{directory}" )
server.max-keep-alive-requests = 65535
server.max-keep-alive-idle = 60
index-file.names = ( "index.html" )
webdav.activate = "enable"
webdav.is-readonly = "disable"
"""


class Lighttpd(HttpServer):
    """lighttpd with mod_webdav: one process."""

    program = "lighttpd"
    package = "lighttpd lighttpd-mod-webdav"

    def _prepare(self, program: Path) -> list[str]:
        if not Path("/usr/lib/lighttpd/mod_webdav.so").exists():
            raise ServerMissing("lighttpd has no mod_webdav (Debian: apt-get install lighttpd-mod-webdav)")
        configuration = self.directory / "lighttpd.conf"
        configuration.write_text(_LIGHTTPD.format(directory=self.directory, port=self.port))
        return [str(program), "-D", "-f", str(configuration)]

    def _is_ready(self) -> bool:
        return self.request("GET", "/")[0] == 200
