"""Nodes that are broken: which errors are theirs, and what a task looks at before it works."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import BadNode, RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import append_line
from rtshpc.hpc.books import AVOIDED_HOURS, bad_nodes, note_bad_node
from rtshpc.hpc.executor import script
from rtshpc.hpc.site import gpu_driver, of_the_node, refuse_bad_node


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        RuntimeError("No CUDA GPUs are available"),
        RunError("a process of the training failed: RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable"),
        OSError(errno.EIO, "Input/output error", "/scratch/a"),
        OSError(errno.ESTALE, "Stale file handle"),
        BadNode("no GPU"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_of_a_gpu_driver_or_disk_is_the_nodes(error: Exception) -> None:
    assert of_the_node(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RunError("device = cuda: process 0 has no GPU, 0 visible; use device: auto or fewer processes"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EACCES, "Permission denied"),
    ],
    ids=str,
)
def test_what_would_happen_on_any_node_is_the_tasks(error: Exception) -> None:
    assert not of_the_node(error)


def test_a_task_looks_for_the_gpus_that_its_site_promises(programs: Any) -> None:
    site = SiteConfig(gpus=2, gpu_memory_gb=24)
    programs.says("nvidia-smi", "24564\n23028\n")
    refuse_bad_node(site, "pretrain")
    programs.says("nvidia-smi", "24564\n11264\n")
    with pytest.raises(BadNode, match=r"1 GPUs of site.gpu_memory_gb = 24 here, not 2: \[24564, 11264\] MiB"):
        refuse_bad_node(site, "pretrain")
    programs.says("nvidia-smi", "", 15, "GPU is lost")
    with pytest.raises(BadNode, match=r"0 GPUs .* not 2: GPU is lost"):
        refuse_bad_node(site, "measure")
    refuse_bad_node(site, "gather")
    refuse_bad_node(SiteConfig(gpus=2), "pretrain")


def test_without_a_driver_promised_gpus_are_a_bad_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadNode, match="nvidia-smi cannot be asked"):
        refuse_bad_node(SiteConfig(gpus=1, gpu_memory_gb=24), "pretrain")


def test_a_scratch_folder_must_be_named_and_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = SiteConfig(scratch="NODE_SCRATCH")
    monkeypatch.delenv("NODE_SCRATCH", raising=False)
    with pytest.raises(RunError, match=r"site.scratch = NODE_SCRATCH: no such environment variable on"):
        refuse_bad_node(site, "pretrain")
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path))
    refuse_bad_node(site, "pretrain")
    assert not os.listdir(tmp_path)
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path / "gone"))
    with pytest.raises(BadNode, match="gone: No such file or directory"):
        refuse_bad_node(site, "pretrain")


def test_new_jobs_avoid_a_broken_node_until_it_may_be_mended(
    programs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs.says("srun", "")
    site, paths = SiteConfig(executor="slurm"), RunPaths(tmp_path / "run")
    assert "exclude" not in script(site, paths, "pretrain", 1)
    paths.root.mkdir()
    for name in ("n7", "n3", "n7"):
        monkeypatch.setenv("SLURMD_NODENAME", name)
        note_bad_node(paths, "aa", f"{name} is broken: GPU is lost")
    append_line(paths.bad_nodes, {"node": "n1", "why": "old", "time": time.time() - AVOIDED_HOURS * 3600 - 1})
    assert bad_nodes(paths) == {"n3": "n3 is broken: GPU is lost", "n7": "n7 is broken: GPU is lost"}
    assert "#SBATCH --exclude=n3,n7\n" in script(site, paths, "pretrain", 1)


@pytest.mark.parametrize(
    ("told", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  12",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n", "575.57.08"),
        ("something else\n", None),
    ],
)
def test_the_driver_is_what_its_kernel_module_says(tmp_path: Path, told: str, version: str | None) -> None:
    (tmp_path / "version").write_text(told)
    assert gpu_driver(tmp_path / "version") == version
    assert gpu_driver(tmp_path / "none") is None
