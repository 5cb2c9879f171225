"""The allocation report says what the records hold and what follows for the request, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from asking import GPU, SMALL, WHOLE, asked, changed, evidence_of, on_gpu, one_item, priced, programme_file, spend
from hypothesis import given, strategies as st

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.paths import AllocationPaths, RunPaths
from rtshpc.core.records import read_json, write_json
from rtshpc.core.sizing.request import AllocationRequest, load_programme
from rtshpc.report.allocation import arms, demand, origin, page, scaling, storage, texts
from rtshpc.report.allocation.evidence import Evidence
from rtshpc.report.allocation.page import build, write_allocation
from rtshpc.report.entries import Table
from rtshpc.report.page import flat, render_html

needs_printer = pytest.mark.skipif(
    page.printer() is None, reason="needs WeasyPrint and Pango (Debian: apt-get install libpangoft2-1.0-0)"
)
_READ: dict[str, Evidence] = {}
NUMBER = re.compile(r'<(?:td|dd) class="number[^"]*"(?P<source> data-source="[^"]*")?')


@pytest.fixture
def no_printer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printing takes seconds: only tests of the PDF print."""
    monkeypatch.setitem(sys.modules, "weasyprint", None)


@pytest.fixture
def whole(study: Any) -> Evidence:
    """Of a study on a GPU that leaves nothing out; read once."""
    if "whole" not in _READ:
        _READ["whole"] = evidence_of(study(gpu=GPU, **WHOLE).root)
    return _READ["whole"]


@pytest.fixture
def own(run: Any) -> Evidence:
    """Of a sweep and what it spent, at a site with a price; read once."""
    if "own" not in _READ:
        spend(run)
        _READ["own"] = evidence_of(run.paths.root, site=priced())
    return _READ["own"]


def asking_for(evidence: Evidence, request: AllocationRequest, site: SiteConfig | None = None) -> demand.Line:
    """The one line of a request on grounds of this evidence."""
    (line,) = demand.lines(replace(evidence, request=request, site=site or evidence.site))
    return line


def column(table: Table, name: str) -> list[Any]:
    """Values of a column, words where there is none."""
    place = table.columns.index(name)
    return [row[place].value if row[place].value is not None else row[place].text for row in table.rows]


def held(root: Path, source: str) -> Any:
    """What a source of the page points at, below the folder of all runs."""
    name, _, key = source.partition("#")
    value: Any = read_json(root / name)
    assert value is not None, source
    for part in filter(None, key.split(".")):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def test_every_number_names_where_it_comes_from_and_every_row_its_job(run: Any, study: Any) -> None:
    spend(run)
    paths = study(**SMALL)
    moved = Path(shutil.copytree(paths.root, run.paths.root.parent / "scaling"))
    content = build(evidence_of(run.paths.root, moved))
    numbers = 0
    for part in content.parts:
        for table in part.tables:
            for row in table.rows:
                for entry in row:
                    if entry.kind != "number" or table.name == "jobs":
                        continue
                    numbers += 1
                    assert entry.source, f"{table.name}: {entry.text}"
                    for source in entry.source.split(" | "):
                        if not source.startswith("request.yaml"):
                            assert held(moved.parent, source) is not None
            if table.columns[-1] == "Jobs" and table.name != "T5":
                assert all(row[-1].text not in ("", "–") for row in table.rows), table.name
    assert numbers > 150
    page_text = render_html(content)
    assert all(found["source"] for found in NUMBER.finditer(page_text))


