"""dynacut restore on real servers: they run again with their connections; and what it says when that cannot be."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.offline import processes
from dynacut.offline import restore as restore_module
from dynacut.offline.checkpoint import checkpoint
from dynacut.offline.criu import Criu
from dynacut.offline.criu_options import RECORD_NAME, CriuOptions, Record, read_record
from dynacut.offline.image_tasks import ImageTasks, read_tasks
from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.pages import PARENT, Extent, Pages
from dynacut.offline.restore import restore
from dynacut.offline.wanted_options import look
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import children, task_status, thread_ids

from .checkpoints import job, reaping, shell_job, the_criu
from .conftest import Dynacut
from .load import Load
from .programs import compile_program
from .servers import Lighttpd, Nginx, Redis, is_gone, is_running, wait_until


@pytest.fixture
def criu() -> Criu:
    return the_criu()


@pytest.fixture(autouse=True)
def logs_of_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are kept for the user to read; here they go with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def refused(directory: Path, says: str, advises: str = "", **options: float) -> None:
    """The image is not restored, and none of its processes is left."""
    with pytest.raises(DynacutError) as caught:
        restore(directory, **options)  # type: ignore[arg-type]
    text = "\n".join([caught.value.problem, *caught.value.details])
    assert says in text
    assert advises in caught.value.advice
    assert int(caught.value.status) == 1


# Servers, as users have them.


def test_redis_under_load_keeps_connections_and_every_increment(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    connections = [redis.connect() for _ in range(4)]
    free = iter(connections)

    def increments() -> Callable[[], object]:
        connection = next(free)
        return lambda: connection.command("INCR", "counter")

    with Load.each(increments, threads=4) as load:
        for number in range(3):
            load.wait_for(200)
            directory = tmp_path / str(number)
            done = checkpoint(redis.pid, directory, criu=criu)
            assert done.remaining == () and done.options.tcp_established
            assert restore(directory, criu=criu).pid == redis.pid
            load.wait_for(200)
        load.stop()
    assert (load.failures, load.wrong, load.first) == (0, 0, "")
    with redis.connect() as connection:
        assert connection.command("GET", "counter") == str(load.count)


def test_redis_under_redis_benchmark(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    command = ["redis-benchmark", "-p", str(redis.port), "-n", "40000", "-c", "20", "-t", "incr", "-q"]
    with redis.connect() as connection, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        wait_until(lambda: connection.command("GET", "counter:__rand_int__") is not None, "the first of the requests")
        checkpoint(redis.pid, tmp_path / "image", criu=criu)
        restore(tmp_path / "image", criu=criu)
        output, _ = benchmark.communicate(timeout=100)
        assert benchmark.returncode == 0, output
        assert connection.command("GET", "counter:__rand_int__") == "40000", output


def test_nginx_with_its_workers(criu: Criu, nginx: Nginx, tmp_path: Path) -> None:
    workers = nginx.workers
    with nginx.connect() as connection:
        assert connection.request("GET", "/")[0] == 200
        checkpoint(nginx.pid, tmp_path / "image", criu=criu)
        done = restore(tmp_path / "image", criu=criu)
        assert (done.pid, done.exe, done.rolled_back_from) == (nginx.pid, "/usr/sbin/nginx", None)
        assert 0 < done.criu_ms < done.wall_ms
        assert nginx.workers == workers
        assert connection.request("GET", "/")[2] == b"hello\n"  # over the connection from before
    assert nginx.request("PUT", "/new", b"text")[0] == 201
    os.kill(workers[0], 9)  # the master still masters
    wait_until(lambda: len(nginx.workers) == 2 and workers[0] not in nginx.workers, "the worker that replaces it")
    assert nginx.request("GET", "/new")[2] == b"text"


def test_lighttpd_by_the_command(criu: Criu, lighttpd: Lighttpd, dynacut: Dynacut, tmp_path: Path) -> None:
    assert criu
    image, pid_file = tmp_path / "image", tmp_path / "pid"
    with reaping([lighttpd.pid]):
        dynacut.json("checkpoint", "--pid", lighttpd.pid, image)
    before = {path.name: path.stat().st_mtime_ns for path in image.iterdir()}
    report = dynacut.json("restore", image, "--pid-file", pid_file)
    assert report["target"] == {"pid": lighttpd.pid, "exe": "/usr/sbin/lighttpd"}
    assert report["restored"] and not report["rolled_back"]
    assert 0 < report["criu_ms"] < report["wall_ms"]
    assert pid_file.read_text() == f"{lighttpd.pid}\n"
    assert lighttpd.request("GET", "/")[2] == b"hello\n"
    assert {path.name: path.stat().st_mtime_ns for path in image.iterdir()} == before
    assert processes.end([lighttpd.pid]) == []
    done = dynacut("restore", image)  # an image can be restored as often as one likes
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"process {lighttpd.pid} (/usr/sbin/lighttpd) runs again, ")
    assert lighttpd.request("GET", "/")[0] == 200


@pytest.mark.usefixtures("criu")
@pytest.mark.parametrize("count", [1, 5])
def test_children_that_nobody_has_reaped(dynacut: Dynacut, tmp_path: Path, count: int) -> None:
    """In an image they have a thread of any id: CRIU writes memory there that nothing was put into."""
    program, said = compile_program("unreaped", tmp_path), tmp_path / "said"
    image, changed = tmp_path / "image", tmp_path / "changed"
    with job(program, said, str(count)) as pid:
        wait_until(lambda: [task_status(each).state for each in children(pid)] == ["Z"] * count, "zombies")
        zombies = sorted(children(pid))
        checkpoint(pid, image)
        done = dynacut.json("offline", image, "--disable", "feature", "--on-hit", "return=-7", "-o", changed)
        assert [feature["state"] for feature in done["features"]] == ["disabled"]
        assert restore(changed).rolled_back_from is None
        assert sorted(children(pid)) == zombies
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: is_gone(pid), "the end")
    assert said.read_text() == "3 " * count + "-7\n"


def test_a_patched_process_comes_back_patched(criu: Criu, redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    dynacut.json(
        "live", "--pid", redis.pid, "--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set"
    )
    with redis.connect() as connection:
        refusal = connection.command("SET", "key", "value")
        checkpoint(redis.pid, tmp_path / "image", criu=criu)
        restore(tmp_path / "image", criu=criu)
        assert connection.command("SET", "key", "value") == refusal
        (feature,) = dynacut.json("live", "--pid", redis.pid)["features"]
        assert (feature["name"], feature["state"], feature["hits"]) == ("set", "disabled", 2)
        dynacut.json("live", "--pid", redis.pid, "--undo")
        assert connection.command("SET", "key", "value") == "OK"


# Images made by hand.


def test_an_image_of_criu_itself(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    """No dynacut.json: the options are found by looking at the image."""
    with redis.connect() as connection:
        connection.command("SET", "key", "value")
        command: list[str | Path] = [criu.path, "dump", "-t", str(redis.pid), "-D", tmp_path, "--tcp-established"]
        subprocess.run([*command, "--network-lock", criu.network_lock, "-o", "dump.log"], check=True)
        assert processes.wait_until_gone({redis.pid: processes.start_time(redis.pid)}, 10) == []
        assert read_record(tmp_path) is None
        assert read_tasks(tmp_path).record.options == CriuOptions(tcp_established=True, ext_unix_sk=True)
        assert restore(tmp_path, criu=criu).pid == redis.pid
        assert connection.command("GET", "key") == "value"


def test_looking_finds_the_options_that_were_recorded(criu: Criu, tmp_path: Path) -> None:
    with shell_job("flock", "--no-fork", tmp_path / "lock", "sleep", "1000") as pid:
        wait_until(lambda: look([pid]).options.file_locks, "the lock")
        directory = tmp_path / "image"
        recorded = checkpoint(pid, directory, criu=criu).options
        assert recorded == CriuOptions(file_locks=True, shell_job=True)
        (directory / RECORD_NAME).unlink()
        assert read_tasks(directory).record.options == CriuOptions(file_locks=True, shell_job=True, ext_unix_sk=True)
        restore(directory, criu=criu)
        assert is_running(pid)


# What goes wrong.


def test_what_is_no_image(criu: Criu, tmp_path: Path) -> None:
    assert criu
    refused(tmp_path / "no", "cannot be opened: No such file or directory")
    refused(tmp_path, "pstree.img", "complete image")
    (tmp_path / "pstree.img").write_bytes(b"no image at all")
    refused(tmp_path, "magic number")


def test_a_pid_that_is_taken(criu: Criu, redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    checkpoint(redis.pid, tmp_path / "image", leave_running=True, criu=criu)
    refused(tmp_path / "image", f"process {redis.pid} (redis-server) has a pid that the image needs", "it still runs")
    done = dynacut("restore", tmp_path / "image")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"process {redis.pid} (redis-server) has a pid" in done.stderr
    with redis.connect() as connection:
        assert connection.command("PING") == "PONG"


def process_with_id(wanted: int) -> int:
    """A process of ours that has an id which is free (ns_last_pid in proc_sys_kernel(5))."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(wanted - 1))
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        if pid == wanted:
            return pid
        assert processes.end([pid]) == []
    raise AssertionError(f"somebody else takes {wanted} each time")


