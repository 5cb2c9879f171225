"""The templates of slurm/, submitted as people submit them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ROOT, Login
from .lab import wait_for
from .test_watch import Watch

HAND = "my $HOME 'runs' \"x\""
"""A folder's name in which every careless quoting would fail."""


def submit(watch: Watch, folder: Path, *line: str, **given: str) -> str:
    """sbatch a template from a folder; the number of the job."""
    environment = watch.lab.environment | {"PYTHONPATH": str(ROOT), "RTSHPC_PYTHON": sys.executable} | given
    answer = subprocess.run(
        ["sbatch", "--parsable", "--mem=2G", "--cpus-per-task=1", *line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def ended(watch: Watch, job: str) -> str:
    """State of a job, once it is over."""
    states = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    wait_for(f"job {job} ends", lambda: watch.lab.job(job).get("JobState") not in states, 120)
    return watch.lab.job(job)["JobState"]


@pytest.mark.slow
def test_the_templates_make_shards_and_a_training_in_a_folder_of_any_name_and_are_safe_to_submit_again(
    login: Login, tmp_path: Path
) -> None:
    folder = tmp_path / HAND
    folder.mkdir()
    login.runs = folder / "runs"
    watch = Watch(login)
    assert login("sweep", "--prepare", "--until", "pretrain", "--set", "pretrain.epochs=1").returncode == 0
    run = str(login.runs / "tiny")
    cut = submit(watch, folder, "--array=0", str(ROOT / "slurm/preprocess.sbatch"), RTSHPC_RUN=run)
    index = submit(
        watch,
        folder,
        "--array=0",
        f"--dependency=afterok:{cut}",
        str(ROOT / "slurm/preprocess.sbatch"),
        RTSHPC_RUN=run,
        RTSHPC_STAGE="gather",
    )
    train = submit(
        watch,
        folder,
        "--array=0-1",
        f"--dependency=afterok:{index}",
        str(ROOT / "slurm/pretrain.sbatch"),
        RTSHPC_RUN=run,
    )
    assert ended(watch, f"{train}_0") == ended(watch, f"{train}_1") == "COMPLETED"
    assert watch.told("status")["finished"]
    assert watch.told("usage")["total"]["gpu_hours"] > 0
    again = submit(watch, folder, "--array=0-1", str(ROOT / "slurm/pretrain.sbatch"), RTSHPC_RUN=run)
    assert ended(watch, f"{again}_0") == "COMPLETED"
    assert "done before" in (folder / f"rtshpc-train-{again}_0.out").read_text()


@pytest.mark.full
def test_a_template_saves_on_slurms_warning_and_queues_its_own_element_again(login: Login) -> None:
    watch = Watch(login)
    sets = ["--set", "pretrain.epochs=20", "--set", "pretrain.checkpoint_seconds=600"]
    assert login("sweep", "--until", "gather", "--site", "local", *sets).returncode == 0
    assert login("sweep", "--prepare", "--until", "pretrain", *sets).returncode == 0
    script = str(ROOT / "slurm/pretrain.sbatch")
    job = submit(watch, login.runs.parent, "--array=0", script, RTSHPC_RUN=watch.run, RTSHPC_ATTEMPTS="1")
    cell = next(cell for cell in watch.told("status")["cells"] if cell["stage"] == "pretrain")
    folder = login.runs / "tiny" / "cells" / cell["id"]
    wait_for(
        "it trains", lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0, 60
    )
    watch.lab("scancel", "--batch", "--signal=USR1", f"{job}_0")
    wait_for("it is in the queue again", lambda: watch.lab.job(f"{job}_0").get("Restarts") == "1", 60)
    assert (folder / "checkpoints" / "last.pt").exists()
    assert json.loads((folder / "spent.jsonl").read_text().splitlines()[0])["how"] == "stopped"
    assert ended(watch, f"{job}_0") == "COMPLETED"
    record = json.loads((folder / "record.json").read_text())
    assert (record["attempts"], record["results"]["resumed"]) == (2, 1)


def weights(run: Path) -> dict[str, Any]:
    """Best weights of the run's first pretraining, and what its record says."""
    plan = json.loads((run / "plan.json").read_text())
    folder = run / "cells" / next(cell["id"] for cell in plan["cells"] if cell["stage"] == "pretrain")
    model = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["model"]
    return {"model": model, "record": json.loads((folder / "record.json").read_text())}


@pytest.mark.full
def test_two_nodes_with_two_tasks_each_train_to_the_weights_of_one_process(login: Login) -> None:
    sets = [
        "--set",
        "data.scenes.generated.scenes_per_site=14",
        "--set",
        "data.modalities={rgb: {bands: [red, green, blue]}}",
    ]
    sets += ["--set", "finetune.modalities=[rgb]", "--set", "pretrain.batch_size=4"]
    login.runs = login.runs.parent / HAND / "runs"
    alone, together = (["--set", f"name={name}", *sets] for name in ("alone", "together"))
    assert (answer := login("sweep", "--site", "local", "--until", "pretrain", *alone)).returncode == 0, answer.stderr
    assert login("sweep", "--site", "local", "--until", "gather", *together).returncode == 0
    assert login("sweep", "--prepare", "--until", "pretrain", *together).returncode == 0
    watch, run = Watch(login), login.runs / "together"
    wide = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", str(ROOT / "slurm/train_multinode.sbatch")]
    job = submit(watch, login.runs.parent, *wide, RTSHPC_RUN=str(run), RTSHPC_INTERFACE="lo")
    state = ended(watch, job)
    assert state == "COMPLETED", (login.runs.parent / f"rtshpc-multinode-{job}.out").read_text()
    one, four = weights(login.runs / "alone"), weights(run)
    assert one["model"].keys() == four["model"].keys()
    for name, tensor in one["model"].items():
        torch.testing.assert_close(four["model"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert one["record"]["results"]["steps"] == four["record"]["results"]["steps"] > 1
    assert four["record"]["attempts"] == 1
