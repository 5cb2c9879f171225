"""What to do about the cells that a status shows: read their logs, cancel their jobs, choose what runs again."""

from __future__ import annotations

import codecs
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.errors import RunError
from rtshpc.core.load import read_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import write_json
from rtshpc.hpc.accounting import ask_queue
from rtshpc.hpc.site import TRAININGS, request
from rtshpc.launch.status import CANCELLED, HELD_CELL, LOST_CELL, is_locked, read_plan, run_status
from rtshpc.launch.submit import launcher_lock, read_ledger

POLL_SECONDS = 0.5
"""How often a followed log is read."""

ASK_SECONDS = 10.0
"""How often a followed cell's state is asked for."""

AT_ONCE = 500
"""Jobs that one scancel is given."""


def log_of(paths: RunPaths, cell_id: str) -> str | None:
    """The log of a cell's last submission; None when there is none (yet)."""
    path = _log_path(paths, cell_id)
    return path.read_text(encoding="utf-8", errors="replace") if path is not None else None


def follow_log(paths: RunPaths, cell_id: str, say: Callable[..., None]) -> None:
    """Give a cell's log, and what is added to it, until the cell is over; Ctrl-C ends it too.

    A cell that has not begun is waited for, and a job that takes its place is followed on.
    """
    path, read, asked = None, 0, -ASK_SECONDS
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        over = False
        if time.monotonic() - asked >= ASK_SECONDS:
            row = next(row for row in run_status(paths)["cells"] if row["id"] == cell_id)
            over = row["state"] not in HELD_CELL
            if path is None and _log_path(paths, cell_id) is None:
                say(f"{row['label']}: {row['state']}{': ' + row['reason'] if row['reason'] else ''}", err=True)
            asked = time.monotonic()
        now = _log_path(paths, cell_id)
        if now != path:
            path, read = now, 0
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if path is not None:
            with path.open("rb") as file:
                file.seek(read)
                added = file.read()
            read += len(added)
            if added:
                say(decoder.decode(added), nl=False)  # a letter may be written in two parts
        if over:
            return
        time.sleep(POLL_SECONDS)


def cancel_jobs(paths: RunPaths, only: str | None = None) -> list[str]:
    """Cancel what Slurm still has of a run, or of one cell and all that builds on it, and tell it.

    The run's lock is held meanwhile, so that no launcher submits behind our back. Cells are noted as cancelled in
    their folder: Slurm forgets an element that it cancels before its array began, and lets go of what waits for it.

    Raises:
        RunError: a launcher works on the run, or Slurm cannot be asked or refuses.
    """
    if is_locked(paths.lock):
        raise RunError(f"{paths.root}: a launcher works on it here; end it with Ctrl-C where it runs")
    labels = {str(cell["id"]): str(cell["label"]) for cell in read_plan(paths)["cells"]}
    wanted = list(labels) if only is None else [only, *_dependents(paths, only)]
    with launcher_lock(paths):
        jobs: dict[str, list[str]] = {}
        for row in read_ledger(paths):  # the summary may have several
            if row.get("executor") == "slurm" and row["cell"] in wanted:
                jobs.setdefault(str(row["cell"]), []).append(str(row["job"]))
        queue = ask_queue(job for several in jobs.values() for job in several)
        if queue is None:
            raise RunError(f"{paths.root}: squeue cannot be asked which jobs are there; try again later")
        held = {name: [job for job in jobs.get(name, ()) if job in queue and queue[job].held] for name in wanted}
        # The last first: what builds on a cell must not start because that is gone.
        ending = [job for several in held.values() for job in several][::-1]
        for first in range(0, len(ending), AT_ONCE):
            _scancel(ending[first : first + AT_ONCE])
        for name in held if only is None else [only]:
            if held[name]:
                facts = {"error": f"cancelled {datetime.now(UTC).isoformat(timespec='seconds')}", "kind": CANCELLED}
                write_json(paths.cell(name).failure, {**facts, "traceback": ""})
    if only is None:
        return [f"{paths.root}: {len(ending)} jobs cancelled; `retry` goes on from what was saved"]
    if not held[only]:
        return [f"{labels[only]}: Slurm has no job of it"]
    told = [f"{labels[only]}: job {', '.join(held[only])} cancelled"]
    return told + [
        f"  with it goes {labels[name]} (job {', '.join(held[name])})" for name in held if held[name] and name != only
    ]


