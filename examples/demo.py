"""What `make demo` shows: a running server loses its PUT command and gets it back, one client connected all along.

Every step is checked; the exit status is 1 when one is not as it should be.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
SERVER = PROJECT / "build" / "notes"
TIMEOUT = 30.0
"""Seconds for any one step."""


class Failed(Exception):  # noqa: N818
    """A step did not go as it should."""


class Screen:
    """What the viewer sees: colours on a terminal only."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._coloured = terminal and not os.environ.get("NO_COLOR")

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._coloured else text

    def step(self, text: str) -> None:
        """A headline."""
        print(f"\n{self._paint('1', text)}", flush=True)

    def typed(self, command: str) -> None:
        """A command, as typed."""
        print(f"  $ {self._paint('36', command)}", flush=True)

    def talk(self, request: str, answer: str) -> None:
        """A request of the client and its answer."""
        shown = self._paint("31" if answer.startswith("ERR") else "32", answer)
        print(f"  client: {request:<24} server: {shown}", flush=True)

    def output(self, text: str) -> None:
        """What a command printed."""
        for line in text.rstrip().splitlines():
            print(f"  {self._paint('2', '|')} {line.expandtabs(12)}")
        sys.stdout.flush()

    def good(self, text: str) -> None:
        """A result."""
        print(f"  {self._paint('32', 'ok')}: {text}", flush=True)

    def bad(self, text: str) -> None:
        """Why it ends here."""
        print(f"\n{self._paint('1;31', 'failed')}: {text}", file=sys.stderr, flush=True)


class Client:
    """One connection, open from the beginning to the end."""

    def __init__(self, port: int, screen: Screen) -> None:
        self._screen = screen
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._file = self._socket.makefile("r", encoding="utf-8", newline="\n")

    def expect(self, request: str, answer: str) -> None:
        """Sends a line; Failed when the answer is another one, or none."""
        self._socket.sendall(f"{request}\n".encode())
        got = self._file.readline().removesuffix("\n")
        self._screen.talk(request, got)
        if got != answer:
            raise Failed(f"{request!r} was answered by {got!r}, not {answer!r}")

    def close(self) -> None:
        """Closes the connection."""
        self._file.close()
        self._socket.close()


class Dynacut:
    """The dynacut command, run as shown."""

    def __init__(self, pid: int, screen: Screen) -> None:
        # Beside this Python, in the virtual environment; otherwise wherever it is installed.
        beside = Path(sys.executable).parent / "dynacut"
        self._program = str(beside) if beside.exists() else "dynacut"
        self._pid = pid
        self._screen = screen

    def show(self, *options: str) -> None:
        """Runs it for people: its output is shown as it is."""
        self._screen.output(self._run(options, shown=True))

    def json(self, *options: str, shown: bool = True) -> dict[str, Any]:
        """Runs it with --json and returns the report."""
        output = self._run((*options, "--json"), shown=shown)
        try:
            report = json.loads(output)
        except json.JSONDecodeError as error:
            raise Failed(f"dynacut printed no JSON: {error}") from None
        if not isinstance(report, dict) or report.get("schema") != 1:
            raise Failed(f"not a report of schema 1: {output}")
        return report

    def _run(self, options: tuple[str, ...], *, shown: bool) -> str:
        arguments = ["live", "--pid", str(self._pid), *options]
        if shown:
            self._screen.typed(shlex.join(["dynacut", *arguments]))
        done = subprocess.run(
            [self._program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            self._screen.output(done.stdout + done.stderr)
            raise Failed(f"{shlex.join(['dynacut', *arguments])} ended with status {done.returncode}")
        return done.stdout


def _feature(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((feature for feature in report["features"] if feature["name"] == name), None)


def _check_state(report: dict[str, Any], state: str, *, hits: int | None = None) -> None:
    feature = _feature(report, "put")
    if feature is None or feature["state"] != state:
        raise Failed(f"the feature put should be {state}, but the report says {feature}")
    if hits is not None and feature["hits"] != hits:
        raise Failed(f"{hits} hits were expected, {feature['hits']} counted")


def _stop_length(report: dict[str, Any]) -> str:
    stopped = report.get("stopped_us")
    if stopped is None:
        raise Failed("the report does not say how long the server was stopped")
    return f"{stopped:.0f} µs" if stopped else "not at all"


def _start_server() -> tuple[subprocess.Popen[str], int]:
    server = subprocess.Popen(
        [str(SERVER), "0"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    line = server.stdout.readline().rstrip()  # ends early, empty, when the server does
    if not line.startswith("notes: listening on 127.0.0.1:"):
        server.kill()
        server.wait()
        raise Failed(f"the server did not start: {line!r}")
    return server, int(line.rpartition(":")[2])


def _demonstrate(server: subprocess.Popen[str], port: int, screen: Screen) -> None:
    screen.step("1. A server runs; a client connects and stays connected.")
    screen.typed("build/notes &")
    print(f"  notes: pid {server.pid}, listening on 127.0.0.1:{port}")
    client = Client(port, screen)
    client.expect("PUT colour blue", "OK")
    client.expect("GET colour", "blue")

    screen.step("2. PUT is switched off: its function now goes on at the one that refuses.")
    dynacut = Dynacut(server.pid, screen)
    report = dynacut.json("--disable", "cmd_put", "--on-hit", "redirect=cmd_denied", "--as", "put")
    _check_state(report, "disabled")
    disabled = _stop_length(report)
    screen.good(f"the server was stopped: {disabled}")

    screen.step("3. The same connection: PUT is refused, everything else works.")
    client.expect("PUT colour red", "ERR command disabled")
    client.expect("PUT size 7", "ERR command disabled")
    client.expect("GET colour", "blue")
    client.expect("PING", "PONG")

    screen.step("4. What is patched, and how often it was hit, is in the server itself.")
    dynacut.show()
    _check_state(dynacut.json(shown=False), "disabled", hits=2)

    screen.step("5. PUT is switched on again.")
    report = dynacut.json("--enable", "put")
    _check_state(report, "enabled")
    enabled = _stop_length(report)
    screen.good(f"the server was stopped: {enabled}")
    client.expect("PUT colour red", "OK")
    client.expect("GET colour", "red")

    screen.step("6. Everything is put back.")
    dynacut.show("--undo")
    if any(feature["state"] == "disabled" for feature in dynacut.json(shown=False)["features"]):
        raise Failed("a feature is still disabled")
    client.expect("PUT colour green", "OK")
    client.expect("DEL colour", "OK")
    client.expect("PING", "PONG")
    client.close()
    if server.poll() is not None:
        raise Failed(f"the server ended with status {server.returncode}")

    screen.step(
        f"Done: same process, same connection, no restart. Stopped to switch off: {disabled}; to switch on: {enabled}."
    )


def main() -> int:
    """Runs the demonstration; ends the server in any case."""
    screen = Screen()
    if not SERVER.exists():
        screen.bad("build/notes is missing; run: make demo")
        return 1
    begin = time.monotonic()
    server = None
    try:
        server, port = _start_server()
        _demonstrate(server, port, screen)
    except (Failed, OSError, subprocess.TimeoutExpired, KeyError) as error:
        screen.bad(str(error) if isinstance(error, (Failed, OSError)) else repr(error))
        return 1
    finally:
        if server is not None:
            server.terminate()
            try:
                server.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    print(f"All steps as expected, in {time.monotonic() - begin:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
