"""SIGKILL a features cell anywhere, start it again, and its files are those of an undisturbed one, to the byte."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from rtshpc.core import features as plan
from rtshpc.core.cell import Cell
from rtshpc.core.grid import cells, finished
from rtshpc.core.load import load_run, write_cell, write_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import read_lines, read_record
from rtshpc.stages import runner

SMALL = (
    "data.scenes.generated.sites=[north, south]",
    "data.scenes.generated.scenes_per_site=4",
    "data.scenes.generated.size_px=128",
    "data.scenes.generated.slump_px=[60, 400]",
    "data.chip.size_px=64",
    "data.split.val_fraction=0.3",
    "data.shard.tasks=1",
    "pretrain.epochs=1",
    "pretrain.device=cpu",
    "finetune.device=cpu",
    "finetune.features=cached",
    "finetune.modalities=[rgb, ndvi]",
    "grid={}",
)
PATIENCE = 120.0


def _store(root: Path, cell_id: str, part_bytes: int) -> None:
    torch.set_num_threads(1)
    plan.PART_BYTES = part_bytes
    sys.exit(runner.run("features", root, cell_id))


def _start(paths: RunPaths, cell: Cell) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rtshpc.stages.runner", "rtshpc.stages.features"])
    # One chip a file: a file is made in a few milliseconds, and there are many to be killed in.
    process = context.Process(target=_store, args=(paths.root, cell.id, 8 * plan.record_bytes(cell)))
    process.start()
    return process


def _content(own: CellPaths) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in own.features.iterdir()}


@pytest.mark.slow
def test_killed_features_end_as_undisturbed_ones(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.create()
    config = load_run("demo", SMALL)
    write_run_config(paths.config, config, {})
    found = cells(config, "f")
    for cell in found:
        paths.cell(cell.id).root.mkdir()
        write_cell(paths.cell(cell.id).config, cell)
        if cell.stage in ("preprocess", "gather") or cell.label == "pretrain ndvi":
            assert runner.run(cell.stage, paths.root, cell.id) == 0
    cell = next(cell for cell in found if cell.stage == "features" and cell.modalities == ("ndvi",))
    own = paths.cell(cell.id)
    calm = _start(paths, cell)
    calm.join(PATIENCE)
    assert calm.exitcode == 0 and finished(cell, paths) is not None
    wanted = _content(own)
    own.record.unlink()
    own.journal.unlink()
    kills = 0
    for target in (0, 2, 5, 9, 14):
        process = _start(paths, cell)
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and len(read_lines(own.journal)) < target:
            assert time.monotonic() < deadline, "the stage hangs"
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.join()
        kills += process.exitcode == -9
    assert kills >= 4 and not own.record.exists()
    last = _start(paths, cell)
    last.join(PATIENCE)
    record = read_record(own.record)
    assert last.exitcode == 0 and record is not None and record.results["kept"] >= 9
    assert _content(own) == wanted
    assert finished(cell, paths) is not None
