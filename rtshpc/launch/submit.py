"""A plan -> a run folder that can be worked on, and its jobs; every submission goes into the ledger."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, cast

from rtshpc.core.cell import Cell
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.load import read_cell, read_run_config, write_cell, write_run_config
from rtshpc.core.paths import RunPaths, make_private
from rtshpc.core.records import append_line, read_plan, write_json
from rtshpc.hpc.container import image_facts
from rtshpc.hpc.executor import Job, slurm_states, submit
from rtshpc.hpc.site import code_version
from rtshpc.launch.plan import Plan, fingerprint_of, with_known_start
from rtshpc.launch.status import read_ledger

LOCK_SECONDS = 2.0
"""How long a launcher tries for its run: `status` holds the lock for an instant to see whether it is held."""


class Ledger:
    """`ledger.jsonl` of a run: who ran what, where and how often."""

    def __init__(self, paths: RunPaths) -> None:
        self._path = paths.ledger
        self.entries = read_ledger(paths)

    def add(self, cell: Cell, job: Job, executor: str) -> None:
        """Note one submission."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "stage": cell.stage,
            "cell": cell.id,
            "label": cell.label,
            "job": job.id,
            "log": str(job.log),
            "executor": executor,
            "attempt": 1 + sum(entry["cell"] == cell.id for entry in self.entries),
        }
        append_line(self._path, entry)
        self.entries.append(entry)

    def last(self, cell_id: str) -> dict[str, Any] | None:
        """The cell's last submission."""
        return next((entry for entry in reversed(self.entries) if entry["cell"] == cell_id), None)


@contextmanager
def launcher_lock(paths: RunPaths) -> Generator[None]:
    """Be the run's only launcher. Raises RunError when another one is at work."""
    make_private(paths.root)
    with paths.lock.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    text = "another launcher works on this run; wait for it, or see `status`"
                    raise RunError(f"{paths.root}: {text}") from None
                time.sleep(0.05)
        yield


def prepare(plan: Plan) -> None:
    """Write config.yaml, plan.json and the configs of the cells to do or damaged; the run's lock is held.

    Raises:
        RunError: the folder's shards hold other data, or the image is missing or not the pinned one.
    """
    paths = plan.paths
    refuse_other_data(plan)
    image = image_facts(plan.config.site, _old_provenance(paths).get("image"))
    paths.create()
    fingerprint_of(plan.config, paths, remember=True)
    with_known_start(plan.config, paths, remember=True)
    provenance = {
        "commit": code_version(),
        "data_fingerprint": plan.fingerprint,
        "image": image,
    }
    write_run_config(paths.config, plan.config, provenance)
    for cell in plan.todo:
        _write_cell(paths, cell)
    mend_cells(plan)
    write_json(paths.plan, plan.describe())


def mend_cells(plan: Plan) -> int:
    """Write the configs of done cells that do not read back as theirs; gives how many."""
    mended = 0
    for cell in plan.cells:
        if cell.id not in plan.done:
            continue
        try:
            whole = read_cell(plan.paths.cell(cell.id).config).id == cell.id
        except ConfigError:
            whole = False
        if not whole:
            _write_cell(plan.paths, cell)
            mended += 1
    return mended


def _write_cell(paths: RunPaths, cell: Cell) -> None:
    make_private(paths.cell(cell.id).root)
    write_cell(paths.cell(cell.id).config, cell)


def refuse_other_data(plan: Plan) -> None:
    """Raise RunError when shards were made here from other data: one run folder holds one data set."""
    facts = read_plan(plan.paths.plan)
    if facts is None:
        return
    made = [cell for cell in facts["cells"] if cell["stage"] == "preprocess"]
    kept = any(plan.paths.cell(str(cell["id"])).record.is_file() for cell in made)
    if not kept or facts.get("gather") in (None, plan.gather.id):
        return
    way_out = "give another name (--set name=NAME) or folder (--runs DIR)"
    raise RunError(f"{plan.paths.root}: its shards hold other data: {_difference(plan, facts)}; {way_out}")


def _difference(plan: Plan, old: dict[str, Any]) -> str:
    """The first thing in which the data of the run folder and of the plan differ."""
    if old.get("data_fingerprint") != plan.fingerprint and plan.config.data.scenes.generated is None:
        return "the input files have changed"
    try:
        config, _ = read_run_config(plan.paths.config)
    except ConfigError:
        return "they were made by another version of the code"
    ignored = {"shard", "root", "name"}
    before = _leaves(config.data.model_dump(mode="json", exclude=ignored))
    now = _leaves(plan.config.data.model_dump(mode="json", exclude=ignored))
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            return f"data.{key} was {before.get(key)}, is {now.get(key)}"
    return "they were made by another version of the code"


def _leaves(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found.update(_leaves(cast(dict[str, Any], value), f"{above}{name}."))
        else:
            found[f"{above}{name}"] = value
    return found


def _old_provenance(paths: RunPaths) -> dict[str, Any]:
    try:
        return read_run_config(paths.config)[1]
    except ConfigError:
        return {}


def submit_arrays(plan: Plan, ledger: Ledger) -> tuple[list[Cell], list[Cell]]:
    """Submit everything to Slurm at once: an array per stage and set of needs, chained by `afterok`.

    A failed cell keeps back only what builds on it (Slurm removes those jobs); the summary waits for the
    end of all others. Cells whose job is still queued or running are left alone.

    Returns:
        The cells submitted, and those left alone.

    Raises:
        RunError: Slurm cannot be used from here.
    """
    known = {entry["cell"]: str(entry["job"]) for entry in ledger.entries if entry.get("executor") == "slurm"}
    todo = {cell.id: cell for cell in plan.todo}
    states = slurm_states([known[name] for name in todo if name in known])
    if states is None:
        raise RunError("squeue cannot be asked which jobs of this run are still there; try again later")
    jobs = {name: known[name] for name in todo if known.get(name) in states}
    left_alone = [todo[name] for name in jobs]
    for group in _arrays([cell for cell in todo.values() if cell.id not in jobs]):
        any_end = group[0].stage == "summarise"
        needs = list(jobs) if any_end else group[0].needs
        after = list(dict.fromkeys(jobs[need] for need in needs if need in jobs))
        names = [cell.id for cell in group]
        sent = submit(plan.config.site, plan.paths, group[0].stage, names, after, any_end)
        for cell, job in zip(group, sent, strict=True):
            ledger.add(cell, job, "slurm")
            jobs[cell.id] = job.id
    return [cell for cell in todo.values() if cell not in left_alone], left_alone


def _arrays(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that wait for the same cells, in stage order: each group is one array."""
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.stage, cell.needs), []).append(cell)
    return list(groups.values())
