"""dynacut.json in an image directory, and CRIU's statistics: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from dynacut.offline.criu_options import RECORD_NAME, CriuOptions, Record, read_record
from dynacut.offline.stats import DumpStats, read_dump_stats
from dynacut.shared.errors import DynacutError


@pytest.mark.parametrize(
    "record",
    [
        Record(CriuOptions()),
        Record(CriuOptions(tcp_established=True, shell_job=True), "../original"),
        Record(CriuOptions(file_locks=True, ext_unix_sk=True), "/somewhere/else"),
    ],
)
def test_round_trip(tmp_path: Path, record: Record) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD_NAME).write_bytes(record.packed())
    assert read_record(tmp_path) == record


def test_the_arguments() -> None:
    assert CriuOptions().arguments() == []
    every = CriuOptions(tcp_established=True, file_locks=True, ext_unix_sk=True, shell_job=True)
    assert every.arguments() == ["--tcp-established", "--file-locks", "--ext-unix-sk", "--shell-job"]


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ("[" * 30000, "no JSON object"),
        (" " * 70000 + "{}", "no JSON object"),
        ("{}", "another schema"),
        ('{"schema": 2, "options": {}}', "another schema"),
        ('{"schema": 1}', "not all true or false"),
        ('{"schema": 1, "options": {"shell_job": "--exec-cmd"}}', "not all true or false"),
        ('{"schema": 1, "options": {"shell_job": 1}}', "not all true or false"),
        ('{"schema": 1, "options": {"action_script": true}}', "unknown option action_script"),
        ('{"schema": 1, "options": {}, "original": 1}', "its original is no path"),
        ('{"schema": 1, "options": {}, "original": ""}', "its original is no path"),
        ('{"schema": 1, "options": {}, "original": "a\\u0000b"}', "its original is no path"),
    ],
)
def test_what_is_refused(tmp_path: Path, contents: str, says: str) -> None:
    (tmp_path / RECORD_NAME).write_text(contents)
    with pytest.raises(DynacutError, match=says):
        read_record(tmp_path)


def test_links_and_fifos_are_refused(tmp_path: Path) -> None:
    path = tmp_path / RECORD_NAME
    (tmp_path / "other").write_bytes(Record(CriuOptions()).packed())
    path.symlink_to(tmp_path / "other")
    with pytest.raises(DynacutError, match="cannot be read"):
        read_record(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DynacutError, match="no JSON object"):
        read_record(tmp_path)


def test_other_keys_are_left_to_newer_versions(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps({"schema": 1, "options": {}, "comment": "by hand"}))
    assert read_record(tmp_path) == Record(CriuOptions())


def stats(message: bytes) -> bytes:
    return struct.pack("<III", 0x55105940, 0x57093306, len(message)) + message


def test_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats-dump"
    assert read_dump_stats(path) is None
    path.write_bytes(stats(b"\x0a\x08\x10\xa2\x65\x38\xbe\x05\x70\x02"))
    assert read_dump_stats(path) == DumpStats(frozen_us=12962, dumped_bytes=(702 + 2) * 4096)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        stats(b"")[:9],
        stats(b"\x12\x02\x08\x01"),  # of a restore
        stats(b"\x0a\x02\x10\x80"),  # a number that does not end
        stats(b"\x0a\x02\x15\x01"),  # a field of 32 bits, which the message does not have
        stats(b"\x08\x01"),
    ],
)
def test_other_statistics(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "stats-dump"
    path.write_bytes(data)
    assert read_dump_stats(path) is None
