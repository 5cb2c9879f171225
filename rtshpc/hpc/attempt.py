"""What becomes of an attempt that ended without a record: `python -m rtshpc.hpc.attempt FOLDER CODE SECONDS`.

The batch script calls it, on the host, so that no image needs Slurm's programs. A task that was told to stop, or was
killed without a word, goes back into the queue inside its own job: what depends on that job stays. Only this element
is queued again, never its array; one that found its node broken avoids it from then on. A task that failed is not: it
would fail again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import BAD_NODE, STOP_SIGNALS, STOPPED
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import read_lines, write_json
from rtshpc.hpc.accounting import NO_SUCH_JOB, ask
from rtshpc.hpc.books import bad_nodes

TRIES, PAUSE_SECONDS = 4, 5.0
"""How often, and how far apart, a controller is asked that is too busy to answer, as many are for a moment."""

EARLY_SECONDS = 60
"""Slurm gives the warning before a time limit up to so much earlier than asked."""

OUT_OF_MEMORY = "OutOfMemory"
"""Kind of a failure that more memory, or a smaller batch, would mend."""

LOG_TAIL = 1 << 16
"""Bytes at a log's end in which Slurm's last words are looked for."""

BEGINNING = b"Starting with JobEnvironment("
"""What Submitit writes first."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        code: exit code of srun: the task's, or 128 + the signal that killed it.
        seconds: how long it ran.
        number: of the attempt in its job, from 1.
        advanced: whether it saved something to go on from.
        out_of_memory: whether Slurm says that memory ran out.
        timed_out: whether Slurm says that it ended the job at its time limit.
        explained: whether the task has written down why it failed.
        taken: whether the job is over for Slurm already: its user cancelled it, or Slurm queues it again itself; None
            where Slurm does not say.
    """

    code: int
    seconds: int
    number: int
    advanced: bool
    out_of_memory: bool = False
    timed_out: bool = False
    explained: bool = False
    taken: bool | None = False

    @property
    def told(self) -> bool:
        """Whether it was told to stop."""
        return self.code in (STOPPED, *(128 + number for number in STOP_SIGNALS))

    @property
    def misplaced(self) -> bool:
        """Whether it found its node broken."""
        return self.code == BAD_NODE

    @property
    def killed(self) -> bool:
        """Whether it was killed without a word."""
        return self.code == 128 + signal.SIGKILL


@dataclass(frozen=True)
class Verdict:
    """Whether the attempt is repeated; else its kind of failure and why, empty where there is nothing to tell."""

    again: bool
    kind: str = ""
    why: str = ""


def judge(ended: Ended, site: SiteConfig) -> Verdict:
    """What to do about an attempt that ended without a record."""
    if ended.out_of_memory:
        return Verdict(False, OUT_OF_MEMORY, f"out of memory: it had site.memory_gb = {site.memory_gb}")
    if not (ended.told or ended.killed or ended.misplaced):
        return Verdict(False) if ended.explained else _failed(ended.code)
    how = "was told to stop" if ended.told else "was killed (SIGKILL)" if ended.killed else "found its node broken"
    late = not ended.misplaced and (
        ended.timed_out or ended.seconds >= site.minutes * 60 - site.warn_seconds - EARLY_SECONDS
    )
    if ended.taken and not ended.timed_out:
        return Verdict(False, "Taken")
    if ended.taken is None and not ended.timed_out:
        why = f"it {how}, and squeue does not say whether its user has cancelled it; `retry` goes on"
        return Verdict(False, "Unasked", why)
    if late and not ended.advanced:
        why = f"the time limit came before the first checkpoint of this attempt; site.minutes = {site.minutes}"
        return Verdict(False, "TimeLimit", f"{why} is too short")
    if ended.number >= site.max_attempts:
        return Verdict(False, "Attempts", f"attempt {ended.number} {how}; site.max_attempts = {site.max_attempts}")
    if site.requeue == "never" or (ended.killed and site.requeue == "stopped"):
        return Verdict(False, "Killed", f"it {how}; site.requeue = {site.requeue}")
    return Verdict(True)


def _failed(code: int) -> Verdict:
    """What a task did not write down itself: it crashed, or never began."""
    try:
        how = f"killed by {signal.Signals(code - 128).name}"
    except ValueError:
        how = f"ended with exit code {code}"
    return Verdict(False, "Died", f"{how}; the log says more")


def settle(folder: Path, code: int, seconds: int, environment: Mapping[str, str]) -> str:
    """Judge the attempt of the job that `environment` names, and act on it; what was done, for the log."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    job = job_name(environment)
    place = JobPaths(folder, job)
    stage, run_dir, task = DelayedSubmission.load(place.submitted_pickle).args
    paths = RunPaths(Path(run_dir))
    site, cell = read_run_config(paths.config)[0].site, paths.cell(task)
    number = attempt_number(environment)
    words = last_words(place.stdout)
    code = first_code(code, paths, cell, time.time() - seconds, environment)
    ended = Ended(
        code=code,
        seconds=seconds,
        number=number,
        advanced=advanced(cell),
        # Slurm's own spelling: torch writes of memory in small letters.
        out_of_memory=b"oom-kill event" in words or b"Out Of Memory" in words,
        timed_out=b"DUE TO TIME LIMIT" in words,
        explained=cell.failure.exists(),
        taken=taken_away(job),
    )
    verdict = judge(ended, site)
    if verdict.again:
        refused = requeue(job)
        if not refused:
            if ended.misplaced:  # Slurm takes this of jobs that wait, so it comes after
                broken = bad_nodes(paths) or {environment.get("SLURMD_NODENAME", ""): ""}
                print(f"rtshpc: job {job} avoids {', '.join(broken)}{avoid(job, broken)}", file=sys.stderr)
            return f"attempt {number} of {stage} {task} ended with {code}; job {job} is in the queue again"
        verdict = Verdict(False, "Killed", f"it ended with {code} and could not be queued again: {refused}")
    if verdict.why and not (ended.misplaced and ended.explained):  # the task's own word names the node
        write_json(cell.failure, {"error": verdict.why, "kind": verdict.kind, "traceback": f"see {place.stdout}"})
    return f"attempt {number} of {stage} {task} ended with {code}: {verdict.why or 'nothing is left to do about it'}"


