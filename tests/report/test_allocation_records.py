"""The allocation report on records and books that are not what the project writes."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from asking import GPU, SMALL, changed, evidence_of, one_item, priced, spend

from rtshpc.core.records import read_json, write_json
from rtshpc.report.allocation import arms, demand, origin, scaling, storage
from rtshpc.report.allocation.evidence import NO_USAGE
from rtshpc.report.allocation.page import build
from rtshpc.report.page import render_html
from rtshpc.report.tables import scores


def test_a_record_that_holds_no_measurement_is_refused_by_name(study: Any) -> None:
    paths = study("torn", gpu=GPU, **SMALL)
    source = evidence_of(paths.root).runs[0].points[0].sources[0]
    file = paths.root.parent / source
    write_json(file, {**read_json(file), "results": {}})
    found = evidence_of(paths.root).runs[0]
    assert found.refused == ((source, "refused: it holds no measurement"),)
    assert source not in {name for point in found.points for name in point.sources}


def test_a_usage_file_that_no_usage_wrote_counts_as_none(run: Any) -> None:
    spoilt = [5, {"cells": 5}, {"cells": [1]}, {"cells": [], "reconciled": 7}]
    for told in [*spoilt, {"cells": [], "reconciled": {"attempts": 5}}]:
        write_json(run.paths.usage, told)
        found = evidence_of(run.paths.root)
        assert found.runs[0].usage is None, told
        assert found.refused == (
            (f"{run.paths.root.name}/usage.json", "refused: it is not what `launch usage` writes"),
        )
    odd = {"gpu_hours": float("nan"), "cpu_hours": "many", "node_hours": None}
    rows = [{"id": cell, "attempts": 1, **odd} for cell in run.cells]
    run.paths.usage.write_text(json.dumps({"cells": rows, "total": odd}))
    odd_ones = evidence_of(run.paths.root)
    assert all("do not tell" in line.reason for line in demand.lines(odd_ones)) and demand.spent_table(odd_ones)
    write_json(run.paths.usage, {"cells": [{"id": "x"}]})
    assert evidence_of(run.paths.root).runs[0].usage is not None


def test_what_cannot_be_read_is_named_with_its_reason_and_the_rest_is_told(run: Any, study: Any) -> None:
    spend(run)
    scaled, paths = study(**SMALL), run.paths
    strong = evidence_of(scaled.root).runs[0].points[0].sources[0]
    measured = paths.cell(run.find("measure", "rgb").id)
    trained, lost = paths.cell(run.find("pretrain", "nir").id), paths.cell(run.find("pretrain", "ndvi").id)
    stray = paths.cells / "strange"
    stray.mkdir()
    script = paths.logs / "pretrain" / "1_submission.sh"
    for file in (scaled.root.parent / strong, scaled.ledger, measured.record, trained.metrics, lost.failure, script):
        file.unlink(missing_ok=True)
        file.mkdir(parents=True)
    lost.record.write_text(lost.record.read_text()[:100])
    evidence = evidence_of(paths.root, scaled.root)
    why = {source.removeprefix(f"{paths.root.name}/"): reason for source, reason in evidence.refused}
    folder = "cannot be read: Is a directory"
    assert why == {
        strong: f"the record is not valid: record.json: {folder}",
        "study/ledger.jsonl": f"refused: it {folder}",
        f"cells/{measured.root.name}/record.json": f"the record is not valid: record.json: {folder}",
        f"cells/{trained.root.name}/record.json": f"the record is not valid: metrics.jsonl: {folder}",
        f"cells/{lost.root.name}/record.json": f"the record is not valid: failure.json: {folder}",
        "cells/strange": "refused: config.yaml is missing",
        "logs/pretrain/1_submission.sh": f"refused: it {folder}",
    }
    gaps = origin.gaps(evidence)
    assert sum("is not used" in gap for gap in gaps) == len(why)
    assert "T1 Strong scaling: fewer than 3 repeats at 1 (2)." in scaling.gaps(evidence)
    assert len(evidence.records.done) == len(run.cells) - 3 + len(evidence.of("scale")) - 1
    paths.usage.unlink()
    paths.usage.mkdir()
    assert (f"{paths.root.name}/usage.json", f"refused: it {folder}") in evidence_of(paths.root).refused
    scaled.plan.unlink()
    scaled.plan.mkdir()
    assert ("study/plan.json", f"refused: it {folder}") in evidence_of(scaled.root).refused


def test_a_run_that_is_given_twice_or_copied_is_counted_once(study: Any, tmp_path: Path) -> None:
    paths = study(gpu=GPU, **SMALL)
    alone, there = evidence_of(paths.root), tmp_path / "there"
    there.symlink_to(paths.root)
    again = evidence_of(paths.root, there, Path(os.path.relpath(paths.root)))
    assert again.rows == alone.rows and again.refused == ()
    copy = Path(shutil.copytree(paths.root, tmp_path / "copy"))
    both = evidence_of(paths.root, copy)
    assert both.rows == alone.rows and [run.name for run in both.runs] == ["study"]
    ((source, why),) = both.refused
    cells = len(alone.records.done)
    assert (source, why) == ("copy/cells", f"refused: {cells} of its {cells} records are copies of those of study")
    assert f"copy/cells is not used: {why}." in origin.gaps(both)


def test_of_a_copy_that_went_on_what_is_new_counts(study: Any, tmp_path: Path) -> None:
    paths = study(gpu=GPU, **SMALL)
    copy = Path(shutil.copytree(paths.root, tmp_path / "copy"))
    point = evidence_of(copy).runs[0].points[0]
    value = read_json(copy / point.sources[0].removeprefix("copy/"))
    write_json(copy / point.sources[0].removeprefix("copy/"), {**value, "started": "2026-09-22T08:00:00+00:00"})
    both = evidence_of(paths.root, copy)
    assert [row.repeats for row in both.rows][:2] == [4, 3]
    assert both.runs[1].points == (point,) and set(both.runs[1].jobs) <= {point.sources[0].split("/")[2]}
    assert "are copies of those of study" in both.refused[0][1]


def test_what_a_run_has_not_got_to_is_said(run: Any, study: Any, tmp_path: Path) -> None:
    run.paths.cell(run.find("evaluate", "rgb").id).record.unlink()
    run.fail(run.find("pretrain", "nir"), "out of memory")
    going, empty = evidence_of(run.paths.root), tmp_path / "empty"
    planned = sum(cell.stage != "preprocess" for cell in run.cells.values())
    assert (
        f"T0: 2 of the {planned} cells that run {run.paths.root.name} has planned have no record that can be used."
        in (origin.gaps(going))
    )
    assert f"T6: run {run.paths.root.name}: {NO_USAGE}." in origin.gaps(going)
    empty.mkdir()
    shutil.copy(run.paths.config, empty)
    nothing = evidence_of(empty)
    assert "T0: run empty holds no record that can be used." in origin.gaps(nothing)
    assert any("no run that is given has a measure cell" in entry.note for entry in arms.memory_words(nothing))
    assert render_html(build(nothing)).count("not measured") > 5


def test_jobs_whose_cores_are_not_all_known_cost_node_hours(run: Any) -> None:
    hours = spend(run, gpu_hours=0)
    told = read_json(run.paths.usage)
    for row in told["cells"]:
        row |= {"node_hours": 3.0, "cpu_hours": 5.0 if row["attempts"] > 1 else None, "attempts": 1}
    write_json(run.paths.usage, told)
    (line,) = demand.lines(evidence_of(run.paths.root, request=one_item(stage="measure", arm="")))
    assert (line.unit, line.cost) == ("node-hours", 3.0) and hours


def test_growth_is_never_worked_out_across_two_studies(run: Any, study: Any) -> None:
    spend(run)
    evidence = evidence_of(run.paths.root, study("one", gpu=GPU, **SMALL).root, site=priced())
    item = one_item(gpus=2, run=evidence.runs[0].name).items[0]
    assert demand.lines(replace(evidence, request=one_item(gpus=2, run=item.run)))[0].hours is not None
    apart = changed(evidence, lambda one: one.model_copy(update={"inputs": f"{one.count:012d}"}))
    line = demand.lines(replace(apart, request=one_item(gpus=2, run=item.run)))[0]
    assert line.hours is None and "T1 has no point at that count" in line.reason


def test_a_csv_tells_frozen_against_full_of_one_setting_from_another(run: Any) -> None:
    table = arms.arms_table(evidence_of(run.paths.root))
    pairs = scores.against_full(scores.scored(evidence_of(run.paths.root).runs[0].records))
    assert table is not None and pairs
    told = {row[0].text for row in table.rows}
    assert len(told) == len(pairs) and all(any(pair.first.setting in text for text in told) for pair in pairs)


def test_what_no_run_has_trained_or_measured_is_said_once_a_run_and_fills_no_table(run: Any) -> None:
    for cell in run.cells.values():
        if cell.stage in ("finetune", "measure"):
            run.paths.cell(cell.id).record.unlink()
    evidence = evidence_of(run.paths.root)
    assert arms.arms_table(evidence) is None
    told = [gap for gap in arms.gaps(evidence) if "not run" in gap]
    assert len(told) == 1 and told[0].startswith(f"T4: run {run.paths.root.name}: RGB, ")


def test_a_small_size_and_few_hours_are_never_shown_as_none(run: Any) -> None:
    run.change(run.find("gather"), lambda results: results.update(bytes=21_377))
    spend(run, gpu_hours=1e-5)
    evidence = evidence_of(run.paths.root)
    table, taken = storage.storage_table(evidence), demand.spent_table(evidence)
    assert next(row[4].text for row in table.rows if row[1].text == run.paths.root.name) == "0.0000214"
    assert taken is not None and float(taken.rows[0][3].text) > 0
