"""Tasks through Submitit: processes here, Slurm jobs, or one after the other for debuggers.

What is pickled is a function of three strings (stage, run folder, task); the job becomes
`python -m rtshpc.stages STAGE --run-dir RUN --task TASK`, which anyone can run again by hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.config.run import NO_FILE
from rtshpc.core.errors import STOP_SIGNALS, STOPPED, RtshpcError, RunError, system_sentence
from rtshpc.core.load import read_cell, read_run_config
from rtshpc.core.mapping.ground import folders_of, read_frozen
from rtshpc.core.paths import CellPaths, RunPaths, make_private, write_alone
from rtshpc.core.records import write_json
from rtshpc.hpc.accounting import ask_queue
from rtshpc.hpc.attempt import attempt_number
from rtshpc.hpc.books import bad_nodes
from rtshpc.hpc.container import command, refuse_image, refuse_start
from rtshpc.hpc.sbatch import parameters
from rtshpc.hpc.site import meeting, request

LAUNCHER = "RTSHPC_LAUNCHER"
"""Environment variable of local tasks: process id and start time of their launcher."""

STOP_SECONDS = 10.0
"""Local tasks that ignore SIGTERM for so long are killed."""


@dataclass(frozen=True)
class Job:
    """One submitted task.

    Attributes:
        id: the process id, the Slurm job (`123` or `123_4`), or Submitit's debug id.
        log: file with the task's output and errors.
        handle: Submitit's job.
    """

    id: str
    log: Path
    handle: Any

    def ended(self) -> bool:
        """Whether a local or debug job is over; a debug job runs in this call."""
        if self.id.startswith("DEBUG"):
            self.handle.exception()
            return True
        return str(self.handle.state) != "RUNNING"


def task_command(stage: str, run_dir: str, task: str) -> list[str]:
    """The argument list of one task, by the run's own config."""
    paths = RunPaths(Path(run_dir))
    config, provenance = read_run_config(paths.config)
    refuse_start(config.site, provenance.get("image"))
    arguments = ["-u", "-m", "rtshpc.stages", stage, "--run-dir", run_dir, "--task", task]
    folders = [paths.root, Path.cwd(), Path(config.data.root)]
    if config.map.model:
        folders += _of_the_map(paths, config, task)
    if config.pretrain.init != NO_FILE:
        folders.append(Path(config.pretrain.init).parent)
    if scratch := os.environ.get(config.site.scratch):
        folders.append(Path(scratch))
    return command(config.site, arguments, folders, sys.executable)


def _of_the_map(paths: RunPaths, config: RunConfig, task: str) -> list[Path]:
    """Folders that a task of a map run works with: of its scenes (all of them, where it has none of its own), and the model."""
    own = read_cell(paths.cell(task).config).scenes if paths.cell(task).config.is_file() else ()
    scenes = own or read_frozen(paths.frozen) or ()
    model = Path(config.map.model)
    return [*folders_of(one.scene for one in scenes), model.parent if model.is_file() else model.parents[1]]


