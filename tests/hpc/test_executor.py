from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.load import load_run, load_site, write_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.hpc.executor import launcher_lives, launcher_token, script, slurm_states, submit, task_command
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
    for name, text in {
        "sbatch": SBATCH,
        "srun": "#!/bin/sh\n",
        "squeue": "#!/bin/sh\necho '41_0|RUNNING|None|N/A|0:01|1:00|n'\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_an_array_carries_the_sites_request_and_its_dependency(slurm: Path, tmp_path: Path) -> None:
    site = load_site("slurm-a5000", ["account=geo", "max_jobs=2", "constraint=a5000"])
    jobs = submit(site, RunPaths(tmp_path / "run"), "pretrain", ["aa", "bb", "cc"], "afterok:7:8_1")
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
        "--requeue",
        "--signal=USR2@120",
        "--time=480",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "srun --unbuffered" in text and "--cpus-per-task=8 " in text
    assert "wckey" not in text and "module" not in text and "SOCKET_IFNAME" not in text
    assert jobs[1].log.parent == tmp_path / "run" / "logs" / "pretrain"


def test_a_site_names_gpus_keys_modules_and_interfaces_in_its_own_words(slurm: Path, tmp_path: Path) -> None:
    plain = load_site("slurm-a100", ["gpu_type=a100", "gpus=2"])
    own = load_site(
        "slurm-a100",
        [
            "gpu_type=a100",
            "gres=gres",
            "wckey=k",
            "modules=[apptainer, my cuda]",
            "network_interface=ib0",
            "requeue=never",
        ],
    )
    paths = RunPaths(tmp_path / "run")
    assert "#SBATCH --gpus-per-node=a100:2\n" in script(plain, paths, "pretrain", 1)
    text = script(own, paths, "pretrain", 1)
    for line in (
        "#SBATCH --gres=gpu:a100:1",
        "#SBATCH --wckey=k",
        "#SBATCH --no-requeue",
        "module load apptainer 'my cuda' || exit",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
    ):
        assert f"{line}\n" in text
    assert "gpus-per-node" not in text
    assert not {"--gres", "--gpus"} & {line.split("=")[0][8:] for line in script(own, paths, "gather", 1).splitlines()}
    assert not paths.root.exists()


def test_a_training_over_nodes_has_a_task_for_each_gpu_and_other_stages_one(slurm: Path, tmp_path: Path) -> None:
    site = load_site("slurm-a5000", ["nodes=2", "gpus=4"])
    text = script(site, RunPaths(tmp_path / "run"), "finetune", 1)
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=128GB"):
        assert f"#SBATCH {line}\n" in text
    assert "--kill-on-bad-exit=1" in text
    alone = script(site, RunPaths(tmp_path / "run"), "evaluate", 1)
    for line in ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=4", "--mem=32GB"):
        assert f"#SBATCH {line}\n" in alone
    assert "--kill-on-bad-exit" not in alone
    with pytest.raises(ConfigError, match=r"nodes = 2 needs executor: slurm"):
        load_site("local", ["nodes=2"])


def test_a_training_on_cpus_has_as_many_tasks_a_node_as_the_site_says(slurm: Path, tmp_path: Path) -> None:
    for nodes in (1, 2):
        site = load_site("slurm-a5000", [f"nodes={nodes}", "gpus=0", "tasks_per_node=2"])
        text = script(site, RunPaths(tmp_path / "run"), "pretrain", 1)
        for line in (f"--nodes={nodes}", "--ntasks-per-node=2", "--cpus-per-task=8", "--mem=64GB"):
            assert f"#SBATCH {line}\n" in text
        assert "--kill-on-bad-exit=1" in text and "gpus" not in text
        assert "#SBATCH --ntasks-per-node=1\n" in script(site, RunPaths(tmp_path / "run"), "evaluate", 1)


def test_a_line_break_in_a_sites_words_is_refused() -> None:
    for key in ("account", "partition", "qos", "constraint", "wckey", "network_interface"):
        with pytest.raises(ConfigError, match=rf"{key} = .* must match"):
            load_site("slurm-a100", [f'{key}="a\\nrm"'])
    with pytest.raises(ConfigError, match="must match"):
        load_site("slurm-a100", ['modules=["a\\nrm"]'])


def test_jobs_that_slurm_refuses_are_one_line(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\necho more >&2\nexit 1\n")
    with pytest.raises(RunError, match=r"site slurm-a100: sbatch refuses gather: .*invalid account more"):
        submit(load_site("slurm-a100"), RunPaths(tmp_path / "run"), "gather", ["aa"])


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