def choose(paths: RunPaths, wanted: Collection[str]) -> frozenset[str]:
    """Ids of the cells that a retry of some kinds of cells has to do with: those, what builds on them, what Slurm has.

    Args:
        paths: the run.
        wanted: failed (also cancelled), missing (nobody works on it, it never failed), oom (ran out of memory).

    Raises:
        RunError: no cell is of these kinds whose needs are there or are chosen too.
    """
    rows = {str(row["id"]): row for row in run_status(paths)["cells"]}
    asked = {name for name, row in rows.items() if not _kinds(row).isdisjoint(wanted)}
    chosen = set(asked)
    for cell in read_plan(paths)["cells"]:
        name, needs = str(cell["id"]), [str(need) for need in cell["needs"]]
        if rows[name]["state"] in ("blocked", "cancelled", "waiting") and chosen.intersection(needs):
            chosen.add(name)
        if any(need not in chosen and rows[need]["state"] in (*LOST_CELL, "waiting") for need in needs if need in rows):
            chosen.discard(name)
    if not asked.intersection(chosen):
        raise RunError(f"{paths.root}: no cell that could run again is {' or '.join(sorted(wanted))}; see `status`")
    # What Slurm has is left alone, and must be known to what is to wait for it.
    along = {name for name, row in rows.items() if row["stage"] == "summarise" or row["state"] in HELD_CELL}
    return frozenset(chosen | along)


def _kinds(row: Mapping[str, Any]) -> set[str]:
    """What a cell of the status may be called in a retry."""
    found = {"oom"} if row["oom"] else set[str]()
    if row["state"] in ("failed", "cancelled"):
        found.add("failed")
    return found | ({"missing"} if row["state"] == "waiting" else set())


def refuse_other_keys(sets: Iterable[str]) -> None:
    """Raise RunError where a `--set` of a retry is not of the site: other keys make other cells."""
    for text in sets:
        if not text.startswith("site."):
            raise RunError(f"--set {text}: retry takes keys of the site alone; other keys are for `sweep`")


def with_more_memory(config: RunConfig, rows: Iterable[Mapping[str, Any]], paths: RunPaths) -> RunConfig:
    """A run's config for cells that ran out of memory: twice their node's, or half the chips on a GPU at once.

    Raises:
        RunError: some ran out of a GPU's memory, and it is no training or takes one chip at once already.
    """
    short = [row for row in rows if row["oom"]]
    changed: dict[str, int] = {}
    if any(row["oom"] == "node" for row in short):
        changed["memory_gb"] = _more_memory(config.site)
    if on_gpu := [row for row in short if row["oom"] == "gpu"]:
        if any(row["stage"] == "scale" for row in on_gpu):
            way_out = (
                "run `scale` again with --set site.micro_batch=N: those that had more chips at once are made again"
            )
            raise RunError(f"{paths.root}: measurements ran out of a GPU's memory; {way_out}")
        at_once = [_chips_at_once(read_cell(paths.cell(str(row["id"])).config), config.site) for row in on_gpu]
        if min(at_once) < 2:
            label = str(on_gpu[at_once.index(min(at_once))]["label"])
            way_out = (
                "give a site or partition with larger ones (--site NAME, --set site.partition=NAME), see docs/memory.md"
            )
            raise RunError(
                f"{len(on_gpu)} cells ran out of a GPU's memory, {label} with one chip on it at once: {way_out}"
            )
        changed["micro_batch"] = min(at_once) // 2
    return config.model_copy(update={"site": config.site.model_copy(update=changed)})


def _more_memory(site: SiteConfig) -> int:
    """Twice a task's memory, or all that a node has."""
    most = site.node_memory_gb // site.tasks or 2 * site.memory_gb
    if most <= site.memory_gb:
        raise RunError(
            f"site.memory_gb = {site.memory_gb} is all that a node has (node_memory_gb = {site.node_memory_gb}); give a"
            " site or partition with larger ones (--site NAME, --set site.partition=NAME)"
        )
    return min(most, 2 * site.memory_gb)


def _chips_at_once(cell: Cell, site: SiteConfig) -> int:
    """Chips that a process has on its GPU in a step; what is no training cannot take fewer than it does."""
    if cell.stage not in TRAININGS:
        return 1
    training = cell.config.pretrain if cell.stage == "pretrain" else cell.config.finetune
    asked = request(site, cell.stage)
    together = asked.nodes * asked.tasks
    processes = together if together > 1 else training.processes
    share = -(-training.batch_size // processes)
    return min(share, site.micro_batch or share)


def _dependents(paths: RunPaths, cell_id: str) -> list[str]:
    """Cells that build on one, over any number of steps, in stage order; the summary runs in any case."""
    gone: dict[str, None] = {cell_id: None}
    for cell in read_plan(paths)["cells"]:
        if not gone.keys().isdisjoint(cell["needs"]) and cell["stage"] != "summarise":
            gone[str(cell["id"])] = None
    return list(gone)[1:]


def _scancel(jobs: list[str]) -> None:
    try:
        answer = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"scancel cannot be run: {error}") from None
    if answer.returncode:
        raise RunError(f"scancel: {' '.join(answer.stderr.split())}")


def _log_path(paths: RunPaths, cell_id: str) -> Path | None:
    """The log of the cell's last submission, where it exists; a run folder may have been moved since."""
    entry = next((entry for entry in reversed(read_ledger(paths)) if str(entry["cell"]) == cell_id), None)
    if entry is None or not entry.get("log"):
        return None
    told = Path(str(entry["log"]))
    moved = paths.logs / told.parent.name / told.name
    return next((path for path in (moved, told) if path.is_file()), None)
