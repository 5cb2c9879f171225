from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.errors import RunError, system_sentence
from rtshpc.core.records import (
    Record,
    append_line,
    locked,
    read_json,
    read_lines,
    read_record,
    replacing,
    write_json,
    write_record,
)


def record() -> Record:
    return Record(
        cell="c", stage="gather", label="gather", result_version=1, started="", seconds=1.5, results={"a": [1]}
    )


def test_a_record_reads_back_the_same(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", record())
    assert read_record(tmp_path / "record.json") == record()


def test_a_torn_or_foreign_record_is_none(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_record(path) is None
    write_record(path, record())
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        assert read_record(path) is None
    path.write_text('{"cell": "c"}')
    assert read_record(path) is None


def test_a_lock_has_one_holder_at_a_time_and_the_next_one_waits_only_so_long(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locked(lock, 0.0, "busy"), pytest.raises(RunError, match=r"^busy$"), locked(lock, 0.1, "busy"):
        pytest.fail("two hold it")
    with locked(lock, 0.0, "busy"):
        pass


def test_an_error_while_writing_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("nan")]}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, value)
    assert read_json(path) == 1


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"a": 2})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    assert read_lines(tmp_path / "absent") == []


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    append_line(path, {"a": 2})
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("failure", ["short", "error"])
def test_a_line_that_does_not_fit_on_the_disk_is_told_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    path = tmp_path / "l.jsonl"
    append_line(path, {"a": 1})
    write, before = os.write, path.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data[:5])
        if failure == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        append_line(path, {"a": 2})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before


def test_lines_that_are_no_object_or_no_utf8_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'5\n[5]\n{"a": 1}\n\xff\xfe{"a"\nnull\n{"b": 2}\n')
    assert read_lines(path) == [{"a": 1}, {"b": 2}]
    path.write_bytes(b'{"a": "\xff"}')
    assert read_json(path) is None


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(OSError) as caught, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert system_sentence(caught.value) == f"{path}: No space left on device"


@pytest.mark.parametrize("read", [read_json, read_lines])
def test_what_is_there_but_cannot_be_read_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RunError, match=r"a\.json: cannot be read: Is a directory"):
        read(tmp_path / "a.json")


def _append(path: Path, worker: int) -> None:
    for index in range(50):
        append_line(path, {"worker": worker, "index": index, "fill": "x" * 200})


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    workers = [multiprocessing.Process(target=_append, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read_lines(path)) == len(path.read_text().splitlines()) == 150


def _write_forever(path: Path) -> None:
    while True:
        write_json(path, {"rows": list(range(20_000))})


def test_a_reader_never_sees_a_part_though_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"rows": list(range(20_000))})
    for delay in (0.02, 0.05, 0.09):
        writer = multiprocessing.Process(target=_write_forever, args=(path,))
        writer.start()
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        value = read_json(path)
        assert value is not None
        assert len(value["rows"]) == 20_000


def test_a_file_system_without_locks_is_named_and_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    lock = tmp_path / ".lock"
    with (
        pytest.raises(RunError, match=rf"^{re.escape(str(lock))}: cannot be locked \(No locks available\)"),
        locked(lock, 9.0, "busy"),
    ):
        pass