def test_scaling_is_what_the_records_say(study: Any) -> None:
    paths = study(gpus=[1, 2, 4], concurrency=[1], tasks=[1])
    evidence = evidence_of(paths.root)
    rates: dict[int, list[float]] = {}
    jobs: dict[int, set[str]] = {}
    for folder in paths.cells.iterdir():
        found = read_json(folder / "record.json")
        if found and found["results"]["kind"] == "strong":
            rates.setdefault(found["results"]["count"], []).append(found["results"]["rate"])
            jobs.setdefault(found["results"]["count"], set()).add(found["results"]["job"])
    table = scaling.scaling_table(evidence, scaling.KINDS[0])
    assert table is not None
    for count, rate, speed_up, share, own in zip(
        *(column(table, name) for name in ("Processes", "Median rate", "Speed-up", "Efficiency", "Jobs")), strict=True
    ):
        assert rate == pytest.approx(median(rates[count]))
        assert speed_up == pytest.approx(median(rates[count]) / median(rates[1]))
        assert share == pytest.approx(speed_up / count)
        assert set(own.split(", ")) == jobs[count]
    assert any("no figure of this table is a GPU's" in note for note in table.notes)


@given(
    whole=st.lists(st.floats(0.01, 1e4), max_size=8),
    others=st.lists(st.tuples(st.floats(0.01, 1e4), st.booleans()), max_size=8),
)
def test_cost_times_rerun_factor_is_what_a_result_has_taken(
    whole: list[float], others: list[tuple[float, bool]]
) -> None:
    done = len(whole) + sum(told for _, told in others)
    hours = whole + [hour for hour, _ in others]
    if not done:
        return
    cost, rerun = demand.cost_and_rerun(hours, whole, done)
    assert cost * rerun * done == pytest.approx(sum(hours))
    if whole and not others:
        assert cost == pytest.approx(fmean(whole)) and rerun == pytest.approx(1)


def test_the_request_is_cost_times_reruns_times_jobs(run: Any, own: Evidence) -> None:
    hours = spend(run)
    line = asking_for(own, one_item(runs=10))
    mine = [hours[cell.id] for cell in run.cells.values() if (cell.stage, cell.arm) == ("finetune", "full")]
    assert line.hours == pytest.approx(10 * sum(mine) / len(mine))
    table = demand.request_table(own, (line,))
    assert column(table, "Charge, credits")[0] == pytest.approx(2 * (line.hours or 0))
    assert asking_for(own, one_item(runs=10, times=2)).hours == pytest.approx(2 * (line.hours or 0))


def test_periods_share_the_request_out_and_end_at_its_sum(own: Evidence) -> None:
    evidence = replace(own, request=asked(start="2026-11", periods=4, period_months=3))
    found = demand.lines(evidence)
    table = demand.period_table(evidence, found)
    assert table is not None
    assert column(table, "Period") == [
        "2026-11 to 2027-01",
        "2027-02 to 2027-04",
        "2027-05 to 2027-07",
        "2027-08 to 2027-10",
    ]
    total = sum(line.hours or 0 for line in found)
    assert column(table, "GPU-hours, sum")[-1] == pytest.approx(total)
    assert sum(column(table, "GPU-hours")) == pytest.approx(total)
    pretraining = next(line for line in found if line.item.stage == "pretrain")
    assert column(table, "GPU-hours")[0] > (pretraining.hours or 0) > 0


def test_a_node_s_price_is_charged_by_the_share_of_it_that_a_job_holds(own: Evidence) -> None:
    site = priced(charge_per_gpu_hour=0, charge_per_node_hour=8.0, node_gpus=4, node_cpus=64, cpus=32, gpus=1)
    assert asking_for(own, one_item(), site).price == pytest.approx(8.0 * 32 / 64)


def test_hours_of_another_site_count_only_by_the_asked_site_s_own_word(run: Any) -> None:
    spend(run)
    on_gpu(run)
    evidence = evidence_of(run.paths.root, site=priced())
    line = asking_for(evidence, one_item(), priced(name="big"))
    assert line.hours is None and "big names no gpu_equivalents" in line.reason
    site = priced(name="big", gpu_equivalents={GPU: 0.5})
    known = asking_for(evidence, one_item(), site)
    assert known.hours == pytest.approx(0.5 * (asking_for(evidence, one_item()).hours or 0))
    assert any("gpu_equivalents" in gap for gap in demand.gaps((known,), site))


