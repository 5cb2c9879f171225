"""What this machine has for runs, here or as a login node."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rtshpc.hpc.site import code_version, cores, gpus_here, memory_bytes
from rtshpc.launch.doctor.finding import GIB, Finding, nearest

TASK_LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "rasterio": "rasterio",
    "h5py": "h5py",
    "cv2": "opencv-python-headless",
    "shapely": "shapely",
    "pyproj": "pyproj",
    "pycocotools": "pycocotools",
    "matplotlib": "matplotlib",
}
"""Module -> distribution: what the stages cannot do without."""


def examine(runs: Path) -> list[Finding]:
    """Look at everything that runs depend on; nothing is left behind."""
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("rtshpc", "ok", code_version()),
        _libraries(),
        _gpu(),
        Finding("cores", "ok", str(cores())),
        _memory(),
        _shared_memory(),
        _files_limit(),
        *_run_folder(runs),
        _program("slurm", ("sbatch", "squeue", "srun"), "log in to a cluster's login node to use --site slurm-..."),
        _program("slurm accounting", ("sacct",), "GPU-hours of jobs cannot be read without sacct"),
        _program("apptainer", ("apptainer",), "needed only where site.image is set"),
        _program("git", ("git",), "without git, records name the package version instead of the commit"),
    ]


def _libraries() -> Finding:
    missing = [name for module, name in TASK_LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        advice = 'stages cannot run in this environment: pip install "rtshpc[tasks]", or set site.image'
        return Finding("task libraries", "off", f"missing: {', '.join(missing)}", advice)
    seen = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "rasterio", "h5py"))
    return Finding("task libraries", "ok", seen)


def _gpu() -> Finding:
    names = gpus_here()
    if names:
        return Finding("gpu", "ok", ", ".join(names))
    return Finding("gpu", "off", "none visible", "training runs on CPUs here; full models need a GPU site")


def _memory() -> Finding:
    total = memory_bytes() / GIB
    state, advice = ("ok", "") if total >= 4 else ("off", "the demo wants 4 GB; set site.max_jobs=1")
    return Finding("memory", state, f"{total:.1f} GiB", advice)  # pyright: ignore[reportArgumentType]


def _shared_memory() -> Finding:
    """Loader processes pass batches through /dev/shm."""
    folder = Path("/dev/shm")  # noqa: S108 - looked at, not written
    if not folder.is_dir():
        return Finding("shared memory", "off", "no /dev/shm", "keep pretrain.workers and finetune.workers at 0")
    free = shutil.disk_usage(folder).free / GIB
    if free < 1:
        advice = "keep workers at 0, or give the container more (--shm-size)"
        return Finding("shared memory", "off", f"{free:.2f} GiB free in /dev/shm", advice)
    return Finding("shared memory", "ok", f"{free:.1f} GiB free in /dev/shm")


def _files_limit() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Finding("open files", "off", f"limit {soft}", "ulimit -n 4096 before runs with many loader workers")
    return Finding("open files", "ok", f"limit {soft}")


def _run_folder(runs: Path) -> Iterable[Finding]:
    """Whether the folder of runs can be written, locked, and has room."""
    folder = nearest(runs)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("run folder", "bad", f"{folder} cannot be written", "give another with --runs DIR")
        return
    free = shutil.disk_usage(folder).free / GIB
    room = "" if free >= 5 else "less than 5 GiB: a full disk stops cells (the next sweep resumes them)"
    yield Finding("run folder", "ok" if not room else "off", f"{folder}, {free:.1f} GiB free", room)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Finding("file locks", "ok", "work in the run folder")
    except OSError as error:
        advice = "put --runs on a file system with locks (flock), else two launchers could meet in one run"
        yield Finding("file locks", "bad", f"do not work in {folder}: {error.strerror}", advice)


def _program(name: str, programs: tuple[str, ...], advice: str) -> Finding:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return Finding(name, "off", f"no {', '.join(missing)}", advice)
    return Finding(name, "ok", str(shutil.which(programs[0])))
