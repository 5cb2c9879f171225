"""What Slurm knows of our jobs: one question to squeue, one to sacct, and every word of the answers explained.

Both may be missing, refuse or answer in another version's form: then the answer is None, or a field of it is,
and callers go by what the tasks themselves left (see hpc.books).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT_SECONDS = 30.0
"""A controller that does not answer for so long is as good as none."""

NO_SUCH_JOB = "Invalid job id"
"""What squeue says, with an error code, of a job that is over for some minutes."""

HELD = frozenset(
    [
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "CONFIGURING",
        "COMPLETING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
        "POWER_UP_NODE",
    ]
)
"""States of a job that Slurm will still work on, or works on now."""

RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
"""States of a job that has its node."""

OUT_OF_MEMORY = "OUT_OF_MEMORY"

ENDINGS = {
    "TIMEOUT": "stopped at its time limit",
    "DEADLINE": "stopped at its deadline",
    OUT_OF_MEMORY: "killed: it needed more memory than it had asked for",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "taken off its node for a job of higher priority",
    "CANCELLED": "cancelled",
    "FAILED": "ended with an error code",
    "REVOKED": "taken back by the other cluster of a federation",
    "COMPLETED": "ended in order, but left no valid record",
}
"""How a job ended, in words."""

REASONS = {
    "Priority": "others are ahead of it",
    "Resources": "next in line, waits for free nodes",
    "Dependency": "waits for the cells it builds on",
    "DependencyNeverSatisfied": "builds on a cell that failed; `cancel` it, then `retry`",
    "BeginTime": "was requeued, starts again in a moment",
    "JobArrayTaskLimit": "waits for another of its array (site.max_jobs)",
    "JobHeldUser": "held by you; `scontrol release` lets it go",
    "JobHeldAdmin": "held by the cluster's administrators",
    "ReqNodeNotAvail": "a node it needs is down or reserved (maintenance?)",
    "Reservation": "waits for a reservation",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes jobs but starts none",
    "PartitionNodeLimit": "asks for more nodes than the partition allows; see `doctor --site`",
    "PartitionTimeLimit": "asks for more time than the partition allows; see `doctor --site`",
    "BadConstraints": "no node has what it asks for; see `doctor --site`",
    "Licenses": "waits for a licence",
    "InvalidAccount": "the account may not run here; see `doctor --site`",
    "InvalidQOS": "the QOS may not be used; see `doctor --site`",
    "NodeDown": "its node is down",
    "Nodes required for job are DOWN": "all nodes it could take are down, drained or kept for others",
    "Cleaning": "its last attempt is being cleared away",
    "launch_failed_requeued_held": "could not be started on its node; `scontrol release` tries again",
    "job_requeued_in_held_state": "requeued and held; `scontrol release` lets it go",
}
"""Why a job waits, in words."""

REASON_PATTERNS = (
    (r"(Assoc|QOS).*(Minutes|RunMinutes|Billing)", "the account's or QOS's budget of hours is spent"),
    (r"(Assoc|QOS)?Max.*PerUser|(Assoc|QOS).*Max.*Jobs?", "you have as many jobs or GPUs as you may at once"),
    (r"(Assoc|QOS)Grp", "your group has as many jobs, cores or GPUs as it may at once"),
    (r"(Assoc|QOS)Max", "asks for more than the account or QOS allows a job"),
)
"""The limits of associations and QOSs, of which there are a hundred."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue tells it, also for some minutes after its end.

    Attributes:
        job: `123` or `123_4`.
        state: Slurm's word.
        reason: Slurm's word for why it waits; empty where there is none.
        start: when it started, or is expected to, the cluster's local time in ISO 8601; None where unknown.
        elapsed_s: run time of this attempt, s.
        limit_s: its time limit, s; None where there is none.
        nodes: where it runs.
    """

    job: str
    state: str
    reason: str
    start: str | None
    elapsed_s: int | None
    limit_s: int | None
    nodes: str

    @property
    def held(self) -> bool:
        """Whether Slurm has not finished with it."""
        return self.state in HELD

    @property
    def running(self) -> bool:
        """Whether it has its node."""
        return self.state in RUNNING


@dataclass(frozen=True)
class Spent:
    """One attempt of a job as sacct tells it; a requeued job has several.

    Attributes:
        job: `123` or `123_4`.
        state: Slurm's word, without what follows it (`CANCELLED by 0`).
        start: cluster's local time in ISO 8601; None before it started.
        elapsed_s: wall time, s.
        limit_s: time limit, s; None where there is none.
        cpus: cores it had.
        gpus: GPUs it had; 0 also where accounting does not count them.
        memory_bytes: memory it asked for on all nodes; None where unknown.
        peak_bytes: highest resident memory of a task of it; None where nothing was sampled.
        cpu_s: processor time, s.
        gpu_share: mean use of its GPUs, 0 to 1; None where the cluster does not sample it.
        nodes: where it ran.
        node_count: on how many nodes.
    """

    job: str
    state: str
    start: str | None
    elapsed_s: int
    limit_s: int | None
    cpus: int
    gpus: int
    memory_bytes: int | None
    peak_bytes: int | None
    cpu_s: float
    gpu_share: float | None
    nodes: str
    node_count: int = 1


def ask(*line: str) -> subprocess.CompletedProcess[str] | None:
    """What a program of Slurm's answers; None where it is not there, or does not answer within TIMEOUT_SECONDS."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def queue_length() -> int | None:
    """Jobs of this user that Slurm holds, each element of an array counted; None when it cannot be asked."""
    answer = ask("squeue", "--noheader", "--array", "--me", "--format=%i")
    return None if answer is None or answer.returncode else len(answer.stdout.splitlines())


