"""nginx (a master and two workers) and lighttpd: a function switched off and on again under load."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from .conftest import Dynacut, Rounds
from .load import Load
from .servers import Lighttpd, Nginx, wait_until
from .untouched import Snapshot


def test_nginx_refuses_uploads_in_all_processes_and_takes_them_again(
    nginx: Nginx, dynacut: Dynacut, rounds: Rounds
) -> None:
    """Reading a request's body answers 403 at once; nothing but PUT reads one."""
    tree = ("live", "--pid", nginx.pid, "--tree")
    workers = nginx.workers
    before = {pid: Snapshot.of(pid) for pid in [nginx.pid, *workers]}
    assert nginx.request("PUT", "/a.txt", "one")[0] == 201

    def get() -> Callable[[], object]:
        connection = nginx.connect()
        return lambda: connection.request("GET", "/")[::2] == (200, b"hello\n")

    with Load.each(get, threads=2, expect=True) as gets:
        for _ in rounds(3):
            report = dynacut.json(
                *tree, "--disable", "ngx_http_read_client_request_body", "--on-hit", "return=403", "--as", "upload"
            )
            assert sorted(process["pid"] for process in report["processes"]) == sorted([nginx.pid, *workers])
            for _ in range(8):  # whichever worker takes it
                assert nginx.request("PUT", "/b.txt", "two")[0] == 403
            assert not (nginx.docroot / "b.txt").exists()
            assert nginx.request("DELETE", "/a.txt")[0] == 204
            (feature,) = dynacut.json(*tree)["features"]
            assert feature["state"] == "disabled"
            assert feature["hits"] >= 8
            dynacut.json(*tree, "--enable", "upload")
            assert nginx.request("PUT", "/a.txt", "one")[0] in (201, 204)
        gets.wait_for(100)
        dynacut.json(*tree, "--undo")
    assert (gets.failures, gets.wrong) == (0, 0), gets.first
    assert nginx.workers == workers
    assert {pid: Snapshot.of(pid) for pid in before} == before


def test_a_worker_that_nginx_starts_later_has_the_patch(nginx: Nginx, dynacut: Dynacut) -> None:
    tree = ("live", "--pid", nginx.pid, "--tree")
    dynacut.json(*tree, "--disable", "ngx_http_read_client_request_body", "--on-hit", "return=403", "--as", "upload")
    old = nginx.workers
    for pid in old:
        psutil.Process(pid).kill()
    wait_until(lambda: len(nginx.workers) == 2 and not set(nginx.workers) & set(old), "new workers")
    wait_until(lambda: nginx.request("GET", "/")[0] == 200, "an answer")
    assert nginx.request("PUT", "/b.txt", "two")[0] == 403
    report = dynacut.json(*tree, "--undo")
    assert all(process["features"] == [] for process in report["processes"])
    assert nginx.request("PUT", "/b.txt", "two")[0] == 201


def test_lighttpd_stops_serving_ranges_and_serves_them_again(
    lighttpd: Lighttpd, dynacut: Dynacut, rounds: Rounds
) -> None:
    target = ("live", "--pid", lighttpd.pid)
    before = Snapshot.of(lighttpd.pid)

    def first_byte() -> tuple[int, bytes]:
        with lighttpd.connect() as connection:
            connection._client.request("GET", "/", headers={"Range": "bytes=0-0"})
            response = connection._client.getresponse()
            return response.status, response.read()

    def get() -> Callable[[], object]:
        connection = lighttpd.connect()
        return lambda: connection.request("GET", "/")[::2] == (200, b"hello\n")

    assert first_byte() == (206, b"h")
    with Load.each(get, threads=2, expect=True) as gets:
        for _ in rounds(3):
            dynacut.json(*target, "--disable", "http_range_rfc7233", "--on-hit", "return=200", "--as", "range")
            assert first_byte() == (200, b"hello\n")
            dynacut.json(*target, "--enable", "range")
            assert first_byte() == (206, b"h")
        gets.wait_for(100)
        dynacut.json(*target, "--undo")
    assert (gets.failures, gets.wrong) == (0, 0), gets.first
    assert Snapshot.of(lighttpd.pid) == before
