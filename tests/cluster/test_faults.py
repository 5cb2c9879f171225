"""Faults over trainings on a real Slurm: every cell ends once, with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from rtshpc.core.cell import Cell
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_lines, read_record
from rtshpc.launch.plan import make_plan
from rtshpc.launch.submit import prepare
from rtshpc.stages import runner

from .conftest import Login
from .lab import NODES, Lab, wait_for

SETS = (
    "site=lab",
    "site.partition=low",
    "site.gpu_type=''",
    "site.gpus=2",
    "site.max_jobs=8",
    "finetune.backbones=full",
    "finetune.epochs=4",
    "pretrain.epochs=4",
    "grid.seed=[0, 1, 2, 3]",
)
"""Six trainings at once, all preemptible, two a node."""


class Training:
    """One training on the cluster."""

    def __init__(self, lab: Lab, paths: RunPaths, cell: Cell) -> None:
        self.lab, self.paths, self.cell = lab, paths, cell
        self.own = paths.cell(cell.id)
        self._held: int | None = None

    @property
    def job(self) -> str:
        """Its last submission."""
        return next(str(entry["job"]) for entry in read_lines(self.paths.ledger)[::-1] if entry["cell"] == self.cell.id)

    @property
    def node(self) -> str:
        return self.lab("squeue", "-h", "-j", self.job, "-o", "%N", check=False).strip()

    @property
    def process(self) -> int | None:
        """The task's process, as this machine numbers it; None where there is none."""
        wanted = {b"rtshpc.stages", self.cell.stage.encode(), self.cell.id.encode(), str(self.paths.root).encode()}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted <= set(words):
                return int(path.parent.name)
        return None

    @property
    def under_way(self) -> bool:
        """Whether it has a checkpoint, and steps left."""
        return self.own.last_checkpoint.exists() and not self.own.record.exists()

    def hold(self) -> bool:
        """Freeze it in mid-training; False where it is not so far."""
        if self._held is None and self.under_way and (process := self.process) is not None:
            os.kill(process, signal.SIGSTOP)
            self._held = process
        return self._held is not None

    def send(self, number: signal.Signals) -> None:
        if (process := self.process) is not None:
            os.kill(process, number)

    def warned(self) -> bool:
        """Whether Slurm's warning waits for the frozen task, or has woken and ended it."""
        try:
            lines = Path(f"/proc/{self._held}/status").read_text().splitlines()
        except OSError:
            return True
        pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
        return bool(pending & 1 << (signal.SIGUSR2 - 1))


def trainings_of(login: Login, sets: Sequence[str]) -> list[Training]:
    """The trainings of the sweep, and what is still to do of it."""
    plan = make_plan(load_run(login.sweep, sets), login.runs, "finetune")
    return [Training(login.lab, plan.paths, cell) for cell in plan.cells if cell.stage in ("pretrain", "finetune")]


def undisturbed(folder: Path, sweep: Path, sets: Sequence[str]) -> RunPaths:
    """The same sweep up to its trainings, here and in this process."""
    plan = make_plan(load_run(sweep, [*sets, "site=local"]), folder, "finetune")
    prepare(plan)
    for cell in plan.todo:
        assert runner.run(cell.stage, plan.paths.root, cell.id) == 0
    return plan.paths


def ended_once_and_as(one: Training, calm: RunPaths) -> None:
    """Its record is there, one task alone has written it, and its curve is that of the undisturbed training."""
    record = read_record(one.own.record)
    assert record is not None, f"{one.cell.label}: {one.own.failure.read_text() if one.own.failure.exists() else '?'}"
    logs = [path.read_text() for path in (one.paths.logs / one.cell.stage).glob("*_log.out")]
    assert sum(log.count(f"{one.cell.label} done in") for log in logs) == 1
    assert one.own.metrics.read_bytes() == calm.cell(one.cell.id).metrics.read_bytes(), one.cell.label


def preempt(one: Training) -> None:
    """A job of a better partition wants the whole node."""
    partition = "a5000" if one.node.startswith("a5") else "a100"
    one.lab("sbatch", "-p", partition, "-w", one.node, "--gpus-per-node=4", "-o", "/dev/null", "--wrap", "sleep 1")


def kill(one: Training) -> None:
    process = one.process
    assert process is not None, "there is nothing to kill"
    os.kill(process, signal.SIGKILL)


