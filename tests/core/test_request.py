"""Requests and programmes: what is shipped is whole, and a mistake in one is a line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtshpc.core.errors import ConfigError
from rtshpc.core.load import known_names, shipped_folder
from rtshpc.core.sizing.request import GENERIC, TABLES, TEXTS, load_programme, load_request


def written(folder: Path, kind: str, name: str, old: str, new: str) -> Path:
    """A shipped file with one change."""
    text = (shipped_folder("configs") / kind / f"{name}.yaml").read_text()
    assert old in text
    path = folder / "changed.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_example_and_every_programme_that_is_shipped_are_whole() -> None:
    assert [item.stage for item in load_request("example").items] == ["pretrain", "finetune", "finetune", "evaluate"]
    assert known_names("programme")
    for name in known_names("programme"):
        programme = load_programme(name)
        assert programme.name == name
        assert name == GENERIC or all(field.source and field.date for field in programme.fields)


def test_the_generic_programme_asks_for_every_table_and_text() -> None:
    asked = {name for field in load_programme(GENERIC).fields for name in field.answered_by}
    assert asked == {*TABLES, *TEXTS}


def test_a_programme_whose_fields_cite_no_source_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "programmes", GENERIC, "name: generic", "name: grand")
    with pytest.raises(ConfigError, match=r'fields.0.source = "" .* must say where and when grand demands "goals"'):
        load_programme(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("stage: pretrain", "stage: pretran", r'items.0.stage = "pretran" is unknown. .* Did you mean "pretrain"\?'),
        ("[1, 0, 0, 0]", "[1, 0]", r"items.0.periods = \[1.0, 0.0\] must have 4 weights, one a period"),
        ("[1, 0, 0, 0]", "[0, 0, 0, 0]", r"items.0.periods = .* must hold a weight above 0"),
        ("runs: 15", "runs: 0", r"items.0.runs = 0 must be at least 1"),
        ("name: full training", "name: scoring", r'"scoring" is given twice'),
        ("start: 2027-01", "start: 2027-13", r'start = "2027-13" must match'),
        ("runs: 15", "hours: 15", r"items.0.hours is no known key"),
        ("runs: 15", "runs: many", r'items.0.runs = "many" must be a whole number'),
        ("runs: 15", f"runs: 1{'0' * 400}", r"items.0.runs = 10+\.\.\. must be at most 1000000000"),
        ("runs: 15", "runs: 15\n    times: .inf", r"items.0.times = "),
        ("runs: 15", "runs: 15\n    times: -1", r"items.0.times = -1 must be more than 0"),
        ("runs: 15", "runs: 15\n    gpus: -4", r"items.0.gpus = -4 must be at least 0"),
        ("arm: full", "arm: ful", r'items.2.arm = "ful" is unknown.* Did you mean "full"\?'),
        ("[1, 0, 0, 0]", "[1, .nan, 0, 0]", r"items.0.periods"),
        ("[1, 0, 0, 0]", "[1, -1, 0, 0]", r"items.0.periods"),
        ("periods: 4", "periods: 0", r"periods = 0 must be at least 1"),
        ("periods: 4", "periods: four", r'periods = "four" must be a whole number'),
        ("period_months: 3", "period_months: 61", r"period_months = 61 must be at most 60"),
        ("gb: 800", "gb: -800", r"storage.0.gb = -800"),
        ("gb: 800", "gb: 1.0e+300", r"storage.0.gb = "),
        ("lifetime: project", "lifetime: ever", r'storage.0.lifetime = "ever" is unknown'),
        ("texts: {}", "texts: [goals]", r"texts = "),
        ("title: Pan-Arctic map of thaw slumps", "title: ''", r'title = "" must'),
        ("items:", "ittems:", r'ittems is no known key.* Did you mean "items"'),
    ],
)
def test_a_mistake_in_a_request_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        load_request(written(tmp_path, "requests", "example", old, new))
    assert "\n" not in str(told.value) and "changed.yaml" in str(told.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[T0]", "[T9]", r'fields.1.answered_by = "T9" is unknown'),
        ("answered_by: [checkpointing]", "words: 3", r"nobody would answer the field"),
        ("id: team", "id: goals", r'"goals" is given twice'),
    ],
)
def test_a_mistake_in_a_programme_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_programme(written(tmp_path, "programmes", GENERIC, old, new))
