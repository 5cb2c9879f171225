"""What is not there is said to be not there, with the reason, and never replaced by a number."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.records import read_record, write_json, write_record
from rtshpc.core.sizing.measured import refusal
from rtshpc.report import paper
from rtshpc.report.collect import collect
from rtshpc.report.gallery import embed

HOSTILE = '<script>alert("x")</script>\'"|`*[a](javascript:1) $x_1$ &amp;'


def test_failed_and_missing_cells_are_listed_with_their_reason(run: Any) -> None:
    pretrain, evaluate = run.find("pretrain", "nir"), run.find("evaluate", "nir")
    run.fail(pretrain, "tried to allocate 2 GiB\nsecond line", "OutOfMemoryError")
    run.paths.cell(evaluate.id).record.unlink()
    page = run.words()
    assert "1 failed and 1 missing of 22 cells" in page
    assert "OutOfMemoryError: tried to allocate 2 GiB" in page and "second line" not in page and "Traceback" not in page
    assert f"not run: it needs {pretrain.label} ({pretrain.id}), which failed" in page
    assert "NIR alone" in page and "33.78" not in page
    assert run.summarise()["states"] == {"done": 20, "failed": 1, "missing": 1}


def test_a_planned_cell_that_nobody_started_is_named(run: Any) -> None:
    cell = run.find("evaluate", "rgb")
    shutil.rmtree(run.paths.cell(cell.id).root)
    page = run.words()
    assert cell.id in page and "no record: not run, or not finished" in page
    assert "RGB+NDVI fused is not compared with RGB alone" in page
    assert "51.23" not in page


def test_an_unreadable_config_and_a_torn_record_do_not_stop_the_report(run: Any) -> None:
    stray = run.paths.cells / "strange"
    stray.mkdir()
    (stray / "config.yaml").write_text("{not: [yaml")
    torn = run.paths.cell(run.find("measure", "rgb").id).record
    torn.write_text(torn.read_text()[:100])
    page = run.words()
    assert "strange" in page and "config.yaml cannot be read" in page and "the record is not valid" in page


def test_an_empty_run_gives_a_page_of_reasons(run: Any) -> None:
    shutil.rmtree(run.paths.cells)
    shutil.rmtree(run.paths.shards)
    results = run.summarise()
    assert results["best"] is None and results["cells"] == 0
    page = run.text("index.html")
    assert page.count("not measured") > 20
    assert not re.search(r'class="number', page)


def test_undefined_figures_are_not_zero(run: Any) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["mask"]["AP50"] = None
        results["per_site"]["peel"]["mask_AP50"] = None

    run.change(run.find("evaluate", "rgb", "ndvi", "full"), edit)
    page = run.words()
    assert "undefined: the record holds no value" in page and ">undefined<" in page
    assert "52.34" not in page


def test_an_old_figure_does_not_outlive_its_records(run: Any) -> None:
    run.summarise()
    assert run.paths.report_figure("finetune_loss").exists()
    for cell in run.cells.values():
        run.paths.cell(cell.id).metrics.unlink(missing_ok=True)
    page = run.words()
    assert not run.paths.report_figure("finetune_loss").exists()
    assert "no metrics.jsonl holds a row" in page


def test_hostile_names_stay_text(make: Callable[..., Any], configured: Callable[..., Any]) -> None:
    run = make(configured())
    rows = [{"scene": HOSTILE, "reason": HOSTILE, "detail": "=1+1"}]
    write_json(run.paths.rejected, rows)
    run.fail(run.find("measure", "rgb"), HOSTILE)
    for stage in ("gather", "evaluate"):
        for cell in run.cells.values():
            if cell.stage == stage:
                key = "sites" if stage == "gather" else "per_site"
                run.change(cell, lambda results, key=key: results[key].update({HOSTILE: results[key].pop("peel")}))
    page, text = run.words(), run.text("report.md")
    # Indented lines are code, literal as they are.
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert '"x")</script' not in page
    assert "<script" not in text.replace("\\<", "") and not re.search(r"(?<!\\)\[a\]", text)
    assert "'=1+1" in run.text("rejected.csv")


def test_hostile_modality_names_are_escaped_in_figures(
    make: Callable[..., Any], configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No config gets such a name past its check; the report does not count on that.
    monkeypatch.setattr("rtshpc.core.config.data.MODALITY_NAME", ".*")
    name = 'a<b>"$x^$&'
    base = configured()
    modalities = {**base.data.modalities, name: base.data.modalities["nir"]}
    data = base.data.model_copy(update={"modalities": modalities})
    run = make(base.model_copy(update={"data": data}), values={(name,): 12.5})
    page = run.page()
    assert "a<b>" not in page and 'a&lt;b&gt;"$x^$&amp;' in run.text("figures/ap50.svg")


def test_gallery_pictures_come_only_from_the_cell_s_folder(run: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecretsecretsecret")
    cell = run.find("evaluate", "rgb")
    (run.paths.cell(cell.id).gallery / "text.png").write_text("no picture")
    names = ["../../../secret.png", "/etc/hostname", "gallery/none.png", "gallery/text.png"]
    run.change(cell, lambda results: results.update(gallery=names))
    page = run.words()
    assert page.count("the picture is not in the cell&#39;s folder") == 3 and "the file is no PNG" in page
    assert page.count("data:image/png;base64,") == 6


def test_the_page_s_size_is_bounded_and_no_cell_is_left_out_first(run: Any) -> None:
    results = list(collect(run.paths, run.summary).of("evaluate"))
    size = max((run.paths.cell(r.cell.id).gallery / "banks_003_0.png").stat().st_size for r in results)
    found = embed(results, limit_bytes=size * 3)
    shown = [pictures[0] for pictures in found.values()]
    assert 3 <= sum(bool(picture.data) for picture in shown) < 7
    assert all(picture.reason == "not embedded, to keep the page small" for picture in shown if not picture.data)


def test_backends_are_never_mixed(run: Any) -> None:
    def to_cuda(results: dict[str, Any]) -> None:
        results.update(
            backend="cuda",
            device="Test GPU",
            alloc_peak_fb=round(results["live_peak_fb"] * 1.25),
            live_peak_fb=None,
            device_used_peak_v2=999 * 2**20,
        )
        results["predicted"] = None
        results["reasons"] = {"live_peak_fb": "counted on CPUs alone", "predicted": "no trace of it"}

    # Only the full arm was measured on a GPU: no ratio may be formed with the CPU's pretrained arm.
    run.change(run.find("measure", "rgb", "ndvi", "full"), to_cuda)
    page = run.words()
    assert "RGB+NDVI on pretrained backbones needs" not in page
    assert "RGB+NDVI+NIR on pretrained backbones needs" in page
    assert "the full training of these modalities is not measured" in page
    tables = re.findall(r'<table id="table-memory[^"]*".*?</table>', page, flags=re.DOTALL)
    assert len(tables) == 2 and "CUDA allocator" in tables[0] and "CPU tensors alive" in tables[1]
    assert "no trace of it" in tables[0] and "−2.0" in tables[1]
    steps = re.findall(r'<table id="table-steps[^"]*".*?</table>', page, flags=re.DOTALL)
    assert len(steps) == 2 and "999.0" in steps[0] and "Used of the device" not in steps[1]
    assert "Not measured (no GPU is visible): Peak with optimizer, Reserved by the allocator" in page
    assert run.paths.report_figure("memory_2").exists()


def test_a_record_of_a_fake_driver_is_refused_by_name(run: Any) -> None:
    cell = run.find("measure", "rgb", "ndvi", "full")
    run.change(cell, lambda results: results.update(backend="fake", step_seconds=987.654))
    page = run.words()
    assert "987.6" not in page and f"RGB+NDVI · full: {refusal({'backend': 'fake'})}" in page and cell.id in page
    assert "987.6" not in run.text("memory.csv") and "refused: backend = fake" in run.text("memory.csv")
    assert refusal({"device": "fake"}) and not refusal({"backend": "cuda", "device": "A GPU"})


def test_a_record_of_another_version_counts_as_none(run: Any) -> None:
    path = run.paths.cell(run.find("measure", "rgb").id).record
    record = read_record(path)
    write_record(path, record.model_copy(update={"result_version": record.result_version - 1}))
    result = next(one for one in collect(run.paths, run.summary).of("measure") if one.paths.record == path)
    assert (result.record, result.reason) == (None, "the record is of another version of the code")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ((paper.CASCADE_MVIT, ["rgb"], None, None, "unimodal"), 39.73),
        ((paper.MASK_R50, ["nir"], None, None, "unimodal"), 12.30),
        ((paper.CASCADE_MVIT, ["rgb", "nir", "ndvi"], "cross", True, "pretrained"), 48.99),
        ((paper.CASCADE_MVIT, ["rgb", "ndvi"], "stacked", False, "pretrained"), 44.53),
        ((paper.CASCADE_MVIT, ["rgb", "ndvi"], "early", True, "full"), 42.74),
        ((paper.CASCADE_MVIT, ["rgb", "ndvi"], "cross", True, "full"), 45.97),
        ((paper.CASCADE_MVIT, ["rgb", "ndvi"], "cross", False, "full"), None),
        ((paper.CASCADE_MVIT, ["ndvi", "rgb"], "cross", True, "pretrained"), None),
        ((paper.CASCADE_MVIT, ["rgb", "dem"], "cross", True, "pretrained"), None),
        ((paper.MASK_MVIT, ["rgb", "ndvi"], "cross", True, "pretrained"), None),
    ],
)
def test_a_paper_cell_is_matched_by_its_whole_setting(setting: tuple[Any, ...], value: float | None) -> None:
    found = paper.find(*setting)
    assert (found.value if found else None) == value


def test_the_paper_s_comparison_has_25_cells() -> None:
    assert len(paper.CELLS) == 9 + 14 + 2
    assert paper.find_geoimagenet(["rgb", "dem"], "cross", True, "pretrained").value == 86.68  # type: ignore[union-attr]
    assert paper.find_geoimagenet(["rgb"], None, None, "unimodal").value == 73.39  # type: ignore[union-attr]
