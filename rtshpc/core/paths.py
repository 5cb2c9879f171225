"""Every file name of a run, spelled once."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rtshpc.core.errors import RunError

COMMIT_FILE = "COMMIT"
"""Beside the code in an image: the commit it was built from."""


@dataclass(frozen=True)
class CellPaths:
    """The folder of one cell, `cells/<cell-id>/`."""

    root: Path

    @property
    def config(self) -> Path:
        """The cell itself (`Cell` as YAML): all that a stage needs to run it again by hand."""
        return self.root / "config.yaml"

    @property
    def record(self) -> Path:
        """The result; the cell is done when this file is there and valid."""
        return self.root / "record.json"

    @property
    def failure(self) -> Path:
        """Why the last attempt ended without a record; removed by the next attempt."""
        return self.root / "failure.json"

    @property
    def lock(self) -> Path:
        """Locked by the attempt in progress: no two processes work on one cell."""
        return self.root / ".lock"

    @property
    def attempts(self) -> Path:
        """One JSON object a line: every attempt that was started, and what it was given."""
        return self.root / "attempts.jsonl"

    @property
    def spent(self) -> Path:
        """One JSON object a line: attempts that are over, and what they took."""
        return self.root / "spent.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: training curve."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """`{phase, done, total, text}` of the attempt in progress, for displays."""
        return self.root / "progress.json"

    @property
    def journal(self) -> Path:
        """Preprocess and features: files that are whole, so that a task killed after them goes on behind them."""
        return self.root / "journal.jsonl"

    @property
    def pieces(self) -> Path:
        """Map: instances as the chips of a block saw them."""
        return self.root / "pieces.bin"

    @property
    def instances(self) -> Path:
        """Merge: the features of a group of scenes."""
        return self.root / "instances.parquet"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """Model, optimizer, schedule, sampler position and RNG of the last saved step."""
        return self.checkpoints / "last.pt"

    @property
    def best_checkpoint(self) -> Path:
        """Model of the epoch with the best validation AP50."""
        return self.checkpoints / "best.pt"

    @property
    def features(self) -> Path:
        """Scales of frozen backbones; may be deleted once all that needs them is trained."""
        return self.root / "features"

    def feature_file(self, split: str, first: int) -> Path:
        """The scales of the chips of a split from number `first` on."""
        return self.features / f"{split}-{first:06d}.h5"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def predictions(self) -> Path:
        """COCO JSON of the cell's detections, with geographic coordinates."""
        return self.root / "predictions.json"

    def quicklook(self, scene: int) -> Path:
        """Merge: a small picture of the cell's scene of this number."""
        return self.root / "quicklooks" / f"{scene:05d}.webp"

    @property
    def gallery(self) -> Path:
        return self.root / "gallery"


@dataclass(frozen=True)
class RunPaths:
    """The folder of one run, `runs/<name>/`.

    Attributes:
        root: the folder.
        staged: a copy of its shards and their index nearer to this node, where there is one.
    """

    root: Path
    staged: Path | None = None

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def predicted(self) -> Path:
        """One JSON object a line: memory and work of a training step, as predicted."""
        return self.root / "predicted.jsonl"

    @property
    def usage(self) -> Path:
        """What the run has spent over all attempts, when all were over; Slurm's accounting forgets."""
        return self.root / "usage.json"

    @property
    def bad_nodes(self) -> Path:
        """One JSON object a line: nodes that tasks found broken, and what they saw; new jobs avoid them."""
        return self.root / "bad_nodes.jsonl"

    @property
    def lock(self) -> Path:
        """Locked by the launcher that is working on the run."""
        return self.root / ".lock"

    @property
    def fingerprints(self) -> Path:
        """Hashes of the inputs, cached by size and time of change."""
        return self.root / "fingerprints.json"

    @property
    def weight_hashes(self) -> Path:
        """SHA-256 of the weights that trainings start from, cached by size and time of change."""
        return self.root / "weight_hashes.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def layers(self) -> Path:
        """Of a map run: what publish writes, and nothing else."""
        return self.root / "layers"

    def scene_layers(self, scene: str) -> Path:
        """The layers of one scene; its name as far as a folder can have it, and told apart where it cannot."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", scene).strip("._")[:80]
        mark = "" if plain == scene else f"-{hashlib.sha256(scene.encode()).hexdigest()[:8]}"
        return self.layers / "scenes" / f"{plain or 'scene'}{mark}"

    @property
    def scenes(self) -> Path:
        """Generated scenes, where the data config asks for them."""
        return self.root / "scenes"

    @property
    def frozen(self) -> Path:
        """Of a map run: its scenes, as they were when it was submitted."""
        return self.root / "scenes.json"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def index(self) -> Path:
        """What chips there are; of the copy where shards are staged."""
        return (self.staged or self.shards) / "index.json"

    @property
    def rejected(self) -> Path:
        return self.shards / "rejected.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def allocation(self) -> AllocationPaths:
        """The report that asks for an allocation on this run's grounds."""
        return AllocationPaths(self.root / "allocation")

    @property
    def report_page(self) -> Path:
        return self.report / "index.html"

    @property
    def report_markdown(self) -> Path:
        return self.report / "report.md"

    def report_table(self, name: str) -> Path:
        """One table of the report as CSV."""
        return self.report / f"{name}.csv"

    def report_figure(self, name: str) -> Path:
        """One figure of the report as SVG."""
        return self.report / "figures" / f"{name}.svg"

    @property
    def cells(self) -> Path:
        return self.root / "cells"

    def cell(self, cell_id: str) -> CellPaths:
        return CellPaths(self.cells / cell_id)

    def shard(self, task: int, part: int) -> Path:
        """Shard number `part` written by preprocess task `task`."""
        return self.shards / f"{task:04d}-{part:03d}.h5"

    def create(self) -> None:
        """Make the run's folders, so that nobody but their owner can write in them. Raises RunError, see `make_private`."""
        for folder in (self.root, self.logs, self.shards, self.cells, self.report):
            make_private(folder)


@dataclass(frozen=True)
class AllocationPaths:
    """The folder of an allocation report."""

    root: Path

    @property
    def page(self) -> Path:
        return self.root / "allocation.html"

    @property
    def lock(self) -> Path:
        """Held by the process that writes the report."""
        return self.root / ".lock"

    @property
    def markdown(self) -> Path:
        return self.root / "allocation.md"

    @property
    def pdf(self) -> Path:
        return self.root / "allocation.pdf"

    def table(self, name: str) -> Path:
        """One table as CSV."""
        return self.root / f"{name}.csv"

    def figure(self, name: str) -> Path:
        """One figure as SVG."""
        return self.root / "figures" / f"{name}.svg"


def write_alone() -> None:
    """Let nobody but us write what this process and its children create, whatever the umask was."""
    os.umask(os.umask(0o022) | 0o022)


def make_private(folder: Path) -> Path:
    """Create `folder` (and parents) so that nobody but its owner can write in it.

    A pickle in a folder that others can write is code they can run as us.

    Raises:
        RunError: it is somebody else's and others can write in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_mode & 0o022:
        if facts.st_uid != os.getuid():
            raise RunError(
                f"{folder}: belongs to user {facts.st_uid} and others can write in it; have its owner run"
                " `chmod go-w` on it, or give another folder (--runs DIR)"
            )
        folder.chmod(facts.st_mode & 0o7755)
    return folder
