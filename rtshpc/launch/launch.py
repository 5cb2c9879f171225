"""One launch of a plan: lock, prepare, work or submit, and tell how it went."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from rtshpc.core.cell import MAP_STAGES
from rtshpc.core.errors import RunError
from rtshpc.core.load import shipped_folder
from rtshpc.core.paths import CellPaths
from rtshpc.core.records import read_json
from rtshpc.core.sizing.predict import STAGE as PREDICT
from rtshpc.hpc.books import bad_nodes
from rtshpc.hpc.container import command
from rtshpc.hpc.executor import refuse_unusable
from rtshpc.launch.display import Display, make_console, scaling_table, tables
from rtshpc.launch.plan import MapPlan, Plan, ScalePlan
from rtshpc.launch.plan.forecast import can_trace
from rtshpc.launch.schedule import Outcome, Scheduler
from rtshpc.launch.submit import Ledger, launcher_lock, mend_cells, prepare, refuse_other_data, submit_arrays
from rtshpc.launch.usage import keep_usage

POLL_SECONDS = 0.5
"""How often a trace is asked how far it is."""

FEW = 20
"""So many scenes that are not in the layers are named."""


def launch(make: Callable[[], Plan], only_prepare: bool = False) -> int:
    """Do what a plan lacks.

    Args:
        make: makes the plan; called when the run's lock is held, so that it sees what others left.
        only_prepare: write the run folder, and tell how its tasks are run by hand.

    Returns:
        Exit code: 0 all done (or handed to Slurm), 1 some cells failed, 130 stopped by Ctrl-C or SIGTERM.

    Raises:
        RtshpcError: the run cannot be worked on.
    """
    console = make_console()
    first = make()
    refuse_other_data(first)
    if first.todo and not only_prepare:
        refuse_unusable(first.config.site, first.paths)
    with launcher_lock(first.paths):
        plan = make()
        if not plan.todo:
            if plan.changed:
                prepare(plan)
            elif mended := mend_cells(plan):
                text = f"{plan.paths.root}: wrote {mended} damaged config.yaml of done cells again"
                console.print(text, markup=False, soft_wrap=True)
            console.print(_nothing_to_do(plan), markup=False, soft_wrap=True)
            _results(console, plan)
            return 0
        prepare(plan)
        if only_prepare:
            for line in by_hand(plan):
                console.print(line, markup=False, soft_wrap=True)
            return 0
        if predict_first(console, plan):
            plan = make()
        ledger = Ledger(plan.paths)
        if plan.config.site.executor == "slurm":
            return _to_slurm(console, plan, ledger)
        return _here(console, plan, ledger)


def predict_first(console: Console, plan: Plan) -> bool:
    """Say whether the trainings fit the site's GPUs, where that can be told on this machine; a job does it elsewhere.

    Raises:
        RunError: some do not; nothing is submitted.
    """
    cell = next((cell for cell in plan.todo if cell.stage == PREDICT), None)
    # The trace needs no GPU, and a login node has none to give to an image.
    site = plan.config.site.model_copy(update={"gpus": 0})
    if cell is None or not can_trace(site):
        return False
    console.print(f"{plan.paths.root}: predicting memory, once", markup=False, soft_wrap=True)
    arguments = ["-m", "rtshpc.stages", PREDICT, "--run-dir", str(plan.paths.root), "--task", cell.id]
    line = command(site, arguments, [Path.cwd(), plan.paths.root], sys.executable)
    with (
        console.status("tracing") as shown,
        subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process,
    ):
        while True:
            try:
                said = process.communicate(timeout=POLL_SECONDS)[1].strip().splitlines()
                break
            except subprocess.TimeoutExpired:
                shown.update(_traced(plan.paths.cell(cell.id)))
    if process.returncode:
        raise RunError((said or [f"exit code {process.returncode}"])[-1].removeprefix("error: "))
    return True


def _traced(folder: CellPaths) -> str:
    """How far the trace is, as its task tells."""
    told = read_json(folder.progress)
    return f"tracing {told['done'] + 1} of {told['total']}: {escape(told['text'])}" if told else "tracing"


def by_hand(plan: Plan) -> list[str]:
    """The lines that submit a prepared run's stages with the templates of slurm/, in order; each when the one before is over."""
    lines: list[str] = []
    run, site, folder = shlex.quote(str(plan.paths.root)), plan.config.site, shipped_folder("slurm")
    for stage in dict.fromkeys(cell.stage for cell in plan.todo):
        count = sum(cell.stage == stage for cell in plan.cells)
        if stage == "summarise":
            lines.append(f"python -m rtshpc.launch report {run}")
            continue
        template = (
            "preprocess" if stage in (PREDICT, "preprocess", "gather") else "map" if stage in MAP_STAGES else "pretrain"
        )
        most = site.max_array if template == "map" else count  # a sweep has fewer cells than any array may have
        for first in range(0, count, most):
            given = f"RTSHPC_RUN={run} RTSHPC_STAGE={stage}" + (f" RTSHPC_FIRST={first}" if first else "")
            last = min(most, count - first) - 1
            lines.append(f"{given} sbatch --array=0-{last}%{site.max_jobs} {_as_typed(folder / f'{template}.sbatch')}")
    return lines