def test_more_gpus_a_job_cost_what_strong_scaling_has_measured(own: Evidence, whole: Evidence) -> None:
    both = replace(own, runs=(*own.runs, *whole.runs))
    rows = {row.count: row for row in scaling.of_kind(whole, "strong")}
    plain, four, sixteen = (asking_for(both, one_item(gpus=gpus, run="test-run")) for gpus in (0, 4, 16))
    assert four.hours == pytest.approx((plain.hours or 0) / rows[4].efficiency)
    assert sixteen.hours is None and "T1 has no point at that count" in sixteen.reason


def test_without_usage_nothing_is_asked_and_the_reason_is_said(own: Evidence) -> None:
    line = asking_for(replace(own, runs=(replace(own.runs[0], usage=None),)), one_item())
    assert line.hours is None and "no usage.json" in line.reason
    assert any("is not worked out" in gap for gap in demand.gaps((line,), priced()))


def test_a_whole_study_on_a_gpu_leaves_no_gap_in_scaling(whole: Evidence) -> None:
    assert scaling.gaps(whole) == [] and scaling.without_gpu(whole) == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda one: None if one.count == 8 else one, "T1 Strong scaling: 3 of at least 4 counts were measured."),
        (
            lambda one: None if (one.kind, one.repeat) == ("weak", 2) else one,
            "T2 Weak scaling: fewer than 3 repeats at 1 (2), 2 (2), 4 (2), 8 (2).",
        ),
        (
            lambda one: None if (one.kind, one.count, one.repeat) == ("strong", 8, 1) else one,
            "T1 Strong scaling: fewer than 3 repeats at 8 (2).",
        ),
        (
            lambda one: None if one.kind == "array" else one,
            "T3 Array throughput: nothing was measured (`launch scale`).",
        ),
        (
            lambda one: one.model_copy(update={"inputs": "0" * 12}) if one.repeat else one,
            "T1 Strong scaling: mixed inputs: the points are of 2 data sets, models or trainings.",
        ),
        (
            lambda one: one.model_copy(update={"gpu": "NVIDIA A100"}) if one.count == 1 else one,
            f"T1 Strong scaling: mixed devices: NVIDIA A100, {GPU}.",
        ),
    ],
)
def test_a_study_that_is_not_whole_is_incomplete_and_says_why(whole: Evidence, edit: Any, said: str) -> None:
    assert said in scaling.gaps(changed(whole, edit))


def test_rows_of_different_inputs_are_never_one_curve(whole: Evidence) -> None:
    mixed = changed(
        whole, lambda one: one.model_copy(update={"inputs": "0" * 12, "rate": one.rate * 7}) if one.count > 1 else one
    )
    table = scaling.scaling_table(mixed, scaling.KINDS[0])
    assert table is not None and table.columns[-2] == "Inputs"
    assert column(table, "Speed-up")[0] == 1 and max(column(table, "Efficiency")) <= 1.0001


def test_extrapolation_and_changed_code_are_named(run: Any, own: Evidence) -> None:
    found = demand.gaps((asking_for(own, one_item(times=3)),), priced())
    assert found == ["T6: extrapolation in “training”: a job of 3 times the measured work."]
    path = run.paths.cell(next(iter(run.cells))).record
    value = read_json(path)
    value["environment"]["commit"] = "c0ffee1-dirty"
    write_json(path, value)
    found = origin.gaps(evidence_of(run.paths.root))
    assert any("uncommitted changes: c0ffee1-dirty" in gap for gap in found)
    assert any("2 versions of the code" in gap for gap in found)