@pytest.mark.usefixtures("criu")
@pytest.mark.parametrize("which", [0, -1])
def test_an_id_that_is_taken_while_it_is_restored(
    redis: Redis, which: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the process, or of a thread: by one that ends soon, as most do. It is tried once more."""
    taken = thread_ids(redis.pid)[which]
    checkpoint(redis.pid, tmp_path / "image")
    make_free = restore_module._make_free
    others: list[int] = []

    def just_before(tasks: ImageTasks) -> None:
        if others:
            assert processes.end(others) == []
        make_free(tasks)
        if not others:
            others.append(process_with_id(taken))

    monkeypatch.setattr(restore_module, "_make_free", just_before)
    try:
        restored = restore(tmp_path / "image")
    except DynacutError:
        processes.end(others)
        raise
    assert restored.pid == redis.pid
    assert others == [taken]
    assert taken in thread_ids(redis.pid)
    assert list(tmp_path.glob("dynacut-restore-*")) == []
    with redis.connect() as connection:
        assert connection.command("PING") == "PONG"


def test_a_file_that_has_changed(criu: Criu, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("as it was")
    with path.open() as file, job("sleep", "1000", pass_fds=[file.fileno()]) as pid:
        checkpoint(pid, tmp_path / "image", criu=criu)
        path.write_text("longer than it was")
        refused(tmp_path / "image", "has bad size 18 (expect 9)", "a file has changed since the dump")
        assert not Path(f"/proc/{pid}").exists()
        path.write_text("as it was")
        assert restore(tmp_path / "image", criu=criu).pid == pid  # the failure has left nothing in the way


def test_a_port_that_is_taken(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    done = checkpoint(redis.pid, tmp_path / "image", criu=criu)
    other = Redis()
    other.port = redis.port
    try:
        assert other._start_once(Path("/usr/bin/redis-server"))
        refused(tmp_path / "image", "Address already in use", "another process uses an address")
    finally:
        other.end()
    assert restore(tmp_path / "image", criu=criu).pid == done.pid


def test_pages_of_a_parent_that_is_not_there(criu: Criu, tmp_path: Path) -> None:
    """CRIU would look for them for ever."""
    with job("sleep", "1000") as pid:
        directory = tmp_path / "image"
        checkpoint(pid, directory, criu=criu)
        folder = ImageFolder(directory)
        pages = Pages(folder, str(pid))
        first, *others = pages.extents
        data = pages.with_extents(
            [*others, Extent(first.end - 4096, first.end, -1, PARENT)][::-1][:1], pages.head.pages_id
        )
        pages.close()
        folder.close()
        (directory / pages.name).write_bytes(data)
        (directory / pages.pages_name).write_bytes(b"")
        refused(directory, "refers to pages of a parent, and there is no parent directory")


def test_a_restore_that_takes_too_long_leaves_nothing(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    with redis.connect() as connection:
        checkpoint(redis.pid, tmp_path / "image", criu=criu)
        for timeout in (0.001, 0.003, 0.006):
            refused(tmp_path / "image", "took too long", timeout=timeout)
            assert not Path(f"/proc/{redis.pid}").exists()
        assert restore(tmp_path / "image", criu=criu).pid == redis.pid
        assert connection.command("PING") == "PONG"


def test_connections_that_are_over_are_closed(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    """As when an image is restored a second time: the connections of the first time are over, or in the way."""
    with redis.connect() as connection:
        connection.command("SET", "key", "value")
        checkpoint(redis.pid, tmp_path / "image", criu=criu)
        restore(tmp_path / "image", criu=criu)
        assert processes.end([redis.pid]) == []
        assert restore(tmp_path / "image", criu=criu, tcp_close=True).pid == redis.pid
    with redis.connect() as connection:
        assert connection.command("GET", "key") == "value"


# The way back.


def rewritten(original: Path, copy: Path, pid: int, *, names: str | None) -> Path:
    """A copy of an image that CRIU cannot restore: a thread's registers are missing."""
    shutil.copytree(original, copy)
    (copy / f"core-{pid}.img").write_bytes((copy / f"core-{pid}.img").read_bytes()[:8])
    record = read_record(original)
    assert record is not None
    (copy / RECORD_NAME).write_bytes(Record(record.options, names).packed())
    return copy


@pytest.mark.parametrize("names", ["../original", "ABSOLUTE"])
def test_the_original_is_restored_instead(
    criu: Criu, redis: Redis, dynacut: Dynacut, tmp_path: Path, names: str
) -> None:
    original = tmp_path / "original"
    with redis.connect() as connection:
        connection.command("SET", "key", "value")
        checkpoint(redis.pid, original, criu=criu)
        copy = rewritten(original, tmp_path / "copy", redis.pid, names=names.replace("ABSOLUTE", str(original)))
        report = dynacut.json("restore", copy, status=3)
        assert report["rolled_back"] and not report["restored"]
        assert Path(report["image"]).samefile(original) and report["errors"]
        assert report["target"]["pid"] == redis.pid
        assert connection.command("GET", "key") == "value"
    with pytest.raises(DynacutError, match="has a pid that the image needs"):
        restore(copy, criu=criu)  # it runs already


def test_the_way_back_from_an_image_that_does_not_hold_together(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    checkpoint(redis.pid, tmp_path / "original", criu=criu)
    copy = rewritten(tmp_path / "original", tmp_path / "copy", redis.pid, names="../original")
    (copy / "pstree.img").unlink()
    done = restore(copy, criu=criu)
    assert (done.pid, done.rolled_back_from) == (redis.pid, copy)
    assert "pstree.img" in done.errors[0]


def test_no_way_back_is_taken_that_is_not_wanted_or_there(
    criu: Criu, redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    checkpoint(redis.pid, original, criu=criu)
    copy = rewritten(original, tmp_path / "copy", redis.pid, names="../original")
    done = dynacut("restore", "--no-rollback", copy)
    assert done.returncode == 1 and "CRIU cannot restore" in done.stderr and "(criu/" in done.stderr
    unreadable = rewritten(original, tmp_path / "unreadable", redis.pid, names=None)
    (unreadable / "pstree.img").unlink()
    refused(unreadable, "pstree.img")
    refused(rewritten(original, tmp_path / "alone", redis.pid, names=None), "CRIU cannot restore")
    refused(rewritten(original, tmp_path / "lost", redis.pid, names="../no"), "neither the image nor its original")
    assert not Path(f"/proc/{redis.pid}").exists()
    done = dynacut("restore", copy)
    assert done.returncode == 3 and f"its original, {tmp_path / 'copy' / '../original'}, was" in done.stderr


def test_a_record_of_somebody_else_is_not_obeyed(criu: Criu, tmp_path: Path) -> None:
    with job("sleep", "1000") as pid:
        checkpoint(pid, tmp_path / "image", criu=criu)
        (tmp_path / "image" / RECORD_NAME).write_text('{"schema": 1, "options": {"exec_cmd": true}}')
        refused(tmp_path / "image", "unknown option exec_cmd", "delete the file")


def test_the_pid_file_cannot_be_written(criu: Criu, dynacut: Dynacut, tmp_path: Path) -> None:
    with job("sleep", "1000") as pid:
        checkpoint(pid, tmp_path / "image", criu=criu)
        done = dynacut("restore", tmp_path / "image", "--pid-file", tmp_path / "no" / "file")
        assert done.returncode == 3
        assert f"process {pid} runs again, but" in done.stderr
        assert is_running(pid)