def _as_typed(file: Path) -> str:
    """A file as a word of a command line that is typed in this folder."""
    here = Path.cwd()
    return shlex.quote(str(file.relative_to(here) if file.is_relative_to(here) else file))


def _here(console: Console, plan: Plan, ledger: Ledger) -> int:
    total, done = len(plan.todo), len(plan.done)
    at_once = plan.config.site.max_jobs
    console.print(
        f"{plan.paths.root}: {total} cells to do, {done} done before, {at_once} at once", markup=False, soft_wrap=True
    )
    try:
        with _stoppable(), Display(console, plan.paths) as display:
            outcome = Scheduler(plan, ledger, display).run()
    except KeyboardInterrupt:
        text = f"stopped; run the same line again, or `retry {plan.paths.root}`, to go on"
        console.print(text, markup=False, soft_wrap=True)
        return 130
    keep_usage(plan.paths, launching=True)
    _results(console, plan)
    return _failures(console, outcome)


def _to_slurm(console: Console, plan: Plan, ledger: Ledger) -> int:
    made = submit_arrays(plan, ledger)
    text = f"{plan.paths.root}: {len(made.sent)} cells submitted, {len(made.left_alone)} are with Slurm already"
    console.print(f"{text}; see `status {plan.paths.root}`", markup=False, soft_wrap=True)
    for node, why in bad_nodes(plan.paths).items() if made.sent else ():
        console.print(f"without {node}: {why} ({plan.paths.bad_nodes})", markup=False, soft_wrap=True)
    if made.held_back:
        limit = f"site.submit_limit = {plan.config.site.submit_limit} leaves no room for {len(made.held_back)} cells"
        console.print(f"{limit}; run the same line again when jobs have ended", markup=False, soft_wrap=True)
    return 0


def _nothing_to_do(plan: Plan) -> str:
    count = sum(cell.stage in plan.stages and cell.id in plan.done for cell in plan.cells)
    return f"{plan.paths.root}: nothing to do, all {count} cells are done"


def _results(console: Console, plan: Plan) -> None:
    """Tables of what is done, and where the report lies."""
    for table in tables(plan.cells, plan.paths):
        console.print(table)
    if plan.paths.report_page.is_file():
        console.print(f"report: {plan.paths.report_page}", markup=False, soft_wrap=True)
    if isinstance(plan, MapPlan):
        _map_results(console, plan)
    if isinstance(plan, ScalePlan):
        console.print(scaling_table(plan.paths))


def _map_results(console: Console, plan: MapPlan) -> None:
    """Scenes that are not in the layers, and where the layers are."""
    lost = plan.not_mapped()
    for text in lost[:FEW]:
        console.print(text, markup=False, soft_wrap=True)
    if len(lost) > FEW:
        console.print(f"... and {len(lost) - FEW} more scenes; see the footprints", markup=False, soft_wrap=True)
    if plan.paths.layers.is_dir():
        console.print(f"layers: {plan.paths.layers}", markup=False, soft_wrap=True)


def _failures(console: Console, outcome: Outcome) -> int:
    for cell, why, log in outcome.failed:
        console.print(f"FAILED {cell.label}: {why}; log: {log}", markup=False, soft_wrap=True)
    if outcome.blocked:
        names = ", ".join(cell.label for cell in outcome.blocked)
        console.print(f"not run, they build on failed cells: {names}", markup=False, soft_wrap=True)
    return 1 if outcome.failed else 0


@contextmanager
def _stoppable() -> Generator[None]:
    """SIGTERM and a closed terminal end a launch as Ctrl-C does: in order."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
