"""How far a task is: written by the task, read by whoever shows it."""

from __future__ import annotations

import json
import time
from pathlib import Path


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
