"""The allocation report on records and books that are not what the project writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asking import GPU, SMALL, changed, evidence_of, one_item, priced, spend

from rtshpc.core.records import read_json, write_json
from rtshpc.report.allocation import arms, demand
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
        assert evidence_of(run.paths.root).runs[0].usage is None, told
    write_json(run.paths.usage, {"cells": [{"id": "x"}]})
    assert evidence_of(run.paths.root).runs[0].usage is not None


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
