"""Trainings over several nodes, as a sweep submits them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtshpc.core.cell import Cell
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_lines, read_record
from rtshpc.engine import checkpoint
from rtshpc.engine.detectors import fresh
from rtshpc.hpc.books import attempts
from rtshpc.launch.plan import Plan, make_plan
from rtshpc.launch.submit import prepare
from rtshpc.stages import runner

from .conftest import Login
from .lab import wait_for

SETS = (
    "data.modalities={rgb: {bands: [red, green, blue]}}",
    "data.scenes.generated.scenes_per_site=10",
    "finetune.modalities=[rgb]",
    "pretrain.batch_size=4",
    "pretrain.reference_batch=4",
    "pretrain.learning_rate=1e-3",
    "pretrain.warmup_steps=2",
    "pretrain.clip_norm=0",
)
WIDE = ("site.nodes=2", "site.gpus=2", "site.scratch=LAB_SCRATCH", "site.stage_shards=true")


def work(runs: Path, login: Login, until: str, *sets: str) -> Plan:
    """What is missing of the sweep, here and in this process; gives the plan of what was done."""
    plan = make_plan(load_run(login.sweep, [*sets, "site=local"]), runs, until)
    prepare(plan)
    for cell in plan.todo:
        assert runner.run(cell.stage, plan.paths.root, cell.id) == 0
    return plan


def trained(paths: RunPaths, cell: Cell) -> dict[str, Tensor]:
    return checkpoint.load(paths.cell(cell.id).last_checkpoint)["model"]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([(one[name].float() - other[name].float()).norm() for name in one]).norm())


def close(alone: Plan, together: RunPaths, cell: Cell) -> None:
    """Both trainings moved far, and to the same place."""
    torch.set_num_threads(1)
    start, one, four = fresh(cell).state_dict(), trained(alone.paths, cell), trained(together, cell)
    assert distance(one, four) < 0.01 * distance(one, start)


@pytest.fixture
def shards(login: Login) -> Login:
    """A run on the cluster whose shards are made, and its copy for one process here."""
    work(login.runs, login, "gather", *SETS)
    shutil.copytree(login.runs, login.runs.parent / "alone")
    scratch = login.runs.parent / "scratch"
    scratch.mkdir()
    login.environment |= {"LAB_SCRATCH": str(scratch)}
    return login


def sweep(login: Login, *sets: str) -> None:
    line = [word for one in sets for word in ("--set", one)]
    answer = login("sweep", "--site", "lab", "--until", "pretrain", *line)
    assert answer.returncode == 0, answer.stderr
    assert "1 cells submitted" in answer.stdout


@pytest.mark.full
def test_a_sweep_trains_over_two_nodes_with_two_tasks_each_to_the_weights_of_one_process(shards: Login) -> None:
    sweep(shards, *SETS, *WIDE)
    job = next(iter(shards.lab.queue()))
    alone = work(shards.runs.parent / "alone", shards, "pretrain", *SETS)
    cell = next(cell for cell in alone.cells if cell.stage == "pretrain")
    shards.lab.wait_until_empty(120)
    assert shards.lab.job(job)["NumNodes"] == "2" and shards.lab.job(job)["NumTasks"] == "4"
    together = RunPaths(shards.runs / "tiny")
    record = read_record(together.cell(cell.id).record)
    assert record is not None, (together.cell(cell.id).failure).read_text()
    assert record.attempts == 1
    (staged,) = Path(shards.environment["LAB_SCRATCH"]).glob("rtshpc-*/*/*.h5")
    assert staged.read_bytes() == (together.shards / staged.name).read_bytes()
    close(alone, together, cell)


@pytest.mark.full
def test_four_tasks_that_are_told_to_stop_or_lose_one_go_on_together_and_no_step_is_lost_or_done_twice(
    shards: Login,
) -> None:
    longer = [*SETS, "pretrain.epochs=30"]
    sweep(shards, *longer, *WIDE)
    plan = make_plan(load_run(shards.sweep, [*longer, *WIDE, "site=lab"]), shards.runs, "pretrain")
    cell = next(cell for cell in plan.todo if cell.stage == "pretrain")
    own = plan.paths.cell(cell.id)
    wait_for("it trains", own.last_checkpoint.exists, 90)
    shards.lab("scancel", "--signal=USR2", next(iter(shards.lab.queue())))
    wait_for("all are at work again", lambda: len(read_lines(own.attempts)) == 2 and follower(plan.paths, cell) > 0, 90)
    os.kill(follower(plan.paths, cell), signal.SIGKILL)
    shards.lab.wait_until_empty(240)
    record = read_record(own.record)
    assert record is not None, own.failure.read_text()
    assert [one.how for one in attempts(own)] == ["stopped", "lost", "done"]
    rows = [row for row in read_lines(own.metrics) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, record.results["steps"] + 1))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def follower(paths: RunPaths, cell: Cell) -> int:
    """A task of the training that is not the first; 0 where there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = set((folder / "cmdline").read_bytes().split(b"\0"))
            known = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {cell.id.encode(), str(paths.root).encode()} <= words and b"SLURM_PROCID=2" in known:
            return int(folder.name)
    return 0