FAULTS: dict[str, Callable[[Training], object]] = {
    "crash": lambda one: one.lab.node_crash(one.node),
    "preempt": preempt,
    "time limit": lambda one: one.lab("scontrol", "update", f"JobId={one.job}", "TimeLimit=1"),
    "requeue": lambda one: one.lab("scontrol", "requeue", one.job),
    "scancel": lambda one: one.lab("scancel", one.job),
    "kill": kill,
}
"""The first two strike a node, so they are given to trainings that have one alone."""


def dealt(trainings: Sequence[Training]) -> dict[str, Training]:
    """A training for each fault."""
    nodes = Counter(one.node for one in trainings)
    alone_first = sorted(trainings, key=lambda one: nodes[one.node])
    return dict(zip(FAULTS, alone_first, strict=True))


@pytest.mark.slow
def test_a_sweep_through_six_kinds_of_faults_ends_with_its_report_every_cell_once_and_as_if_undisturbed(
    login: Login, tmp_path: Path
) -> None:
    lab, line = login.lab, ["sweep", *(word for one in SETS for word in ("--set", one))]
    assert (sweep := login(*line)).returncode == 0, sweep.stderr
    trainings = trainings_of(login, SETS)
    wait_for("all trainings are under way", lambda: sum(one.hold() for one in trainings) == 6, 240)
    victims = dealt(trainings)
    lost_node = victims["crash"].node
    for name, strike in FAULTS.items():
        strike(victims[name])
    for name in set(FAULTS) - {"crash", "time limit"}:
        victims[name].send(signal.SIGCONT)
    wait_for("the cancelled job is gone", lambda: victims["scancel"].job not in lab.queue(), 60)
    # The training, its evaluation (which Slurm has dropped), and a summary that waits for them.
    assert "3 cells submitted" in login(*line).stdout
    calm = undisturbed(tmp_path / "calm", login.sweep, SETS)
    wait_for("Slurm warns of the time limit", victims["time limit"].warned, 60)
    victims["time limit"].send(signal.SIGCONT)
    wait_for("the node is missed", lambda: lab.job(victims["crash"].job)["JobState"] != "RUNNING", 60)
    lab.node_up(lost_node)
    lab.wait_until_empty(300)
    for name, one in victims.items():
        ended_once_and_as(one, calm)
        record = read_record(one.own.record)
        assert record is not None and record.attempts >= 2 and record.results["resumed"] >= 1, name
    assert "nothing to do" in login(*line).stdout
    submitted = Counter(str(entry["label"]) for entry in read_lines(trainings[0].paths.ledger))
    again = victims["scancel"].cell.label
    assert {label for label, times in submitted.items() if times > 1} == {again, f"evaluate {again}", "summarise"}
    page = trainings[0].paths.report_page.read_text()
    assert all(one.cell.label.partition(" ")[2].partition(" seed")[0] in page for one in trainings)


STORM = (
    *(one for one in SETS if not one.startswith(("grid.seed", "finetune.epochs", "pretrain.epochs"))),
    "grid.seed=[0, 1, 2, 3]",
    "finetune.epochs=30",
    "pretrain.epochs=30",
    "site.max_attempts=100",
)


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_after_a_storm_of_thirty_faults_every_cell_is_done_once_and_with_the_bytes_of_an_undisturbed_run(
    login: Login, tmp_path: Path
) -> None:
    lab, line = login.lab, ["sweep", *(word for one in STORM for word in ("--set", one)), "--until", "finetune"]
    assert (sweep := login(*line)).returncode == 0, sweep.stderr
    trainings, draw, hit = trainings_of(login, STORM), random.Random(7), Counter[str]()
    deadline = time.monotonic() + 1200
    while any(not one.own.record.exists() for one in trainings):
        assert time.monotonic() < deadline, dict(hit)
        time.sleep(draw.uniform(0.2, 1.5))
        running = [one for one in trainings if one.under_way and one.process is not None and one.node]
        if running and hit.total() < 30:
            name = min(FAULTS, key=lambda name: hit[name])
            with suppress(AssertionError):  # it ended in that moment
                FAULTS[name](draw.choice(running))
                hit[name] += 1
        for node in set(NODES) - lab.up_nodes():
            lab.node_up(node)
        if not lab.queue():
            login(*line)
    lab.wait_until_empty(60)
    print(dict(hit))
    assert hit.total() >= 30
    calm = undisturbed(tmp_path / "calm", login.sweep, STORM)
    for one in trainings:
        ended_once_and_as(one, calm)
