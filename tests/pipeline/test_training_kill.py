"""SIGKILL a training anywhere, start it again, and it ends as if nothing had happened, to the byte."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtshpc.core.cell import Cell
from rtshpc.core.errors import STOPPED
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
    "model.backbone.embed_dim=8",
    "model.pyramid_channels=16",
    "model.roi.rois_per_image=8",
    "pretrain.epochs=4",
    "pretrain.validate_every=1",
    "pretrain.checkpoint_seconds=0.0",
    "pretrain.device=cpu",
)
PER_EPOCH = 4
PHASES = ("load", "steps", "last half written", "best half written", "best waits for last", "validation")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Cell]:
    """A run folder with shards, and its first pretrain cell."""
    paths = RunPaths(tmp_path_factory.mktemp("kill") / "run")
    paths.create()
    config = load_run("demo", SMALL)
    write_run_config(paths.config, config, {})
    found = cells(config, "f")
    for cell in found:
        paths.cell(cell.id).root.mkdir()
        write_cell(paths.cell(cell.id).config, cell)
        if cell.stage in ("preprocess", "gather"):
            assert runner.run(cell.stage, paths.root, cell.id) == 0
    return paths, next(cell for cell in found if cell.stage == "pretrain")


@pytest.fixture(scope="module")
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts trainings from a process that has imported everything, so that a kill costs no imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rtshpc.stages.runner", "rtshpc.stages.pretrain"])
    return context


def _train(root: Path, cell_id: str) -> None:
    torch.set_num_threads(1)
    sys.exit(runner.run("pretrain", root, cell_id))


def _copy_of(cell: Cell, paths: RunPaths, name: str) -> CellPaths:
    """The same training in a folder of its own: nothing in its result depends on the id but the id itself."""
    own = paths.cell(name)
    own.root.mkdir()
    write_cell(own.config, cell.model_copy(update={"id": name}))
    return own


def _files(own: CellPaths, pattern: str) -> list[Path]:
    return [path for path in own.checkpoints.glob(pattern) if path.exists()]


def _rows(own: CellPaths) -> int:
    return own.metrics.read_bytes().count(b"\n") if own.metrics.exists() else 0


def _phase(own: CellPaths) -> str:
    """Where a kill fell, from what it left behind."""
    if _files(own, ".last.pt.*.tmp"):
        return "last half written"
    if _files(own, ".best-*.tmp"):
        return "best half written"
    if _files(own, "best-*.pt"):
        return "best waits for last"
    rows = read_lines(own.metrics)
    if not rows:
        return "load"
    if rows[-1]["kind"] == "train" and rows[-1]["step"] % PER_EPOCH == 0:
        return "validation"
    return "steps"


def _reached(own: CellPaths, phase: str, before: int) -> bool:
    """Whether the training is where we want to kill it; `before` rows were there when it started."""
    if phase == "load":
        return True
    if phase == "last half written":
        return bool(_files(own, ".last.pt.*.tmp"))
    if phase == "best half written":
        return bool(_files(own, ".best-*.tmp"))
    if phase == "best waits for last":
        return bool(_files(own, "best-*.pt"))
    rows = read_lines(own.metrics) if _rows(own) > before else []
    if phase == "validation":
        return bool(rows) and rows[-1]["kind"] == "train" and rows[-1]["step"] % PER_EPOCH == 0
    return bool(rows)


def _kill_in(phase: str, start: Callable[[], multiprocessing.process.BaseProcess], own: CellPaths) -> str | None:
    """Start, wait for `phase` (or the end), kill; the phase that was hit, None where the training ended first."""
    before = _rows(own)
    process = start()
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and not _reached(own, phase, before):
        assert time.monotonic() < deadline, "the training hangs"
        time.sleep(0.0005)
    if phase in ("load", "steps"):
        time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.join()
    if own.record.exists():
        return None
    assert process.exitcode == -9, f"ended by itself with {process.exitcode}"
    return _phase(own)


def _storm(work: tuple[RunPaths, Cell], context: multiprocessing.context.ForkServerContext, kills: int) -> set[str]:
    """Kill trainings of the cell until `kills` have hit, in five phases; each ends with the bytes of an undisturbed one."""
    paths, cell = work
    hit: list[str] = []
    wanted: bytes | None = None
    calm = _copy_of(cell, paths, f"calm-{kills}")
    _finish(context, paths, calm)
    wanted = calm.metrics.read_bytes()
    for number in range(3 * kills):
        if len(hit) >= kills and len(set(hit)) >= 5:
            break
        own = _copy_of(cell, paths, f"killed-{kills}-{number}")

        def start(own: CellPaths = own) -> multiprocessing.process.BaseProcess:
            process = context.Process(target=_train, args=(paths.root, own.root.name))
            process.start()
            return process

        for turn in range(3):
            missing = [phase for phase in PHASES if phase not in hit] or PHASES
            phase = _kill_in(missing[(len(hit) + turn * number) % len(missing)], start, own)
            if phase is None:
                break
            hit.append(phase)
        _finish(context, paths, own)
        assert own.metrics.read_bytes() == wanted
        _same_model(calm, own)
        record = read_record(own.record)
        assert record is not None and record.results["steps"] == 4 * PER_EPOCH
        assert not _files(own, ".*.tmp") and not _files(own, "best-*.pt")
    print(f"{len(hit)} kills: " + ", ".join(f"{phase} {hit.count(phase)}" for phase in PHASES))
    assert len(hit) >= kills
    return set(hit)


def _finish(context: multiprocessing.context.ForkServerContext, paths: RunPaths, own: CellPaths) -> None:
    process = context.Process(target=_train, args=(paths.root, own.root.name))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, own.failure.read_text() if own.failure.exists() else process.exitcode


def _same_model(one: CellPaths, other: CellPaths) -> None:
    """best.pt of both, but for the cell's id, and all that last.pt holds for going on."""
    for file in ("best_checkpoint", "last_checkpoint"):
        first, second = (torch.load(getattr(own, file), weights_only=True) for own in (one, other))
        assert first["model"].keys() == second["model"].keys()
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
        if file == "best_checkpoint":
            assert (first["epoch"], first["ap50"]) == (second["epoch"], second["ap50"])
        else:
            moments = [list(content["optimizer"]["state"].values()) for content in (first, second)]
            assert all(torch.equal(a[key], b[key]) for a, b in zip(*moments, strict=True) for key in a)


