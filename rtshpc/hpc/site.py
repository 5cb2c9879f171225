"""What a site gives each stage, and what this machine has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rtshpc
from rtshpc.core.config import SiteConfig
from rtshpc.core.paths import COMMIT_FILE

GPU_STAGES = frozenset({"pretrain", "features", "finetune", "evaluate", "measure", "map"})
"""Stages that use a GPU where the site has one; the others would let it idle."""


@dataclass(frozen=True)
class Request:
    """Resources of one task.

    Attributes:
        cpus: cores.
        memory_gb: memory, GB.
        gpus: GPUs.
        minutes: time limit.
    """

    cpus: int
    memory_gb: int
    gpus: int
    minutes: int


def request(site: SiteConfig, stage: str) -> Request:
    """What a task of `stage` asks for at `site`."""
    gpus = site.gpus if stage in GPU_STAGES else 0
    return Request(cpus=site.cpus, memory_gb=site.memory_gb, gpus=gpus, minutes=site.minutes)


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine, bytes (a container's own limit may be lower)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus_here() -> list[str]:
    """Names of the GPUs that the driver shows; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if not answer.returncode else []


def code_version(clone: Path | None = None) -> str:
    """The commit of a clone (this code's), `-dirty` with local changes; in an image its own; else the package's version."""
    root = clone or Path(rtshpc.__file__).resolve().parents[1]
    note = root / COMMIT_FILE
    if not (root / ".git").exists():
        return note.read_text(encoding="utf-8").strip() if note.is_file() else rtshpc.__version__
    asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return rtshpc.__version__
    return answer.stdout.strip() or rtshpc.__version__


@dataclass(frozen=True)
class Place:
    """This process among the tasks of a Slurm step that train together.

    Attributes:
        rank: number of the task; 0 writes the files.
        size: tasks of the step.
        local: number of the task on its node, and of its GPU.
        meeting: where they meet, `tcp://HOST:PORT`.
    """

    rank: int
    size: int
    local: int
    meeting: str


def place_in_step(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands in a training over several tasks; None where it trains alone.

    The batch script says where the tasks meet (MASTER_ADDR, MASTER_PORT): without that, tasks of one step are strangers.
    """
    size, address, port = (environment.get(name) for name in ("SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT"))
    if not (address and port and size and int(size) > 1):
        return None
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Place(rank, int(size), local, f"tcp://{address}:{port}")
