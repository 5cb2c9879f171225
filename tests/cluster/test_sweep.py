"""A sweep on a real Slurm, as a user runs it from a login node."""

from __future__ import annotations

import json

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_lines

from .conftest import Login


@pytest.mark.full
def test_a_sweep_goes_through_slurm_from_scenes_to_report_and_a_second_one_finds_nothing_to_do(login: Login) -> None:
    answer = login("sweep", "--site", "lab")
    assert answer.returncode == 0, answer.stderr
    login.lab.wait_until_empty(240)
    facts = json.loads(login("plan", "--site", "lab", "--json").stdout)
    paths = RunPaths(login.runs / "tiny")
    assert paths.report_page.is_file()
    assert {cell["label"]: cell["done"] for cell in facts["cells"] if cell["stage"] != "summarise"} == {
        cell["label"]: True for cell in facts["cells"] if cell["stage"] != "summarise"
    }
    assert {entry["executor"] for entry in read_lines(paths.ledger)} == {"slurm"}
    assert "nothing to do" in login("sweep", "--site", "lab").stdout
