"""A plan -> a run folder that can be worked on, and its jobs; every submission goes into the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rtshpc.core.cell import MAP_STAGES, Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.load import read_cell, read_run_config, write_cell, write_run_config
from rtshpc.core.paths import RunPaths, make_private
from rtshpc.core.records import append_lines, locked, read_lines, read_plan, write_json
from rtshpc.hpc.accounting import queue_length
from rtshpc.hpc.container import image_facts
from rtshpc.hpc.executor import Job, script, slurm_states, submit
from rtshpc.hpc.site import code_version
from rtshpc.launch.plan import Array, MapPlan, Plan, ScalePlan, arrays, guards, waits_for

LOCK_SECONDS = 2.0
"""How long a launcher tries for its run: `status` holds the lock for an instant to see whether it is held."""

ELSEWHERE = "elsewhere"
"""Executor of submissions that another folder made, of which this one is a copy."""

LOG_DEPTH = 2
"""A log lies so many folders below its run's."""

WRITERS = 16
"""Threads that write the configs of cells."""


class Ledger:
    """`ledger.jsonl` of a run: who ran what, where and how often."""

    def __init__(self, paths: RunPaths) -> None:
        self._path = paths.ledger
        self.entries = read_ledger(paths)

    def add(self, cell: Cell, job: Job, executor: str) -> None:
        """Note one submission."""
        self.add_all([cell], [job], executor)

    def add_all(self, cells: Sequence[Cell], jobs: Sequence[Job], executor: str) -> None:
        """Note the submissions of one array."""
        attempts = Counter(str(entry["cell"]) for entry in self.entries)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries: list[dict[str, Any]] = [
            {
                "time": now,
                "stage": cell.stage,
                "cell": cell.id,
                "label": cell.label,
                "job": job.id,
                "log": str(job.log),
                "executor": executor,
                "attempt": 1 + attempts[cell.id],
            }
            for cell, job in zip(cells, jobs, strict=True)
        ]
        append_lines(self._path, entries)
        self.entries += entries

    def last(self, cell_id: str) -> dict[str, Any] | None:
        """The cell's last submission."""
        return next((entry for entry in reversed(self.entries) if entry["cell"] == cell_id), None)


def read_ledger(paths: RunPaths) -> list[dict[str, Any]]:
    """The submissions of a run, oldest first; lines that name no cell and job are left out.

    Jobs of the run that this folder is a copy of work there, and are not ours to wait for or to cancel: their
    `executor` is ELSEWHERE.
    """
    rows = [row for row in read_lines(paths.ledger) if "cell" in row and "job" in row]
    noted = {folders[LOG_DEPTH] for row in rows if len(folders := Path(str(row.get("log", ""))).parents) > LOG_DEPTH}
    others = {folder for folder in noted if not _same_folder(folder, paths.root)}
    return [
        row | {"executor": ELSEWHERE} if others.intersection(Path(str(row.get("log", ""))).parents) else row
        for row in rows
    ]


def _same_folder(noted: Path, root: Path) -> bool:
    """Whether a run that noted this as its folder is the one in `root`; one that is no longer there was moved."""
    try:
        return not RunPaths(noted).ledger.exists() or noted.samefile(root)
    except OSError:
        return True


@contextmanager
def launcher_lock(paths: RunPaths) -> Generator[None]:
    """Be the run's only launcher. Raises RunError when another one is at work."""
    make_private(paths.root)
    busy = f"{paths.root}: another launcher works on this run; wait for it, or see `status`"
    with locked(paths.lock, LOCK_SECONDS, busy):
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
    plan.remember()
    provenance = {
        "commit": code_version(),
        "data_fingerprint": plan.fingerprint,
        "image": image,
    }
    write_run_config(paths.config, plan.config, provenance)
    _write_cells(paths, plan.todo)
    mend_cells(plan)
    write_json(paths.plan, plan.describe())


def mend_cells(plan: Plan) -> int:
    """Write the configs of done cells that do not read back as theirs; gives how many."""
    damaged: list[Cell] = []
    for cell in plan.cells:
        if cell.id not in plan.done:
            continue
        try:
            whole = read_cell(plan.paths.cell(cell.id).config).id == cell.id
        except ConfigError:
            whole = False
        if not whole:
            damaged.append(cell)
    _write_cells(plan.paths, damaged)
    return len(damaged)


def _write_cells(paths: RunPaths, cells: Sequence[Cell]) -> None:
    """Several at a time: each waits for the disk to say that it has the file."""

    def write(cell: Cell) -> None:
        make_private(paths.cell(cell.id).root)
        write_cell(paths.cell(cell.id).config, cell)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, cells))


