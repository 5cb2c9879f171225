"""Work through a plan on this machine: a cell starts as soon as what it builds on is done."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtshpc.core.cell import LENIENT, Cell
from rtshpc.core.grid import finished
from rtshpc.core.paths import CellPaths
from rtshpc.core.records import Record, read_json, read_record, write_json
from rtshpc.core.sizing.studies import batch_of
from rtshpc.hpc.executor import Job, stop, submit
from rtshpc.launch.display import Display
from rtshpc.launch.plan import Plan
from rtshpc.launch.submit import Ledger, undo

POLL_SECONDS = 0.1


@dataclass
class Running:
    """One cell at work."""

    cell: Cell
    job: Job
    since: float


@dataclass
class Outcome:
    """How a launch ended.

    Attributes:
        done: cells that were done in this launch.
        failed: cell, why, and the log that says more.
        blocked: cells that build on a failed one.
    """

    done: list[Cell] = field(default_factory=list[Cell])
    failed: list[tuple[Cell, str, Path]] = field(default_factory=list[tuple[Cell, str, Path]])
    blocked: list[Cell] = field(default_factory=list[Cell])


class Scheduler:
    """At most `site.max_jobs` cells at once; a failed cell stops only what builds on it."""

    def __init__(self, plan: Plan, ledger: Ledger, display: Display) -> None:
        self._plan = plan
        self._ledger = ledger
        self._display = display
        self._waiting = list(plan.todo)
        self._running: list[Running] = []
        self._done = set(plan.done)
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Work until every cell is done, failed or blocked.

        Raises:
            KeyboardInterrupt: after all processes were ended; what they saved is resumed next time.
        """
        try:
            while self._waiting or self._running:
                self._collect()
                self._block()
                for cell in self._ready()[: max(0, self._most() - len(self._running))]:
                    self._start(cell)
                self._display.show(self._running, len(self._waiting), len(self._plan.todo))
                time.sleep(POLL_SECONDS if self._running else 0)
        except BaseException:
            stop([running.job for running in self._running])
            raise
        return self.outcome

    def _most(self) -> int:
        """Cells at once; a scaling study says it of each of its measurements."""
        site = next((one.cell for one in self._running), next(iter(self._ready()), self._plan.cells[0])).config.site
        return 1 if site.executor == "debug" else site.max_jobs

    def _ready(self) -> list[Cell]:
        """Waiting cells whose needs are met; a need that is no cell of this plan was met before it."""
        open_ids = {cell.id for cell in self._waiting} | {running.cell.id for running in self._running}
        lost = {cell.id for cell in self.outcome.blocked} | {cell.id for cell, _, _ in self.outcome.failed}
        missing = (open_ids | lost) - self._done
        rest = [cell for cell in self._waiting if cell.stage != "summarise"]
        ready = [cell for cell in rest if not (open_ids if cell.stage in LENIENT else missing).intersection(cell.needs)]
        if not rest and not self._running:
            return self._waiting
        if ready and ready[0].stage == "scale":
            batch = batch_of(self._running[0].cell if self._running else ready[0])
            return [cell for cell in ready if batch_of(cell) == batch]
        return ready

    def _block(self) -> None:
        """Give up what builds, over any number of steps, on a failed cell."""
        lost = {cell.id for cell, _, _ in self.outcome.failed} | {cell.id for cell in self.outcome.blocked}
        for cell in list(self._waiting):
            if lost.intersection(cell.needs) and cell.stage not in LENIENT:
                lost.add(cell.id)
                self._waiting.remove(cell)
                self.outcome.blocked.append(cell)
                self._display.say(f"blocked  {cell.label}: builds on a failed cell")

    def _start(self, cell: Cell) -> None:
        self._waiting.remove(cell)
        undo(self._plan.paths, [cell])
        site = cell.config.site
        job = submit(site, self._plan.paths, cell.stage, [cell.id])[0]
        self._ledger.add(cell, job, site.executor)
        self._running.append(Running(cell, job, time.monotonic()))
        self._display.say(f"started  {cell.label}")

    def _collect(self) -> None:
        """Take the cells whose process is over out of the running ones."""
        for running in [one for one in self._running if one.job.ended()]:
            self._running.remove(running)
            cell, seconds = running.cell, time.monotonic() - running.since
            record = self._record(cell)
            if record is not None:
                self._done.add(cell.id)
                self.outcome.done.append(cell)
                self._display.done(cell, record, seconds)
                continue
            why = failure(self._plan.paths.cell(cell.id), running.job.log)
            self.outcome.failed.append((cell, why, running.job.log))
            self._display.say(f"FAILED   {cell.label}: {why}; log: {running.job.log}")

    def _record(self, cell: Cell) -> Record | None:
        if cell.stage != "summarise":
            return finished(cell, self._plan.paths)
        return read_record(self._plan.paths.cell(cell.id).record)


def failure(folder: CellPaths, log: Path) -> str:
    """Why a cell has no record: what its failure.json says, else that it was killed, which is noted there."""
    facts: Any = read_json(folder.failure)
    if isinstance(facts, dict) and "error" in facts:
        return str(facts["error"])  # pyright: ignore[reportUnknownArgumentType]
    why = "ended without a record: killed, or out of memory or time"
    with suppress(OSError):  # a full disk, which may be why
        write_json(folder.failure, {"error": why, "kind": "Killed", "traceback": f"see {log}"})
    return why