def become(stage: str, run_dir: str, task: str) -> None:
    """Turn this process into the task, as the leader of a process group of its own.

    No process waits in between: signals reach the task, and its exit code is the job's, on which
    Slurm's `afterok` depends.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by a local launcher
    for number in STOP_SIGNALS:  # Submitit's own handlers would queue the job again, or call this a failure
        signal.signal(number, signal.SIG_DFL)
    write_alone()
    if attempt_number(os.environ) > read_run_config(RunPaths(Path(run_dir)).config)[0].site.max_attempts:
        sys.exit(STOPPED)  # after lost nodes, which Slurm itself queues again without end
    if os.getpid() != os.getpgrp():  # a step of Slurm leads its group, and could lead no session
        os.setsid()
    os.environ.update(meeting(_first_node()))
    try:
        line = task_command(stage, run_dir, task)
        os.execvp(line[0], line)  # noqa: S606 - an argument list, no shell
    except (RtshpcError, OSError) as error:
        _give_up(RunPaths(Path(run_dir)).cell(task), error)


def _first_node() -> str:
    """The first node of the Slurm job that Submitit runs us in; empty elsewhere."""
    import submitit

    return submitit.JobEnvironment().hostnames[0] if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else ""


def _give_up(cell: CellPaths, error: RtshpcError | OSError) -> None:
    """End with the reason why the task could not be started, where `status` looks for it."""
    text = system_sentence(error) if isinstance(error, OSError) else str(error)
    print(f"error: {text}", file=sys.stderr, flush=True)
    write_json(cell.failure, {"error": text, "kind": type(error).__name__, "traceback": ""})
    sys.exit(2)


def call(stage: str, run_dir: str, task: str) -> None:
    """Run the task and wait for it, its output in the log: the debug executor shares our process."""
    log = RunPaths(Path(run_dir)).logs / stage / f"{task}_debug.out"
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(task_command(stage, run_dir, task), stdout=file, stderr=file, check=True)


def submit(site: SiteConfig, paths: RunPaths, stage: str, tasks: Sequence[str], dependency: str = "") -> list[Job]:
    """Submit tasks of one stage: one Slurm array, or a process each.

    Args:
        site: where to.
        paths: the run.
        stage: the stage of all `tasks`.
        tasks: cell ids.
        dependency: of the Slurm jobs, as sbatch spells it; the callers of other executors wait themselves.

    Raises:
        RunError: the site cannot be submitted to from here, or Slurm refuses the jobs.
    """
    folder = make_private(paths.logs / stage)
    executor = _executor(site, folder, stage, dependency, bad_nodes(paths))
    function: Callable[[str, str, str], None] = call if site.executor == "debug" else become
    run_dir = str(paths.root)
    with shielded(site.executor == "local"), _told_in_one_line(site, stage):
        if len(tasks) == 1 or site.executor != "slurm":
            handles = [executor.submit(function, stage, run_dir, task) for task in tasks]
        else:
            handles = executor.map_array(function, [stage] * len(tasks), [run_dir] * len(tasks), list(tasks))
    jobs: list[Job] = []
    for handle, task in zip(cast(list[Any], handles), tasks, strict=True):
        log = Path(handle.paths.stdout) if site.executor != "debug" else folder / f"{task}_debug.out"
        jobs.append(Job(str(handle.job_id), log, handle))
    return jobs


def script(site: SiteConfig, paths: RunPaths, stage: str, tasks: int, dependency: str = "") -> str:
    """The batch script that `submit` would hand to sbatch; nothing is written.

    Raises:
        RunError: the site cannot be submitted to from here.
    """
    executor = _executor(site, paths.logs / stage, stage, dependency, bad_nodes(paths))
    if tasks > 1:
        executor.parameters["map_count"] = tasks  # as Submitit does for an array
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


@contextmanager
def _told_in_one_line(site: SiteConfig, stage: str) -> Generator[None]:
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        raise RunError(f"site {site.name}: sbatch refuses {stage}: {' '.join(str(error).split())}") from None


def refuse_unusable(site: SiteConfig, paths: RunPaths) -> None:
    """Raise RunError where tasks of the run could not be submitted; nothing is written."""
    if "%" in str(paths.root.absolute()):
        text = "% in the path of a run is expanded by Submitit and Slurm; take another folder (--runs DIR)"
        raise RunError(f"{paths.root.absolute()}: {text}")
    refuse_image(site)
    _bare_executor(site, paths.logs)


def stop(jobs: Sequence[Job]) -> None:
    """End local jobs and all their processes; returns when they are gone.

    SIGTERM is sent again until it is heard: Submitit ignores it in the moment before a task starts.
    """
    deadline = time.monotonic() + STOP_SECONDS
    left = [job for job in jobs if job.id.isdigit() and not job.ended()]
    while left:
        late = time.monotonic() > deadline
        for job in left:
            for process in _descendants(int(job.id)) if late else ():
                _send(process, signal.SIGKILL)
            _send(int(job.id), signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.2)
        left = [job for job in left if not job.ended()]


def slurm_states(ids: Sequence[str]) -> dict[str, str] | None:
    """State of the jobs that Slurm still holds (`PENDING`, ...); None when it cannot be asked."""
    queue = ask_queue(ids)
    return None if queue is None else {job: found.state for job, found in queue.items() if found.held}


def launcher_token() -> str:
    """Names this process so that a reused process id is not taken for it: `PID:START`."""
    return f"{os.getpid()}:{_started(os.getpid())}"


def launcher_lives(token: str) -> bool:
    """Whether the process that `launcher_token` named is still there."""
    pid, _, started = token.partition(":")
    return pid.isdigit() and _started(int(pid)) == started


def _bare_executor(site: SiteConfig, folder: Path) -> Any:
    import submitit

    try:
        if site.executor == "slurm":  # not the AutoExecutor: it cannot leave out Submitit's own workload key
            return submitit.SlurmExecutor(folder=folder)
        return submitit.AutoExecutor(folder=folder, cluster=site.executor)
    except RuntimeError as error:
        raise RunError(f"site {site.name}: executor = {site.executor} cannot be used here: {error}") from None


def _executor(site: SiteConfig, folder: Path, stage: str, dependency: str, avoid: Iterable[str]) -> Any:
    """A Submitit executor with the site's request."""
    executor = _bare_executor(site, folder)
    if site.executor == "slurm":
        executor.update_parameters(**parameters(site, stage, folder.absolute(), dependency, avoid))
    elif site.executor == "local":
        asked = request(site, stage)
        executor.update_parameters(
            name=f"rtshpc-{stage}",
            timeout_min=asked.minutes,
            gpus_per_node=asked.gpus,
            tasks_per_node=1,
            nodes=1,
            stderr_to_stdout=True,
        )
    return executor


@contextmanager
def shielded(local: bool) -> Generator[None]:
    """Start local children that do not see the terminal's Ctrl-C, and know their launcher.

    The launcher ends them in order; one that was killed itself is missed by its tasks, which then end.
    """
    if not local:
        yield
        return
    # Blocked as well as ignored: what children inherit as ignored waits here until this process can answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[LAUNCHER] = launcher_token()
    try:
        yield
    finally:
        del os.environ[LAUNCHER]
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty where there is none (or a zombie)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _descendants(pid: int) -> list[int]:
    """Children of a process, theirs, and so on, the youngest first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children: Mapping[int, list[int]] = parents
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found[::-1]
