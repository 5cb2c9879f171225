from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RunError
from rtshpc.core.load import load_run, load_site, write_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.hpc.container import command, image_facts
from rtshpc.hpc.executor import launcher_lives, launcher_token, slurm_states, submit, task_command
from rtshpc.hpc.site import request

SBATCH = """#!/bin/sh
cp "$1" "$0.seen.$(ls "$0".seen.* 2>/dev/null | wc -l)"
echo "Submitted batch job 4$(ls "$0".seen.* | wc -l)"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs by the names of Slurm's that keep what they are given: what would be submitted can be read."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": "#!/bin/sh\n", "squeue": "#!/bin/sh\necho '41_0 RUNNING'\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_an_array_carries_the_sites_request_and_its_dependency(slurm: Path, tmp_path: Path) -> None:
    site = load_site("slurm-a5000", ["account=geo", "max_jobs=2", "constraint=a5000"])
    jobs = submit(site, RunPaths(tmp_path / "run"), "pretrain", ["aa", "bb", "cc"], after=["7", "8_1"])
    assert [job.id for job in jobs] == ["41_0", "41_1", "41_2"]
    text = (slurm / "sbatch.seen.0").read_text()
    for line in (
        "--account=geo",
        "--array=0-2%2",
        "--constraint=a5000",
        "--cpus-per-task=8",
        "--dependency=afterok:7:8_1",
        "--gpus-per-node=1",
        "--job-name=rtshpc-pretrain",
        "--kill-on-invalid-dep=yes",
        "--mem=32GB",
        "--partition=a5000",
        "--time=480",
    ):
        assert f"#SBATCH {line}\n" in text
    assert jobs[1].log.parent == tmp_path / "run" / "logs" / "pretrain"


def test_a_summary_waits_for_the_end_of_all_and_asks_for_no_gpu(slurm: Path, tmp_path: Path) -> None:
    submit(load_site("slurm-a100"), RunPaths(tmp_path / "run"), "summarise", ["aa"], after=["7"], any_end=True)
    text = (slurm / "sbatch.seen.0").read_text()
    assert "#SBATCH --dependency=afterany:7\n" in text
    assert "gpus" not in text


def test_jobs_that_slurm_holds_are_told_from_those_it_forgot(slurm: Path) -> None:
    assert slurm_states(["41_0", "41_1"]) == {"41_0": "RUNNING"}
    assert slurm_states([]) == {}


def test_without_slurm_a_slurm_site_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="site slurm-a100: executor = slurm cannot be used here"):
        submit(load_site("slurm-a100"), RunPaths(tmp_path / "run"), "gather", ["aa"])
    assert slurm_states(["1"]) is None


def test_a_task_is_a_line_that_anyone_can_type(tmp_path: Path) -> None:
    write_run_config(tmp_path / "config.yaml", load_run("demo"), {})
    line = task_command("pretrain", str(tmp_path), "abc")
    assert line == [
        sys.executable, "-u", "-m", "rtshpc.stages", "pretrain", "--run-dir", str(tmp_path), "--task", "abc",
    ]  # fmt: skip


def test_the_container_line_binds_what_the_task_reads(tmp_path: Path) -> None:
    site = SiteConfig(image="/images/r.sif", gpus=1, binds=("/scratch:/scratch:ro",))
    line = command(site, ["-m", "x"], (tmp_path, tmp_path, Path.cwd()), "python3")
    assert line[:3] == ["apptainer", "exec", "--nv"]
    binds = [line[index + 1] for index, word in enumerate(line) if word == "--bind"]
    assert binds == [f"{tmp_path}:{tmp_path}", f"{Path.cwd()}:{Path.cwd()}", "/scratch:/scratch:ro"]
    assert line[-4:] == ["/images/r.sif", "python", "-m", "x"]
    assert command(SiteConfig(), ["-m", "x"], (tmp_path,), "python3") == ["python3", "-m", "x"]


def test_an_images_hash_is_taken_anew_only_when_it_changed(tmp_path: Path) -> None:
    image = tmp_path / "r.sif"
    image.write_bytes(b"one")
    facts = image_facts(str(image))
    assert len(facts["sha256"]) == 64
    assert image_facts(str(image), {**facts, "sha256": "kept"})["sha256"] == "kept"
    image.write_bytes(b"other")
    assert image_facts(str(image), facts)["sha256"] != facts["sha256"]
    assert image_facts("") == {}


def test_only_stages_that_use_a_gpu_ask_for_one() -> None:
    site = SiteConfig(gpus=2)
    asked = {stage: request(site, stage).gpus for stage in ("preprocess", "gather", "pretrain", "measure", "summarise")}
    assert asked == {"preprocess": 0, "gather": 0, "pretrain": 2, "measure": 2, "summarise": 0}


def test_a_dead_launcher_is_told_from_one_that_lives() -> None:
    assert launcher_lives(launcher_token())
    assert not launcher_lives(f"{os.getpid()}:1")
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    token = f"{process.pid}:" + Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert launcher_lives(token) or process.poll() is not None
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not launcher_lives(token)
    process.wait()


SUBMITTING = """
import os, signal, subprocess, sys
from rtshpc.hpc.executor import shielded

signal.signal(signal.SIGINT, signal.default_int_handler)  # not so where a shell started us in the background
try:
    with shielded(True):
        os.kill(os.getpid(), signal.SIGINT)
        child = "import signal; print('ignored', signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)"
        subprocess.run([sys.executable, "-c", child], check=True)
    print("lost")
except KeyboardInterrupt:
    print("heard")
"""


def test_a_ctrl_c_while_tasks_are_submitted_is_heard_afterwards_and_not_by_the_tasks() -> None:
    line = [sys.executable, "-c", SUBMITTING]  # as in a launcher, there are no threads that could take the signal
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["ignored True", "heard"], done.stderr
