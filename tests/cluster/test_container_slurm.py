"""Jobs of a real Slurm in a real image."""

from __future__ import annotations

import json

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines

from .conftest import Login
from .images import BOUND, image_environment, thin_image
from .lab import wait_for

SETS = {"pretrain.modalities": "[rgb]", "pretrain.epochs": "12"}


@pytest.mark.slow
def test_jobs_run_in_the_image_and_one_that_slurm_stops_saves_and_goes_on(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = thin_image()
    monkeypatch.setitem(login.environment, "PATH", image_environment()["PATH"])
    values = {"site.image": str(image), "site.binds": json.dumps([BOUND]), **SETS}
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    answer = login("sweep", "--site", "lab", "--until", "pretrain", *sets)
    assert answer.returncode == 0, answer.stderr
    paths = RunPaths(login.runs / "tiny")
    entry = next(entry for entry in read_lines(paths.ledger) if entry["stage"] == "pretrain")
    training = paths.cell(str(entry["cell"]))
    wait_for("it has a checkpoint", training.last_checkpoint.exists, 120)
    login.lab("scontrol", "requeue", str(entry["job"]))
    login.lab.wait_until_empty(240)
    records = [read_json(path) for path in paths.cells.glob("*/record.json")]
    assert {record["stage"] for record in records} == {"preprocess", "gather", "pretrain"}
    assert {record["environment"]["image"]["path"] for record in records} == {str(image)}
    again = read_json(training.record)
    assert (again["attempts"], again["results"]["resumed"]) == (2, 1)