def test_figures_of_a_fake_driver_are_refused_by_name(run: Any, study: Any, no_printer: None) -> None:
    spend(run)
    cell = run.find("measure", "rgb", "ndvi", "full")
    run.change(cell, lambda results: results.update(backend="fake", step_seconds=987.654))
    scaled = study(gpu=GPU, **SMALL)
    for folder in scaled.cells.iterdir():
        value = read_json(folder / "record.json")
        if value:
            value["results"].update(device="fake", rate=876.543)
            write_json(folder / "record.json", value)
    content = build(evidence_of(run.paths.root, scaled.root))
    shown = render_html(content)
    assert "987.6" not in shown and "876.5" not in shown
    (refused,) = [table for part in content.parts for table in part.tables if table.name == "refused"]
    named = column(refused, "Record")
    assert any(cell.id in name for name in named) and any(name.startswith("study/") for name in named)
    assert all("fake" in why for why in column(refused, "Why"))
    assert any("T1 Strong scaling: nothing was measured" in gap for gap in scaling.gaps(evidence_of(scaled.root)))


def test_the_same_records_give_the_same_bytes(study: Any, tmp_path: Path, no_printer: None) -> None:
    scaled, written = study(**SMALL), []
    stray = AllocationPaths(tmp_path / "first")
    for path in (stray.table("T9"), stray.figure("T9"), stray.pdf, stray.page):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a number of other records")
    for name in ("first", "second"):
        paths = AllocationPaths(tmp_path / name)
        request = asked(texts={"goals": "<b>because</b> it works well"})
        files = write_allocation(paths, evidence_of(scaled.root, request=request))
        written.append({file: (paths.root / file).read_bytes() for file in files})
    assert written[0] == written[1]
    assert {"allocation.html", "allocation.md", "T1.csv", "T6.csv", "figures/T1_strong.svg"} <= set(written[0])
    # What an earlier report has left would be a number without a record.
    assert not any(path.exists() for path in (stray.table("T9"), stray.figure("T9"), stray.pdf))
    text, plain = (written[0][f"allocation.{kind}"].decode() for kind in ("html", "md"))
    assert "INCOMPLETE" in text and page.NO_PDF in text and "allocation.pdf" not in text
    assert "<b>because" not in text and "&lt;b&gt;because" in text and "\\<b\\>because" in plain


def test_a_programme_s_fields_cite_their_source_and_are_marked_where_a_person_must_write(
    own: Evidence, tmp_path: Path
) -> None:
    field = {"title": "Why", "asks": "Why so?", "person": "the reasons", "words": 3}
    cited = {**field, "source": "https://example.org/call", "date": "2026-11-01"}
    evidence = replace(own, programme=load_programme(programme_file(tmp_path, **cited)))
    ((_, told),) = texts.answers(evidence)
    assert "https://example.org/call, read 2026-11-01" in told[0].text
    assert (told[-1].text, told[-1].kind) == (texts.TO_WRITE, "missing") and "at most 3 words" in told[-1].note
    assert texts.unwritten(evidence) == ["Why: the reasons."]
    written = replace(evidence, request=asked(texts={"only": "because it works well"}))
    ((_, told),) = texts.answers(written)
    assert told[-1].text == "because it works well"
    assert texts.unwritten(written) == ["Why: 4 words, at most 3 are taken."]
    with pytest.raises(ConfigError, match=r'texts = "onl" is unknown. Known: only. Did you mean "only"\?'):
        texts.answers(replace(evidence, request=asked(texts={"onl": "x"})))


def test_frozen_and_full_stand_side_by_side(own: Evidence) -> None:
    table = arms.arms_table(own)
    assert table is not None
    rows = [row for row in table.rows if row[1].text == "Mask AP50, %"]
    assert [(row[2].text, row[3].text) for row in rows] == [("49.88", "52.34"), ("55.33", "54.12")]
    assert rows[0][4].value == pytest.approx(49.876 / 52.345)
    assert "46.67 against 45.97" in table.notes[0]


def test_storage_is_summed_by_lifetime(own: Evidence) -> None:
    table = storage.storage_table(own)
    sums = {row[2].text: row[4].value for row in table.rows if row[0].text == "Sum"}
    assert sums == {"until the project ends": pytest.approx(800e9 + 41234567)}
    assert storage.gaps(own) == []


