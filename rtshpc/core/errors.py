"""Exceptions a user can cause, each one line: place, value, what is allowed, and a guess."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Iterable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that tell a task to stop: the scheduler takes the node back, or warns of a time limit."""

STOPPED = 75
"""Exit code of a task that was told to stop and has saved what it had (EX_TEMPFAIL): it can go on from there."""

BAD_NODE = 69
"""Exit code of a task whose node or GPU does not do its work (EX_UNAVAILABLE): on another node it could go on."""


class RtshpcError(Exception):
    """A mistake of the user or of the data: printed as one line, exit code 2, no traceback."""


class ConfigError(RtshpcError):
    """A value in a YAML file or `--set` is not allowed."""


class RunError(RtshpcError):
    """A run folder is not what the command needs it to be."""


class DataError(RtshpcError):
    """A data set as a whole cannot be used (single bad scenes are quarantined, not raised)."""


class ShapeError(RtshpcError, ValueError):
    """Tensors that must agree in shape do not."""


class MissingExtra(RtshpcError):
    """A library of an optional extra is needed here and is not installed."""


class BadNode(Exception):
    """The node of a task, or a GPU of it, does not do its work: no fault of the task, which another node may do."""


class SceneRejected(Exception):
    """One scene cannot be used: caught by preprocess and quarantined by name and reason.

    Attributes:
        reason: a short stable word, e.g. `no_crs`.
        detail: what was seen, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def guess(value: str, known: Iterable[str]) -> str:
    """` Known: a, b. Did you mean "a"?` for an unknown name; the second part only with a near match."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return f" Known: {', '.join(names)}.{hint}"


def unknown(place: str, value: str, known: Iterable[str]) -> str:
    """`PLACE = "VALUE" is unknown. Known: ... Did you mean ...?`, the house's sentence for a wrong name."""
    return f'{place} = "{value}" is unknown.{guess(value, known)}'


def system_sentence(error: OSError) -> str:
    """`FILE: No space left on device`, the house's sentence for what the machine refused."""
    why = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {why}" if error.filename else why


def drop_lost_output() -> None:
    """Let go of what standard output cannot take (a full disk), so that Python does not fail on it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