def refuse_other_data(plan: Plan) -> None:
    """Raise RunError when shards were made here from other data, or a map with other weights: one folder holds one run."""
    if isinstance(plan, MapPlan):
        return plan.refuse_other_data()
    facts = read_plan(plan.paths.plan)
    if facts is None:
        return
    stages = {str(cell["stage"]) for cell in facts["cells"]}
    if not stages.isdisjoint(MAP_STAGES) or ("scale" in stages) != isinstance(plan, ScalePlan):
        kind = "scaling study" if "scale" in stages else "sweep" if stages.isdisjoint(MAP_STAGES) else "map run"
        raise RunError(f"{plan.paths.root}: is the folder of a {kind}; give another name (--set name=NAME)")
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


@dataclass(frozen=True)
class Submission:
    """What a launch handed to Slurm.

    Attributes:
        sent: cells submitted.
        left_alone: cells whose job is still queued or running.
        held_back: cells that `site.submit_limit` leaves no room for.
    """

    sent: tuple[Cell, ...]
    left_alone: tuple[Cell, ...]
    held_back: tuple[Cell, ...]


def submit_arrays(plan: Plan, ledger: Ledger) -> Submission:
    """Submit all that is to do to Slurm at once, see `plan.arrays`; the ledger is written array by array.

    Raises:
        RunError: Slurm cannot be used from here, or refuses an array; those before it are submitted.
    """
    known = {str(entry["cell"]): str(entry["job"]) for entry in ledger.entries if entry.get("executor") == "slurm"}
    site, todo = plan.config.site, {cell.id: cell for cell in plan.todo}
    states = slurm_states([known[name] for name in todo if name in known])
    if states is None:
        raise RunError("squeue cannot be asked which jobs of this run are still there; try again later")
    queued = _living(plan.todo, {name: known[name] for name in todo if known.get(name) in states})
    todo = {cell.id: cell for cell in plan.beside(queued)}
    room = _room(site)
    jobs: dict[int, str] = {}
    sent: list[Cell] = []
    for array in arrays(list(todo.values()), queued, site.max_array):
        cells = array.cells if room is None else array.cells[: room - len(sent)]
        if array.stage == "scale" and len(cells) < len(array.cells):
            cells = ()  # a part of a measurement would be for nothing
        if cells:
            undo(plan.paths, cells)
            made = submit(array.site, plan.paths, array.stage, [cell.id for cell in cells], array.dependency(jobs))
            ledger.add_all(cells, made, "slurm")
            jobs[array.number] = made[0].id.partition("_")[0]
            sent += cells
        if len(cells) < len(array.cells):
            break
    handed = {cell.id for cell in sent}
    held_back = [cell for cell in todo.values() if cell.id not in handed and cell.id not in queued]
    return Submission(tuple(sent), tuple(todo[name] for name in queued if name not in handed), tuple(held_back))


def undo(paths: RunPaths, cells: Iterable[Cell]) -> None:
    """Remove the records of cells that run again although they are done: what reads others, and part of a measurement."""
    for cell in cells:
        if cell.stage in ("summarise", "scale"):
            paths.cell(cell.id).record.unlink(missing_ok=True)


def _living(todo: Sequence[Cell], queued: Mapping[str, str]) -> dict[str, str]:
    """Queued jobs that can still begin: Slurm drops those that wait for a cell that ended and is not done, but not at once."""
    living: dict[str, str] = {}
    wanted, guarding = {cell.id for cell in todo}, guards(todo)
    for cell in todo:
        if cell.id in queued and all(need in living for need in waits_for(cell, guarding) if need in wanted):
            living[cell.id] = queued[cell.id]
    return living


def _room(site: SiteConfig) -> int | None:
    """Jobs that the user may still submit; None = any number."""
    if not site.submit_limit:
        return None
    count = queue_length()
    if count is None:
        raise RunError("squeue cannot be asked how many jobs are in the queue (site.submit_limit); try again later")
    return max(0, site.submit_limit - count)


def scripts(plan: Plan) -> list[tuple[Array, str]]:
    """Every array that a launch would submit where none of the run is queued, and its batch script.

    Slurm gives jobs their numbers as they come: in dependencies the script says JOB1 for that of the first array.

    Raises:
        RunError: the site has no Slurm.
    """
    site = plan.config.site
    if site.executor != "slurm":
        raise RunError(f"site {site.name}: executor = {site.executor} has no batch scripts; give another --site")
    found = arrays(plan.todo, {}, site.max_array)
    names = {array.number: f"JOB{array.number + 1}" for array in found}
    return [
        (array, script(array.site, plan.paths, array.stage, len(array.cells), array.dependency(names)))
        for array in found
    ]
