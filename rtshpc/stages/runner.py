"""One attempt at one cell: lock, threads, environment, the stage's recipe, and a record or a failure."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config.scale import TRAINED_KINDS
from rtshpc.core.errors import BAD_NODE, STOP_SIGNALS, STOPPED, MissingExtra, RtshpcError, RunError, guess
from rtshpc.core.grid import finished
from rtshpc.core.load import read_cell, read_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import SILENT, Progress, Record, locked, read_plan, write_json, write_record
from rtshpc.hpc import books
from rtshpc.hpc.attempt import OUT_OF_MEMORY
from rtshpc.hpc.executor import LAUNCHER, launcher_lives
from rtshpc.hpc.site import (
    TRAININGS,
    code_version,
    cpu_model,
    gpu_driver,
    node_name,
    of_the_node,
    place_in_step,
    refuse_bad_node,
)

LOCK_SECONDS = 30.0
"""How long an attempt waits for another one on the same cell to end, e.g. of a launcher just killed."""

WATCH_SECONDS = 1.0
"""How often a local task looks whether its launcher lives."""

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""`M_...` of glibc's malloc.h."""
KEPT_BYTES = 32 << 20
"""Freed arrays up to this size are kept for the next."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def run(stage: str, run_dir: Path, task: str) -> int:
    """Make the record of one cell, unless it is there.

    Args:
        stage: one of STAGES.
        run_dir: the run's folder.
        task: cell id, or index in the stage's array.

    Returns:
        Exit code: 0 done, 1 failed (see failure.json), 2 a mistake of the user; a task that is told to stop ends
        with errors.STOPPED, one whose node is broken with errors.BAD_NODE.

    Raises:
        RunError: there is no such run or cell, or another process holds it.
    """
    paths = RunPaths(run_dir)
    folder = paths.cell(find_cell(paths, stage, task))
    cell = read_cell(folder.config)
    if cell.stage != stage:
        raise RunError(f"{folder.config}: cell {cell.id} is of stage {cell.stage}, not {stage}")
    set_memory(stage)
    _end_when_told()
    _watch_launcher()
    own = place_in_step()
    if own is not None and own.rank > 0:
        return _follow(cell, paths)
    with locked(folder.lock, LOCK_SECONDS, f"{folder.root}: another process works on this cell"):
        if finished(cell, paths) is not None:
            print(f"{cell.label}: done before")
            return 0
        return _attempt(cell, paths, folder)


def find_cell(paths: RunPaths, stage: str, task: str) -> str:
    """The cell id that `task` means: an id, or an index in the stage's array of plan.json."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", task) and paths.cell(task).config.is_file():
        return task
    plan = read_plan(paths.plan)
    if plan is None:
        raise RunError(f"{paths.root}: no cell {task} and no plan.json here; is it a run folder?")
    known = [str(cell["id"]) for cell in plan["cells"] if cell["stage"] == stage]
    if task.isascii() and task.isdecimal() and int(task) < len(known):
        return known[int(task)]
    raise RunError(f"{paths.root}: no task {task} of {stage}; it has {len(known)}.{guess(task, known)}")


def _follow(cell: Cell, paths: RunPaths) -> int:
    """Train along with the first task of this step, which holds the cell and writes all but the reason of our failing."""
    if cell.stage not in TRAININGS or finished(cell, paths) is not None:
        return 0
    _set_threads(cell)
    try:
        refuse_bad_node(cell.config.site, cell.stage)
        importlib.import_module(f"rtshpc.stages.{cell.stage}").run(cell, paths, SILENT)
    except Exception as error:
        return _fail(paths, paths.cell(cell.id), None, error)
    except SystemExit:
        return 0  # told to stop: the first one has saved, and its exit code says so
    return 0


def _attempt(cell: Cell, paths: RunPaths, folder: CellPaths) -> int:
    """Run the stage's recipe once; a record on success, failure.json on error."""
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    folder.failure.unlink(missing_ok=True)
    folder.record.unlink(missing_ok=True)
    _sweep_leftovers(folder)
    processes, threads = processes_and_threads(cell)
    number = books.begin(folder, started, processes * threads)
    _set_threads(cell)
    print(f"{cell.label} ({cell.id}) started {started}", flush=True)
    try:
        refuse_bad_node(cell.config.site, cell.stage)
        module = importlib.import_module(f"rtshpc.stages.{cell.stage}")
        gc.freeze()  # the libraries' objects live as long as the task: no collection need walk them
        results = module.run(cell, paths, Progress(folder.progress))
        record = Record(
            cell=cell.id,
            stage=cell.stage,
            label=cell.label,
            result_version=RESULT_VERSION[cell.stage],
            started=started,
            seconds=round(time.monotonic() - began, 3),
            attempts=number,
            environment=_environment(paths),
            results=results,
        )
        write_record(folder.record, record)
    except Exception as error:
        return _fail(paths, folder, number, error)
    except SystemExit:
        books.end(folder, number, books.STOPPED)
        raise
    books.end(folder, number, "done")
    folder.progress.unlink(missing_ok=True)
    print(f"{cell.label} done in {record.seconds:.1f} s", flush=True)
    return 0