def first_code(code: int, paths: RunPaths, cell: CellPaths, since: float, environment: Mapping[str, str]) -> int:
    """Exit code of the task that failed first: of several, srun also tells of those that it ended for its sake.

    Args:
        code: srun's.
        paths: the run.
        cell: what they worked on; whoever failed has said why there.
        since: when the attempt began, s since 1970.
        environment: of the job.
    """
    job = job_name(environment)
    if any(row.get("job") == job and float(row.get("time", 0)) >= since for row in read_lines(paths.bad_nodes)):
        return BAD_NODE
    several = int(environment.get("SLURM_NTASKS", "1")) > 1
    return 1 if several and code != STOPPED and cell.failure.exists() else code


def job_name(environment: Mapping[str, str]) -> str:
    """`12_3` for an element of an array, else `12`; the plain number of an element could mean its array."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def attempt_number(environment: Mapping[str, str]) -> int:
    """Number of the attempt in its job, from 1; Slurm counts its own requeues and ours."""
    return 1 + int(environment.get("SLURM_RESTART_COUNT", "0"))


def advanced(cell: CellPaths) -> bool:
    """Whether the last attempt saved something: its checkpoint or journal is younger than its start."""
    try:
        started = cell.attempts.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    saved = [path.stat().st_mtime_ns for path in (cell.last_checkpoint, cell.journal) if path.exists()]
    return max(saved, default=0) > started


def last_words(log: Path) -> bytes:
    """What the end of a log says of its last attempt; the attempts of a job share it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            return file.read().rpartition(BEGINNING)[2]
    except OSError:
        return b""


def taken_away(job: str) -> bool | None:
    """Whether the job is no longer running for Slurm; None where that cannot be asked."""
    for tried in range(TRIES):
        if tried:
            time.sleep(PAUSE_SECONDS)
        answer = ask("squeue", "--noheader", "--format=%T", "--jobs", job)
        if answer is not None and (not answer.returncode or NO_SUCH_JOB in answer.stderr):
            return answer.stdout.strip() != "RUNNING"
    return None


def requeue(job: str) -> str:
    """Put one job, or one element of an array, back into the queue; why not, else nothing."""
    return _refused("scontrol", "requeue", job)


def avoid(job: str, nodes: Iterable[str]) -> str:
    """Keep a waiting job off nodes; why not, else nothing."""
    refused = _refused("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
    return f": {refused}" if refused else ""


def _refused(*line: str) -> str:
    """Why Slurm does not do what it is told; nothing where it does."""
    answer = ask(*line)
    if answer is None:
        return f"{line[0]} does not answer"
    return (" ".join(answer.stderr.split()) or f"exit code {answer.returncode}") if answer.returncode else ""


def main(arguments: Sequence[str]) -> int:
    """Settle the attempt; gives the task's exit code, which Slurm's `afterok` sees."""
    folder, code, seconds = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    print(f"rtshpc: {settle(folder, code, seconds, os.environ)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