def test_a_csv_holds_numbers_in_the_unit_of_its_column(own: Evidence) -> None:
    columns, rows = flat(storage.storage_table(own))
    sizes = {row[0]: row[columns.index("Size, GB")] for row in rows}
    assert sizes["satellite scenes"] == 800 and sizes["shards (chips of all scenes)"] == pytest.approx(0.041234567)


def test_what_is_measured_anew_is_not_missed(run: Any) -> None:
    cell = run.find("measure", "rgb", "ndvi", "full")
    old = run.paths.cell("0123456789ab")
    shutil.copytree(run.paths.cell(cell.id).root, old.root)
    old.config.write_text(old.config.read_text().replace(cell.id, old.root.name))
    value = read_json(old.record)
    write_json(old.record, {**value, "cell": old.root.name, "result_version": 0})
    evidence = evidence_of(run.paths.root)
    assert any(result.cell.id == old.root.name and not result.record for result in evidence.of("measure"))
    assert arms.gaps(evidence) == ["T4: not measured: cached."]
    shutil.rmtree(run.paths.cell(cell.id).root)
    assert any("another version" in gap for gap in arms.gaps(evidence_of(run.paths.root)))


def test_what_the_runs_took_is_shown_by_both_books(own: Evidence) -> None:
    table = demand.spent_table(own)
    assert table is not None
    assert column(table, "By") == ["all attempts", "by sacct", "by the tasks' notes", "difference", "of it, job 17"]
    taken = dict(zip(column(table, "By"), column(table, "GPU-hours"), strict=True))
    assert taken["by sacct"] - taken["by the tasks' notes"] == pytest.approx(taken["difference"])


def test_runs_of_one_name_are_told_apart_and_an_unknown_one_is_a_mistake(run: Any, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / run.paths.root.name
    shutil.copytree(run.paths.root, other)
    made_again = RunPaths(other).cell(next(iter(run.cells))).record
    write_json(made_again, {**read_json(made_again), "started": "2026-11-11T00:00:00+00:00"})
    names = [one.name for one in evidence_of(run.paths.root, other).runs]
    assert len(set(names)) == 2 and names[1] == f"elsewhere/{run.paths.root.name}"
    with pytest.raises(ConfigError, match=r'items.0.run = "sweeep" is not given. Given: test-run.'):
        evidence_of(run.paths.root, request=one_item(run="sweeep"))


@pytest.mark.slow
@needs_printer
def test_the_command_writes_every_form_and_a_mistake_is_one_line(study: Any, tmp_path: Path) -> None:
    paths, out = study(**SMALL), tmp_path / "report"
    line = [sys.executable, "-m", "rtshpc.launch", "allocation", str(paths.root), "--out", str(out), "--request"]
    answer = subprocess.run([*line, "example"], capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str(out / "allocation.html")
    assert {"allocation.html", "allocation.md", "T1.csv"} <= {file.name for file in out.iterdir()}
    assert (out / "allocation.pdf").read_bytes().startswith(b"%PDF-")
    answer = subprocess.run([*line, "exampel"], capture_output=True, text=True, timeout=240, check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert 'Did you mean "example"?' in answer.stderr and answer.stderr.count("\n") == 1


@pytest.mark.full
@needs_printer
def test_the_same_records_give_the_same_pdf(run: Any, study: Any, tmp_path: Path) -> None:
    spend(run)
    scaled, both = study(**SMALL), []
    for name in ("first", "second"):
        paths = AllocationPaths(tmp_path / name)
        assert "allocation.pdf" in write_allocation(paths, evidence_of(run.paths.root, scaled.root))
        both.append(paths.pdf.read_bytes())
    assert both[0] == both[1]


def test_every_programme_that_is_shipped_can_be_answered(own: Evidence) -> None:
    assert [title for title, _ in texts.answers(own)] == [field.title for field in load_programme("generic").fields]
