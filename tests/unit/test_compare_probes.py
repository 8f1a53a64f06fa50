"""The clients of dynacut compare: what they ask, and what they see of servers that pause, break off, or end."""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dynacut.jobs.compare.prober import Prober
from dynacut.jobs.compare.probes import (
    CommandProbe,
    HttpProbe,
    RedisProbe,
    TcpProbe,
    answers,
    endpoint,
    guessed,
    http_probe,
)
from dynacut.shared.proc import is_alive

Answer = Callable[[socket.socket], None]


@contextmanager
def listening(answer: Answer) -> Iterator[int]:
    """A server of one thread for each connection, answered by answer(); gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)


def pong(connection: socket.socket) -> None:
    while connection.recv(100):
        connection.sendall(b"+PONG\r\n")


class OneByOne(BaseHTTPRequestHandler):
    """Says that it closes the connection with each reply, and does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def http_server() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), OneByOne)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)


# Probes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6379", ("127.0.0.1", 6379)), ("redis:1", ("redis", 1)), ("[::1]:80", ("::1", 80)), (":80", ("127.0.0.1", 80))],
)
def test_endpoints(text: str, expected: tuple[str, int]) -> None:
    assert endpoint(text) == expected


@pytest.mark.parametrize("text", ["", "x", "x:", "1:-1", "0", "65536", "²"])
def test_no_endpoints(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        endpoint(text)


def test_urls() -> None:
    assert http_probe("http://h") == HttpProbe("h", 80, "/")
    assert http_probe("https://[::1]:8443/a?b=c#d") == HttpProbe("::1", 8443, "/a?b=c", tls=True)
    for text in ("", "h", "ftp://h/", "http:///x", "http://h:x/", "http://h/\r\nX: y", "http://[::1/"):
        with pytest.raises(argparse.ArgumentTypeError):
            http_probe(text)


def test_what_a_server_speaks_is_found_out() -> None:
    with listening(pong) as port:
        assert answers(RedisProbe("127.0.0.1", port))
        assert guessed([os.getpid()]) == RedisProbe("127.0.0.1", port)
    with http_server() as port:
        assert not answers(RedisProbe("127.0.0.1", port))
        assert guessed([os.getpid()]) == HttpProbe("127.0.0.1", port)
    with listening(lambda connection: (connection.recv(100), connection.recv(100), None)[2]) as port:
        assert guessed([os.getpid()]) == TcpProbe("127.0.0.1", port)
    assert guessed([]) is None
    assert not answers(TcpProbe("127.0.0.1", port))


def test_a_command_answers_by_its_exit_status() -> None:
    assert answers(CommandProbe("true"))
    assert not answers(CommandProbe("exit 3"))


def test_a_tcp_connection_that_is_closed_is_noticed() -> None:
    closing_time = threading.Event()
    with (
        listening(lambda _: (closing_time.wait(10.0), None)[1]) as port,
        closing(TcpProbe("127.0.0.1", port).open()) as conversation,
    ):
        conversation.ask()
        conversation.ask()
        closing_time.set()
        deadline = time.monotonic() + 10.0
        with pytest.raises(ConnectionResetError):
            while time.monotonic() < deadline:
                conversation.ask()


# Clients.


def test_the_longest_wait_is_that_of_a_server_that_pauses() -> None:
    paused = threading.Event()

    def answer(connection: socket.socket) -> None:
        while connection.recv(100):
            if paused.is_set():
                paused.clear()
                time.sleep(0.25)
            connection.sendall(b"+PONG\r\n")

    with listening(answer) as port, Prober(RedisProbe("127.0.0.1", port), keep=True) as prober:
        prober.begin()
        paused.set()
        time.sleep(0.05)
        seen = prober.end(10.0)
        assert 250_000 <= seen.longest_us < 2_000_000
        assert (seen.failed, seen.lost) == (0, 0)
        prober.begin()
        time.sleep(0.1)
        quiet = prober.end(10.0)
        assert quiet.longest_us < seen.longest_us
        assert quiet.replies > 10


def test_a_broken_connection_counts_and_is_made_again() -> None:
    breaking = threading.Event()

    def answer(connection: socket.socket) -> None:
        while connection.recv(100):
            if breaking.is_set():
                breaking.clear()
                return
            connection.sendall(b"+PONG\r\n")

    with listening(answer) as port, Prober(RedisProbe("127.0.0.1", port), keep=True) as prober:
        prober.begin()
        time.sleep(0.05)
        breaking.set()
        time.sleep(0.05)
        seen = prober.end(10.0)
        assert (seen.failed, seen.lost) == (1, 1)
        assert seen.replies > 1


def test_a_connection_that_the_server_says_it_closes_is_not_lost() -> None:
    with http_server() as port, Prober(HttpProbe("127.0.0.1", port), keep=True) as prober:
        prober.begin()
        time.sleep(0.1)
        seen = prober.end(10.0)
        assert (seen.failed, seen.lost) == (0, 0)
        assert seen.replies > 2


def test_a_server_that_is_gone_shows_as_a_wait_until_now() -> None:
    with listening(pong) as port:
        prober = Prober(RedisProbe("127.0.0.1", port), keep=False)
        prober.begin()
    with prober:
        time.sleep(0.3)
        seen = prober.end(0.0)
        assert seen.longest_us > 200_000
        assert seen.failed > 0


def test_a_client_ends_with_its_parent(tmp_path: Path) -> None:
    with listening(pong) as port:
        pid = os.fork()
        if pid == 0:
            prober = Prober(RedisProbe("127.0.0.1", port), keep=True)
            (tmp_path / "pid").write_text(str(prober._pid))
            os._exit(0)
        os.waitpid(pid, 0)
        child = int((tmp_path / "pid").read_text())
        deadline = time.monotonic() + 10.0
        while is_alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.005)