def ask_queue(jobs: Iterable[str]) -> dict[str, Queued] | None:
    """What squeue says of jobs (`123` or `123_4`), array elements apart; None when it cannot be asked."""
    wanted = set(jobs)
    if not wanted:
        return {}
    form = "%i|%T|%r|%S|%M|%l|%N"
    answer = ask("squeue", "--noheader", "--array", "--states=all", f"--format={form}", f"--jobs={_masters(wanted)}")
    if answer is None or (answer.returncode and NO_SUCH_JOB not in answer.stderr):
        return None
    found: dict[str, Queued] = {}
    for line in answer.stdout.splitlines():
        fields = line.split("|")
        if len(fields) != 7 or fields[0] not in wanted:
            continue
        job, state, reason, start, elapsed, limit, nodes = (field.strip() for field in fields)
        found[job] = Queued(
            job,
            state,
            "" if reason == "None" else reason,
            _instant(start),
            _whole(seconds(elapsed)),
            _whole(seconds(limit)),
            nodes,
        )
    return found


_COLUMNS: str = (
    "JobID,State,Start,ElapsedRaw,Timelimit,AllocCPUS,AllocTRES,ReqMem,NNodes,MaxRSS,TotalCPU,TRESUsageInAve,NodeList"
)


def ask_books(jobs: Iterable[str]) -> list[Spent] | None:
    """What sacct says of every attempt of jobs, oldest first; None where accounting is off or does not answer."""
    wanted = set(jobs)
    if not wanted:
        return []
    answer = ask(
        "sacct", "--noheader", "--parsable2", "--duplicates", f"--format={_COLUMNS}", f"--jobs={_masters(wanted)}"
    )
    if answer is None or answer.returncode:
        return None
    names = _COLUMNS.split(",")
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    attempts: list[list[dict[str, str]]] = []
    for row in (dict(zip(names, fields, strict=True)) for fields in rows if len(fields) == len(names)):
        job, _, step = row["JobID"].partition(".")
        if job not in wanted:
            continue
        if not step:
            attempts.append([row])
        elif attempts and attempts[-1][0]["JobID"] == job:
            attempts[-1].append(row)
    return [_spent(rows[0], rows[1:]) for rows in attempts]