@pytest.mark.slow
def test_killed_trainings_end_as_undisturbed_ones(
    work: tuple[RunPaths, Cell], forkserver: multiprocessing.context.ForkServerContext
) -> None:
    assert len(_storm(work, forkserver, 6)) >= 5


@pytest.mark.full
def test_many_kills_in_all_phases_end_as_undisturbed_ones(
    work: tuple[RunPaths, Cell], forkserver: multiprocessing.context.ForkServerContext
) -> None:
    assert len(_storm(work, forkserver, 40)) >= 5


@pytest.mark.slow
def test_a_preempted_task_saves_leaves_without_a_record_and_goes_on(work: tuple[RunPaths, Cell]) -> None:
    paths, cell = work
    own = _copy_of(cell, paths, "preempted")
    command = [sys.executable, "-m", "rtshpc.stages", "pretrain", "--run-dir", str(paths.root), "--task", "preempted"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        while process.poll() is None and _rows(own) < 3:
            time.sleep(0.005)
        process.terminate()
        assert process.wait(PATIENCE) == STOPPED
    assert own.last_checkpoint.exists() and not own.record.exists() and not own.failure.exists()
    kept = _rows(own)
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    record = finished(cell.model_copy(update={"id": "preempted"}), paths)
    assert record is not None and record.results["resumed"] == 1 and _rows(own) > kept