def missing_library(error: ModuleNotFoundError) -> Exception:
    """What to tell when an import fails: our own module is a fault, any other an extra to install."""
    if (error.name or "").partition(".")[0] == "rtshpc":
        return error
    return MissingExtra(
        f'"{error.name}" is not installed in {sys.prefix}; pip install "rtshpc[tasks]", or set site.image'
    )


def _fail(paths: RunPaths, folder: CellPaths, number: int | None, error: Exception) -> int:
    """Write failure.json, say why and close the books of attempt `number`; a full disk must not hide the first error."""
    if of_the_node(error):
        return _blame_node(paths, folder, number, error)
    if isinstance(error, ModuleNotFoundError):
        error = missing_library(error)
    mistake = isinstance(error, RtshpcError)
    text = str(error) if mistake else f"{type(error).__name__}: {error}"
    trace = "" if mistake else "".join(traceback.format_exception(error))
    print(f"error: {text}" if mistake else trace, file=sys.stderr, flush=True)
    kind = OUT_OF_MEMORY if isinstance(error, MemoryError) or "out of memory" in text else type(error).__name__
    facts = {"error": " ".join(text.split()), "kind": kind, "traceback": trace}
    with suppress(OSError):
        write_json(folder.failure, facts)
        if number is not None:
            books.end(folder, number, "failed")
    return 2 if mistake else 1


def _blame_node(paths: RunPaths, folder: CellPaths, number: int | None, error: Exception) -> int:
    """Say that the node is broken, where the batch script and later submissions look for it."""
    text = f"{node_name()} is broken: {' '.join(str(error).split())}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    books.note_bad_node(paths, folder.root.name, text)
    with suppress(OSError):
        write_json(folder.failure, {"error": text, "kind": "BadNode", "traceback": ""})
        if number is not None:
            books.end(folder, number, books.BAD_NODE)
    return BAD_NODE


def _sweep_leftovers(folder: CellPaths) -> None:
    """Delete temporary files of attempts that were killed; we hold the lock, so nobody writes them."""
    for place in (folder.root, folder.checkpoints, folder.features):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def processes_and_threads(cell: Cell) -> tuple[int, int]:
    """Processes of an attempt, and threads of each, by the cell's config."""
    config, task = cell.config, cell.scaling
    if cell.stage == "map":
        return 1, config.map.threads
    if cell.stage not in (*TRAININGS, "features", "scale"):
        return 1, 1
    training = config.pretrain if cell.stage == "pretrain" else config.finetune
    if task is not None and task.kind not in TRAINED_KINDS:
        return task.count, training.threads
    return 1 if cell.stage == "features" else training.processes, training.threads


def _set_threads(cell: Cell) -> None:
    """Threads from the cell's config and the kind of memory, before any numeric library reads them."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(processes_and_threads(cell)[1])
    # PyTorch on CPUs then asks for its large blocks in huge pages, where Linux gives them on request: a training step
    # takes and gives back hundreds of such blocks, and a fault for every 4 KiB of them was a fifth of its time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def set_memory(stage: str) -> None:
    """How a stage's process keeps the memory of arrays, before it has any; nothing changes but with glibc.

    map: all threads take it from one place. Each has its own else, which gives pages back to the system when a large array
    goes and asks for them anew with the next: a tenth of the time that reading a large scene takes in a thread beside the
    detector. preprocess: what a chip has freed stays for the next one, else a tenth of the time goes into such pages.
    """
    options = {"map": {ARENA_MAX: 1}, "preprocess": {MMAP_THRESHOLD: KEPT_BYTES, TRIM_THRESHOLD: 2 * KEPT_BYTES}}
    with suppress(OSError, AttributeError):
        for option, value in options.get(stage, {}).items():
            ctypes.CDLL(None).mallopt(option, value)


def _end_when_told() -> None:
    """A signal to stop ends the task, with all processes it started where it leads a group of its own.

    What a stage has finished is in its journal, so there is nothing to save; a training puts handlers of its own in
    place of these while it runs.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpid() == os.getpgrp():
            os.killpg(os.getpgrp(), signal.SIGTERM)
        os._exit(STOPPED)

    for number in STOP_SIGNALS:
        signal.signal(number, end)


def _watch_launcher() -> None:
    """End this task when its local launcher is gone: nobody would see or stop it."""
    token = os.environ.pop(LAUNCHER, "")
    if not token:
        return
    os.environ[books.LAUNCHED] = token

    def watch() -> None:
        while launcher_lives(token):
            time.sleep(WATCH_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _environment(paths: RunPaths) -> dict[str, Any]:
    """Where and with what the record was made."""
    _, provenance = read_run_config(paths.config)
    facts: dict[str, Any] = {
        "host": platform.node(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "gpu": None,
        "driver": None,
        "cuda": None,
        "torch": None,
        "commit": code_version(),
        "image": provenance.get("image") or None,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch"] = str(torch.__version__)
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
            facts["driver"], facts["cuda"] = gpu_driver(), torch.version.cuda
    return facts