def _spent(row: Mapping[str, str], steps: Sequence[Mapping[str, str]]) -> Spent:
    traced = tres(row["AllocTRES"])
    cpus, nodes = _number(row["AllocCPUS"]), max(1, _number(row["NNodes"]))
    peaks = [peak for step in steps if (peak := size(step["MaxRSS"])) is not None]
    shares = [share for step in steps if (share := tres(step["TRESUsageInAve"]).get("gres/gpuutil")) is not None]
    own_cpu = seconds(row["TotalCPU"]) or 0.0
    return Spent(
        job=row["JobID"],
        state=(row["State"].split() or ["UNKNOWN"])[0],
        start=_instant(row["Start"]),
        elapsed_s=_number(row["ElapsedRaw"]),
        limit_s=_whole(seconds(row["Timelimit"])),
        cpus=cpus,
        gpus=gpus_of(traced),
        memory_bytes=_asked_memory(row["ReqMem"], traced, cpus, nodes),
        peak_bytes=int(max(peaks)) if peaks else None,
        cpu_s=max([own_cpu, *(seconds(step["TotalCPU"]) or 0.0 for step in steps)]),
        gpu_share=max(shares) / 100 if shares else None,
        nodes=row["NodeList"],
        node_count=nodes,
    )


def why_waiting(reason: str) -> str:
    """A pending job's reason in words, Slurm's own word behind it."""
    word = reason.strip("()").split(",")[0].strip()
    text = REASONS.get(word)
    if text is None:
        text = next((words for pattern, words in REASON_PATTERNS if re.match(pattern, word)), "")
    return f"{text} ({word})" if text else word


def how_ended(state: str) -> str:
    """A job's last state in words, Slurm's own word behind it."""
    text = ENDINGS.get(state)
    return f"{text} ({state})" if text else f"ended as {state}"


def seconds(text: str) -> float | None:
    """Slurm's times (`1-02:03:04`, `02:03`, `03:04.5`) in seconds; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)", text.strip())
    if match is None or not (match[2] or match[1]):
        return None
    days, first, second, last = match[1], match[2], match[3], float(match[4])
    if second is not None:
        clock = int(first or 0) * 3600 + int(second) * 60 + last
    elif days is not None:  # 1-02 is days and hours, 1-02:03 adds minutes
        clock = last * 3600 if first is None else int(first) * 3600 + last * 60
    else:
        clock = int(first) * 60 + last
    return int(days or 0) * 86400 + clock


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def size(text: str, unit: str = "") -> float | None:
    """Slurm's sizes (`123456K`, `1.50G`, `0`) in bytes; None for what is no size. `unit` is that of a bare number."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", text.strip())
    return float(match[1]) * _UNITS[match[2] or unit] if match else None


def tres(text: str) -> dict[str, float]:
    """`cpu=8,gres/gpu:a100=2,mem=32G` -> figures by name, sizes in bytes."""
    pairs = [pair.partition("=") for pair in text.split(",") if "=" in pair]
    return {name: value for name, _, amount in pairs if (value := size(amount)) is not None}


def gpus_of(traced: Mapping[str, float]) -> int:
    """GPUs among trackable resources: the total where it is counted, else the sum over types."""
    if "gres/gpu" in traced:
        return int(traced["gres/gpu"])
    return int(sum(amount for name, amount in traced.items() if name.startswith("gres/gpu:")))


def _asked_memory(text: str, traced: Mapping[str, float], cpus: int, nodes: int) -> int | None:
    """Memory a job had on all its nodes: as allocated, else as asked (older Slurms: `4Gc` a core, `4Gn` a node)."""
    if "mem" in traced:
        return int(traced["mem"])
    per = text[-1:] if text[-1:] in ("c", "n") else ""
    amount = size(text.removesuffix(per), "M") if text else None
    if not amount:
        return None
    return int(amount * (cpus if per == "c" else nodes if per == "n" else 1))


def _masters(jobs: Iterable[str]) -> str:
    """Job numbers for `--jobs`: that of the array stands for all its elements."""
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _instant(text: str) -> str | None:
    return text if re.match(r"\d{4}-\d\d-\d\dT", text) else None


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
