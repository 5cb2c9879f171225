"""Results as JSON, written so that a reader sees the old file or the new one and never a part."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

try:
    from zlib_ng import zlib_ng as zlib
except ImportError:  # an install without the stages has not got it: the same sums, seventeen times slower
    import zlib

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rtshpc.core.errors import RunError


class Record(BaseModel):
    """What one cell gave, and with what it was made. A cell is done when its record reads back valid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: str = Field(description="id of the cell")
    stage: str = Field(description="stage that made it")
    label: str = Field(description="the cell's name for people, e.g. `finetune rgb+ndvi cross residual pretrained`")
    result_version: int = Field(description="the stage's RESULT_VERSION")
    started: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="wall time of the attempt that finished")
    attempts: int = Field(1, description="attempts so far, this one included")
    environment: dict[str, Any] = Field(default_factory=dict, description="host, cpu, gpu, versions, commit, image")
    results: dict[str, Any] = Field(description="the stage's own figures; see docs/records.md")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary name beside `path`; on success sync it and rename it over `path`.

    A kill at any instant leaves the old file or the new one. Leftovers are named `.<name>.*.tmp`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        # A write that found the disk full does not say in which file.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically; NaN and infinity are refused, they are no JSON."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in `path`; None when it is absent or not whole.

    Raises:
        RunError: it is there and cannot be read (a folder, no permission, ...).
    """
    content = _content(path)
    try:
        return None if content is None else json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


@contextmanager
def locked(path: Path, seconds: float, busy: str) -> Generator[None]:
    """Hold the lock file `path`; it is let go with the process, however that ends.

    Raises:
        RunError: `busy`, when another process holds it for so many seconds; or the file system has no locks.
        OSError: the file cannot be made.
    """
    with path.open("w") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(busy) from None
                time.sleep(0.05)
            except OSError as error:
                text = (
                    f"{path}: cannot be locked ({error.strerror}); take a file system with locks (flock), see `doctor`"
                )
                raise RunError(text) from None
        yield


def append_line(path: Path, value: Any) -> None:
    """Add one JSON object to a JSON-lines file; see `append_lines`."""
    append_lines(path, [value])


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Add JSON objects to a JSON-lines file and sync it once; lines of several processes never mix.

    Behind a line that a kill tore, it starts a new one.

    Raises:
        OSError: they do not fit on the disk; the file is as it was.
    """
    lines = "".join(json.dumps(value, sort_keys=True, allow_nan=False) + "\n" for value in values).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            fits = os.write(descriptor, lines) == len(lines)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(error.errno, error.strerror, str(path)) from None
        if not fits:
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn line (a kill in mid-write) and what is no object are left out.

    Raises:
        RunError: it is there and cannot be read.
    """
    return [row for line in (_content(path) or b"").splitlines() if (row := parse_row(line)) is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The object of one line of a JSON-lines file; None for a torn line and for what is no object."""
    try:
        row: Any = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], row) if isinstance(row, dict) else None


def _content(path: Path) -> bytes | None:
    """What a file holds, None when it is absent."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically: from this rename on the cell is done."""
    write_json(path, record.model_dump(mode="json"))


def crc32(content: Any, before: int = 0) -> int:
    """CRC-32 of bytes that follow those whose CRC-32 is `before`."""
    return int(cast(Any, zlib).crc32(content, before))


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # not on every system; where it is, more is read ahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """What a record says of a file that its stage has written: `file` (its name), `bytes` and `sha256`."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_record(path: Path) -> Record | None:
    """The record in `path`, or None when the cell is not done (absent, torn or of another form)."""
    value = read_json(path)
    if value is None:
        return None
    try:
        return Record.model_validate(value)
    except ValidationError:
        return None


def shards_indexed(index: Path, rejected: Path) -> bool:
    """Whether index.json names chips and shards, all of these are there, and rejected.json is a list."""
    found: Any = read_json(index)
    if not isinstance(found, dict) or not isinstance(read_json(rejected), list):
        return False
    facts = cast(dict[str, Any], found)
    chips, shards = facts.get("chips"), facts.get("shards")
    if not (isinstance(chips, list) and chips and isinstance(shards, dict) and shards):
        return False
    return all((index.parent / name).is_file() for name in cast(dict[str, Any], shards))


class _PlannedCell(BaseModel):
    id: str = Field(pattern=r"^\w+$")
    stage: str
    label: str
    needs: list[str]


class _PlannedStage(BaseModel):
    stage: str


class _PlanFile(BaseModel):
    run: str
    cells: list[_PlannedCell] = Field(min_length=1)
    stages: list[_PlannedStage] = Field(min_length=1)


def read_plan(path: Path) -> dict[str, Any] | None:
    """plan.json of a run (`launch.plan.Plan.describe`); None when it is absent, torn or of another form.

    Raises:
        RunError: it is there and cannot be read.
    """
    plan = read_json(path)
    try:
        _PlanFile.model_validate(plan)
    except ValidationError:
        return None
    return cast(dict[str, Any], plan)


class Progress:
    """Writes `{phase, done, total, text}` to a cell's progress.json, at most twice a second.

    A display reads it from another process. It is no result: it is renamed into place but not synced.
    """

    def __init__(self, path: Path | None, every_seconds: float = 0.5) -> None:
        self._path = path
        self._every = every_seconds
        self._next = 0.0

    def __call__(self, phase: str, done: int, total: int, text: str = "") -> None:
        """Tell that `done` of `total` steps of `phase` are over; `text` is for people (e.g. `loss 0.41`)."""
        now = time.monotonic()
        if self._path is None or (now < self._next and done < total):
            return
        self._next = now + self._every
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps({"phase": phase, "done": done, "total": total, "text": text}))
        temporary.replace(self._path)


SILENT = Progress(None)
"""Progress that nobody reads, for tests and library use."""
