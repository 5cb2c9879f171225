"""A sweep whose detector needs a library that is not here is refused before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rtshpc.core.errors import MissingExtra
from rtshpc.core.load import load_run
from rtshpc.launch.plan import make_plan

from .conftest import Launcher

SET = "model.engine=detectron2"


def test_a_plan_with_detectron2_is_refused_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detectron2" else find(name))
    with pytest.raises(MissingExtra, match=r"docs/detectron2\.md"):
        make_plan(load_run(launcher.sweep, [SET]), launcher.runs)
    # Shards need no detector; and what an image holds is not known here.
    assert make_plan(load_run(launcher.sweep, [SET]), launcher.runs, "preprocess").todo
    assert make_plan(load_run(launcher.sweep, [SET, "site.image=rtshpc.sif"]), launcher.runs).todo
    assert make_plan(load_run(launcher.sweep), launcher.runs).todo


def test_engines_make_different_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    ours, theirs = (make_plan(load_run(launcher.sweep, sets), launcher.runs) for sets in ([], [SET]))
    for stage, same in (("gather", True), ("pretrain", False), ("finetune", False), ("measure", False)):
        ids = [{cell.id for cell in plan.cells if cell.stage == stage} for plan in (ours, theirs)]
        assert ids[0] and (ids[0] == ids[1]) is same
        assert same or not ids[0] & ids[1]
