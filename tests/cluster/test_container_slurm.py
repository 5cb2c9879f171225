"""Jobs of a real Slurm in a real image."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines

from .conftest import Login
from .images import BOUND, image_environment, thin_image
from .lab import wait_for

SETS = {"pretrain.modalities": "[rgb]", "pretrain.epochs": "12"}


def in_image(login: Login, monkeypatch: pytest.MonkeyPatch, **values: str) -> list[str]:
    """Options of a sweep whose tasks run in the thin image."""
    monkeypatch.setitem(login.environment, "PATH", image_environment()["PATH"])
    sets = {"site.image": str(thin_image()), "site.binds": json.dumps([BOUND]), **values}
    return ["--site", "lab", *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


def images(records: list[dict[str, Any]]) -> set[str]:
    return {record["environment"]["image"]["path"] for record in records}


@pytest.mark.slow
def test_jobs_run_in_the_image_and_one_that_slurm_stops_saves_and_goes_on(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = login("sweep", "--until", "pretrain", *in_image(login, monkeypatch, **SETS))
    assert answer.returncode == 0, answer.stderr
    paths = RunPaths(login.runs / "tiny")
    entry = next(entry for entry in read_lines(paths.ledger) if entry["stage"] == "pretrain")
    training = paths.cell(str(entry["cell"]))
    wait_for("it has a checkpoint", training.last_checkpoint.exists, 120)
    login.lab("scontrol", "requeue", str(entry["job"]))
    login.lab.wait_until_empty(240)
    records = [read_json(path) for path in paths.cells.glob("*/record.json")]
    assert {record["stage"] for record in records} == {"preprocess", "gather", "pretrain"}
    assert images(records) == {str(thin_image())}
    again = read_json(training.record)
    assert (again["attempts"], again["results"]["resumed"]) == (2, 1)


@pytest.mark.full
def test_a_sweep_goes_from_scenes_to_its_report_in_the_image(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = login("sweep", *in_image(login, monkeypatch))
    assert answer.returncode == 0, answer.stderr
    login.lab.wait_until_empty(400)
    paths = RunPaths(login.runs / "tiny")
    records = [read_json(path) for path in paths.cells.glob("*/record.json")]
    assert {"finetune", "evaluate", "measure", "summarise"} < {record["stage"] for record in records}
    assert len(records) == len(read_json(paths.plan)["cells"])
    assert images(records) == {str(thin_image())}
    assert paths.report_page.is_file()
