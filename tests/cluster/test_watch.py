"""What happened to a run, told on a real Slurm: waiting, running, cancelled, retried, paid for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Login
from .lab import NODES, Lab, missing, wait_for


class Watch:
    """Commands about one run, without its sweep."""

    def __init__(self, login: Login) -> None:
        self.login, self.lab, self.run = login, login.lab, str(login.runs / "tiny")

    def __call__(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rtshpc.launch", command, self.run, *arguments],
            cwd=ROOT,
            env=self.lab.environment | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def told(self, command: str, *arguments: str, **environment: str) -> Any:
        answer = self(command, *arguments, "--json", **environment)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def cell(self, name: str) -> dict[str, Any]:
        return next(cell for cell in self.told("status")["cells"] if cell["id"] == name)

    def states(self) -> dict[str, str]:
        return {cell["label"]: cell["state"] for cell in self.told("status")["cells"]}


@pytest.fixture
def watch(login: Login) -> Watch:
    return Watch(login)


@pytest.fixture
def full(lab: Lab) -> Generator[None]:
    """No node takes a job while the test goes on; what other tests left behind is over."""
    lab.wait_until_empty(60)
    lab("scontrol", "update", f"NodeName={','.join(NODES)}", "State=DRAIN", "Reason=test")
    yield
    lab("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")


def without(folder: Path, *programs: str) -> str:
    """A PATH on which only these of Slurm's programs are."""
    folder.mkdir(exist_ok=True)
    for name in programs:
        found = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("full")
def test_waiting_cells_say_why_a_second_launcher_leaves_them_and_cancel_takes_along_what_builds_on_them(
    watch: Watch, tmp_path: Path
) -> None:
    sent = watch.login("sweep", "--site", "lab")
    assert sent.returncode == 0, sent.stderr
    cells = watch.told("status")["cells"]
    assert {cell["state"] for cell in cells} == {"submitted"}
    gather = next(cell["id"] for cell in cells if cell["stage"] == "gather")
    dependency = "waits for the cells it builds on (Dependency)"
    # Until Slurm's scheduler has looked at it, the reason is that no node takes a job.
    wait_for("Slurm says what gather waits for", lambda: dependency in watch.cell(gather)["reason"], 60)
    assert all(cell["limit_seconds"] == 600 and cell["job"] for cell in cells)
    again = watch.login("sweep", "--site", "lab")
    assert f"0 cells submitted, {len(cells)} are with Slurm already" in again.stdout
    assert len(watch.lab.queue()) == len(cells)

    silent = watch.told("status", PATH=without(tmp_path / "bin"))
    assert silent["slurm"] == "silent" and {cell["state"] for cell in silent["cells"]} == {"unknown"}

    trained = next(cell for cell in cells if cell["stage"] == "pretrain")
    answer = watch("cancel", trained["id"])
    assert f"job {trained['job']} cancelled" in answer.stdout and "with it goes evaluate" in answer.stdout
    assert watch.states()[trained["label"]] == "cancelled"
    lost = [label for label, state in watch.states().items() if state == "blocked"]
    assert any(label.startswith("finetune") for label in lost) and any(label.startswith("evaluate") for label in lost)
    refused = watch("retry", "--oom")
    assert refused.returncode == 2 and "no cell that could run again is oom" in refused.stderr
    back = watch("retry", "--failed")
    # With the summary, which has to wait for them.
    assert f"{2 + len(lost)} cells submitted" in back.stdout, back.stdout + back.stderr
    assert set(watch.states().values()) == {"submitted"}
    assert f"{len(cells) + 1} jobs cancelled" in watch("cancel").stdout
    wait_for("all are gone", lambda: not watch.lab.queue())
    assert set(watch.states().values()) <= {"cancelled", "blocked"}


