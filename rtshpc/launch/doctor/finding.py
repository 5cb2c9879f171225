"""One thing that the doctor looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rtshpc.hpc import accounting

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        state: ok; off: not there, and only some uses need it; bad: every run needs it, or runs of the site do.
        found: what was seen.
        advice: what to do about it.
    """

    name: str
    state: Literal["ok", "off", "bad"]
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """The finding as a JSON object."""
        return asdict(self)


def nearest(runs: Path) -> Path:
    """The folder of runs, or the nearest one above it that is there."""
    return next(place for place in (runs.absolute(), *runs.absolute().parents) if place.is_dir())


def ask(*line: str) -> str | None:
    """What a program prints; None when it fails."""
    answer = accounting.ask(*line)
    return answer.stdout if answer is not None and answer.returncode == 0 else None
