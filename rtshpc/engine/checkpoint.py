"""What a training leaves on disk: checkpoints that survive a kill at any instant, and the journal they know.

`last.pt` holds all that a training needs to go on; `best.pt` the model with the best validation. A new best is
written as `best-<epoch>.pt`, then `last.pt` names it by SHA-256, then it is renamed: whichever of the three a
kill falls between, the next start finds a pair that belongs together.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtshpc.core.errors import RunError
from rtshpc.core.paths import CellPaths
from rtshpc.core.records import file_sha256, replacing, sync_folder

FORMAT = 1
"""Raised when the contents of a checkpoint change their form."""


class BadCheckpoint(RunError):
    """A checkpoint is torn, corrupt or of another form."""


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: from 1; `epochs + 1` when all is done.
        done: steps of this epoch that are done; all of them = the validation is due.
        step: optimizer steps of the whole training.
        loss_sum: losses of this epoch so far, added.
        final_loss: mean loss of the last whole epoch.
        best_epoch: epoch of best.pt; 0 = none.
        best_ap50: its mask AP50, percent; None = no validation was possible.
        best_sha256: of best.pt.
        metrics_bytes: bytes of metrics.jsonl that belong to these steps.
        resumed: times the training went on from a checkpoint.
        seconds: time spent in steps so far, s.
        timed: steps that `seconds` covers.
    """

    epoch: int = 1
    done: int = 0
    step: int = 0
    loss_sum: float = 0.0
    final_loss: float | None = None
    best_epoch: int = 0
    best_ap50: float | None = None
    best_sha256: str = ""
    metrics_bytes: int = 0
    resumed: int = 0
    seconds: float = 0.0
    timed: int = 0


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read: `position`, and the state of the rest by name."""

    position: Position
    states: dict[str, Any] = field(default_factory=dict)


def save(path: Path, content: Mapping[str, Any]) -> str:
    """Write `content` (tensors and plain values) atomically and give the file's SHA-256.

    Equal content gives equal bytes.
    """
    with replacing(path) as temporary:
        # Through a file object: torch would put the temporary name into the archive.
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
        digest = file_sha256(temporary)
    return digest


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint, after the CRC of every part was checked.

    Raises:
        BadCheckpoint: it is absent, torn, corrupt or of another form.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        if torn is not None:
            raise BadCheckpoint(f"{path}: {torn} does not match its CRC")
        content = torch.load(path, map_location=device, weights_only=True)
    except BadCheckpoint:
        raise
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise BadCheckpoint(f"{path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadCheckpoint(f"{path}: no checkpoint of format {FORMAT}")
    return content


def random_states() -> dict[str, Any]:
    """States of torch's generators, Python's and NumPy's, as plain values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, pending = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(numbers), pending],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(place),
            int(has_gauss),
            float(gauss),
        ],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    version, numbers, pending = states["python"]
    random.setstate((version, tuple(numbers), pending))
    kind, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), place, has_gauss, gauss))


class Checkpoints:
    """The two checkpoints of one cell."""

    def __init__(self, paths: CellPaths) -> None:
        self._paths = paths
        paths.checkpoints.mkdir(parents=True, exist_ok=True)

    def _candidate(self, epoch: int) -> Path:
        return self._paths.checkpoints / f"best-{epoch}.pt"

    def write_best(self, position: Position, content: Mapping[str, Any]) -> None:
        """Write the model of `position.best_epoch`; it becomes best.pt with the next `write_last`."""
        position.best_sha256 = save(self._candidate(position.best_epoch), {"format": FORMAT, **content})

    def write_last(self, position: Position, states: Mapping[str, Any]) -> None:
        """Write last.pt, then give a new best its name."""
        save(self._paths.last_checkpoint, {"format": FORMAT, "position": asdict(position), **states})
        self._adopt(position)

    def _adopt(self, position: Position) -> None:
        candidate = self._candidate(position.best_epoch)
        if position.best_epoch and candidate.exists() and file_sha256(candidate) == position.best_sha256:
            os.replace(candidate, self._paths.best_checkpoint)
            sync_folder(self._paths.checkpoints)
        for stray in self._paths.checkpoints.glob("best-*.pt"):
            stray.unlink()

    def read_last(self, device: torch.device | str = "cpu") -> Loaded | None:
        """The state to go on from; None (with a warning where there was one) to start anew."""
        path = self._paths.last_checkpoint
        for leftover in self._paths.checkpoints.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            content = load(path, device)
            position = Position(**content.pop("position"))
            self._adopt(position)
            if position.best_epoch and (
                not self._paths.best_checkpoint.exists()
                or file_sha256(self._paths.best_checkpoint) != position.best_sha256
            ):
                raise BadCheckpoint(f"{self._paths.best_checkpoint}: is not the one that last.pt speaks of")
        except (BadCheckpoint, TypeError, KeyError) as error:
            warnings.warn(f"the training starts anew: {error}", stacklevel=2)
            return None
        return Loaded(position, content)


class Journal:
    """Rows of metrics.jsonl and scalars of TensorBoard, from one process of a training.

    Rows are flushed as they come and synced by `mark`, whose byte count a checkpoint keeps: what lies behind it
    when a training resumes belongs to steps that will be done again.
    """

    def __init__(self, path: Path, tensorboard: Path, known_bytes: int = 0, next_step: int = 1) -> None:
        """Open the journal at what a checkpoint knows of it.

        Args:
            path: metrics.jsonl.
            tensorboard: folder of the event files.
            known_bytes: bytes of `path` that stay; 0 starts anew.
            next_step: first step that will be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = os.fdopen(descriptor, "r+b")
        size = self._file.seek(0, os.SEEK_END)
        if size < known_bytes:
            warnings.warn(
                f"{path} has {size} of the {known_bytes} bytes that the checkpoint knows: rows are lost", stacklevel=2
            )
            known_bytes = _whole_lines(path)
        self._file.truncate(known_bytes)
        self._file.seek(known_bytes)
        self._writer = _event_writer(tensorboard, next_step)

    def train(self, row: Mapping[str, Any]) -> None:
        """One training step: epoch, step, loss, losses, lr, grad_norm."""
        self._write({"kind": "train", **row})
        self._scalars("train", row["step"], {key: row[key] for key in ("loss", "lr", "grad_norm")})
        self._scalars("losses", row["step"], row["losses"])

    def val(self, row: Mapping[str, Any]) -> None:
        """One validation: epoch, step, ap50, ap, f1 (percent or None) and the threshold of f1."""
        self._write({"kind": "val", **row})
        self._scalars("val", row["step"], {key: row[key] for key in ("ap50", "ap")})

    def mark(self) -> int:
        """Sync the rows so far and give their bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Sync and close both."""
        self.mark()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(row, sort_keys=True, allow_nan=False) + "\n").encode())
        self._file.flush()

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _whole_lines(path: Path) -> int:
    """Bytes up to and with the last line end."""
    return path.read_bytes().rfind(b"\n") + 1


def _event_writer(folder: Path, next_step: int) -> Any:
    """TensorBoard's writer, or None (with a warning) where TensorBoard is not installed or cannot write."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed attempt wrote behind its checkpoint is hidden by purge_step.
        return SummaryWriter(str(folder), purge_step=next_step if next_step > 1 else None)
    except (ImportError, OSError) as error:
        warnings.warn(f"no TensorBoard events: {error}", stacklevel=2)
        return None
