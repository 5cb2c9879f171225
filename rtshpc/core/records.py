"""Results as JSON, written so that a reader sees the old file or the new one and never a part."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


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
    """The JSON in `path`; None when it is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def append_line(path: Path, value: Any) -> None:
    """Add one JSON object to a JSON-lines file and sync it; one `write` call, so lines never mix."""
    line = json.dumps(value, sort_keys=True, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[Any]:
    """The whole lines of a JSON-lines file; a torn last line (a kill in mid-write) is left out."""
    if not path.exists():
        return []
    rows: list[Any] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically: from this rename on the cell is done."""
    write_json(path, record.model_dump(mode="json"))


def read_record(path: Path) -> Record | None:
    """The record in `path`, or None when the cell is not done (absent, torn or of another form)."""
    value = read_json(path)
    if value is None:
        return None
    try:
        return Record.model_validate(value)
    except ValidationError:
        return None