@pytest.mark.slow
def test_a_run_is_told_and_paid_for_without_accounting(watch: Watch) -> None:
    assert watch.login("sweep", "--site", "lab", "--until", "gather").returncode == 0
    follow = watch("logs", "gather", "-f")
    assert follow.returncode == 0 and "gather done in" in follow.stdout
    watch.lab.wait_until_empty(60)
    assert watch.told("status")["finished"]
    paid = watch.told("usage")
    assert (paid["source"], paid["total"]["attempts"]) == ("own books", 2)
    assert 0 < paid["total"]["cpu_hours"] == pytest.approx(paid["by_end"]["done"])
    assert all(stage["memory_peak_bytes"] > 1 << 24 and stage["cpu_share"] > 0 for stage in paid["stages"])
    assert paid["total"]["memory_asked_bytes"] == 3 << 30
    assert "Slurm's accounting" not in watch("usage").stdout


@pytest.mark.slow
def test_the_doctor_finds_a_real_cluster_well_and_names_what_it_would_refuse(watch: Watch, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rtshpc.launch", "doctor", "--runs", str(tmp_path), "--json", "--site"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("{base: lab, partition: a100, gpu_type: a5000, minutes: 2000}")
    found: list[dict[str, str]] = []
    for site in ("lab", str(bad)):
        environment = watch.lab.environment | {"PYTHONPATH": str(ROOT)}
        answer = subprocess.run([*line, site], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found.append({one["name"]: f"{one['state']} {one['found']}" for one in json.loads(answer.stdout)})
        assert answer.returncode == (site != "lab")
    good, refused = found
    assert not [one for one in good.values() if one.startswith("bad")]
    assert good["request of pretrain"].startswith("ok accepted: would start at")
    assert good["cluster clock"] == good["file clock"] == "ok agrees with this node's"
    assert refused["time limit"] == "bad site.minutes = 2000, a100 allows 1440"
    assert refused["nodes"].startswith("bad none of 2 in a100 can hold a task: GPUs gpu:a100:4")
    assert refused["request of pretrain"].startswith("bad refused: ")


@pytest.fixture
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lab]:
    """A cluster with slurmdbd, so that sacct has something to tell."""
    if lacking := missing(accounting=True):
        pytest.skip(lacking)
    cluster = Lab(tmp_path_factory.mktemp("accounted"), accounting=True)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.mark.full
def test_with_accounting_every_attempt_is_paid_for_as_slurm_counts_it(accounted: Lab, tmp_path: Path) -> None:
    watch = Watch(Login(accounted, tmp_path))
    answer = watch.login("sweep", "--site", "lab", "--until", "pretrain", "--set", "pretrain.epochs=40")
    assert answer.returncode == 0, answer.stderr
    cells = watch.told("status")["cells"]
    cell = next(one for one in cells if one["stage"] == "pretrain")
    wait_for("it trains", lambda: bool(watch.cell(cell["id"])["metric"]), 90)
    accounted("scontrol", "requeue", cell["job"])
    accounted.wait_until_empty(180)
    wait_for("sacct knows the end", lambda: watch.told("usage")["by_end"]["running"] == 0, 30)
    paid = watch.told("usage")
    trained = {one["id"]: one for one in paid["cells"]}[cell["id"]]
    assert (paid["source"], trained["attempts"]) == ("sacct", 2)
    assert trained["gpu_hours"] > 0 and paid["by_end"]["interrupted"] > 0
    both = paid["reconciled"]
    attempts = [both["sacct"]["attempts"], both["own"]["attempts"], paid["total"]["attempts"]]
    assert attempts == [len(cells) + 1] * 3  # one was requeued
    # Our books begin when Python has started, and end a little before Slurm does.
    assert 0 < both["difference"]["gpu_hours"] < 40 / 3600 * 4
    for key in ("gpu_hours", "node_hours", "cpu_hours"):
        assert sum(row[key] for row in both["attempts"]) == pytest.approx(both["difference"][key], abs=1e-4)
    forgotten = watch.told("usage", PATH=without(tmp_path / "bin", "squeue"))
    assert forgotten["total"] == paid["total"]  # usage.json has kept what sacct said
    assert trained["memory_peak_bytes"] > 1 << 27 and trained["limit_seconds"] == 600
    assert "by Slurm's accounting" in watch("usage").stdout
