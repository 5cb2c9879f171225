"""What a site gives each stage, and what this machine has."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rtshpc
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import BadNode, RunError
from rtshpc.core.paths import COMMIT_FILE

GPU_STAGES = frozenset({"pretrain", "features", "finetune", "evaluate", "measure", "map", "scale"})
"""Stages that use a GPU where the site has one; the others would let it idle."""

GPU_FAULTS = (
    "uncorrectable ecc error",
    "double bit ecc",
    "devices are busy or unavailable",
    "device(s) is/are busy or unavailable",
    "device unavailable",
    "no cuda-capable device",
    "no cuda gpus are available",
    "gpu is lost",
    "device has been lost",
    "unable to determine the device handle",
    "couldn't communicate with the nvidia driver",
    "driver/library version mismatch",
    "cuda driver initialization failed",
    "system not yet initialized",
    "hardware stack error",
    "nvlink error",
)
"""What CUDA and nvidia-smi say of a GPU or driver that is broken, in small letters; a task's own mistakes (an illegal
access, too little memory) read otherwise."""

TRAININGS = frozenset({"pretrain", "finetune", "scale"})
"""Stages whose task may be several, over nodes."""

FIRST_PORT, PORTS = 20000, 20000
"""Where the tasks of a training meet: a port that another job on the node is unlikely to have."""

NODE_ERRORS = frozenset({errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO})
"""Errors of a disk or device that has gone, as opposed to one that is full or not ours."""

NAMED_SHARE = 0.9
"""Share of a GPU's nominal memory that it must have: ECC and the driver take the rest."""


@dataclass(frozen=True)
class Request:
    """Resources of one job.

    Attributes:
        cpus: cores of a task.
        memory_gb: memory of a node, GB.
        gpus: GPUs of a node.
        minutes: time limit.
        nodes: nodes.
        tasks: tasks of a node.
    """

    cpus: int
    memory_gb: int
    gpus: int
    minutes: int
    nodes: int = 1
    tasks: int = 1


def request(site: SiteConfig, stage: str) -> Request:
    """What a job of `stage` asks for at `site`; a training has `site.tasks` on each of `site.nodes`."""
    gpus = site.gpus if stage in GPU_STAGES else 0
    nodes, tasks = (site.nodes, site.tasks) if stage in TRAININGS else (1, 1)
    return Request(site.cpus, site.memory_gb * tasks, gpus, site.minutes, nodes, tasks)


def node_share(site: SiteConfig, gpus: float, cpus: float, memory_gb: float) -> float:
    """Nodes that so much of them is charged as: the largest share of GPUs, cores or memory, of those the site tells."""
    held = (gpus, site.node_gpus), (cpus, site.node_cpus), (memory_gb, site.node_memory_gb)
    return max((amount / there for amount, there in held if there), default=0.0)


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


def gpu_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's driver, as its kernel module tells it; None where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", told.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def node_name() -> str:
    """What Slurm calls this node; outside Slurm its host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def of_the_node(error: BaseException) -> bool:
    """Whether an error speaks of a broken node or GPU, and not of the task that met it."""
    if isinstance(error, BadNode) or (isinstance(error, OSError) and error.errno in NODE_ERRORS):
        return True
    text = str(error).lower()
    return any(fault in text for fault in GPU_FAULTS)


def scratch_folder(site: SiteConfig) -> Path | None:
    """The scratch folder of this node; None where the site names none.

    Raises:
        RunError: the variable that `site.scratch` names is not set here.
    """
    if not site.scratch:
        return None
    folder = os.environ.get(site.scratch)
    if not folder:
        raise RunError(f"site.scratch = {site.scratch}: no such environment variable on {node_name()}")
    return Path(folder)


def refuse_bad_node(site: SiteConfig, stage: str) -> None:
    """Raise BadNode where this node cannot do what a task of `stage` asks of it: its scratch folder, its GPUs.

    A scratch folder that is full is not bad: it is left alone then.
    """
    if stage not in GPU_STAGES:
        return
    folder = scratch_folder(site)
    if folder is not None:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise BadNode(f"site.scratch = {site.scratch}: {folder}: {error.strerror}") from None
    if site.gpu_memory_gb and site.gpus:
        _refuse_bad_gpus(site)


def _refuse_bad_gpus(site: SiteConfig) -> None:
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadNode(f"nvidia-smi cannot be asked for the GPUs: {error}") from None
    sizes = [int(line) for line in answer.stdout.split() if line.isdigit()]
    able = [size for size in sizes if size >= NAMED_SHARE * 1024 * site.gpu_memory_gb]
    if answer.returncode or len(able) < site.gpus:
        said = " ".join((answer.stderr or answer.stdout).split())[:200] if answer.returncode else f"{sizes} MiB"
        raise BadNode(f"{len(able)} GPUs of site.gpu_memory_gb = {site.gpu_memory_gb} here, not {site.gpus}: {said}")


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


def meeting(first_node: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that tell the tasks of a Slurm step where they meet; none where the step has one task.

    Args:
        first_node: of the job.
        environment: of a task.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    return {"MASTER_ADDR": first_node, "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS)}


def place_in_step(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands in a training over several tasks; None where it trains alone.

    MASTER_ADDR and MASTER_PORT say where the tasks meet (see `meeting`): without them, tasks of one step are strangers.
    """
    size, address, port = (environment.get(name) for name in ("SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT"))
    if not (address and port and size and int(size) > 1):
        return None
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Place(rank, int(size), local, f"tcp://{address}:{port}")
