"""The training curve: metrics.jsonl, which a resumed training continues to the byte, and TensorBoard."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
        """One validation: epoch, step, ap50, ap (percent or None)."""
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
