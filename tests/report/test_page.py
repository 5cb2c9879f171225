"""The page says what the records hold, all of it that matters, and nothing else."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.records import read_json, read_record
from rtshpc.report import paper


class Page(HTMLParser):
    """Texts of a page with the source each one names, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sourced: list[tuple[str, str, str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._open: list[tuple[str, str, str]] = []
        self._hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [str(found[key]) for key in ("src", "href", "srcset", "action", "data") if key in found]
        if tag in ("td", "dd"):
            self._open.append((str(found.get("class") or ""), str(found.get("data-source") or ""), ""))
        elif tag == "small":
            self._open.append(("small", "", ""))
        elif tag in ("style", "pre", "svg"):
            self._hidden += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "dd", "small") and self._open:
            self.sourced.append(self._open.pop())
        elif tag in ("style", "pre", "svg"):
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if self._open:
            kind, source, text = self._open[-1]
            self._open[-1] = (kind, source, text + data)
        if not self._hidden:
            self.words.append(data)

    @property
    def numbers(self) -> list[tuple[str, str, str]]:
        """(kind, source, text) of every field that is set as a number."""
        return [item for item in self.sourced if {"number", "paper"} & set(item[0].split())]


def leaves(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def follow(root: Path, source: str) -> Any:
    """What a source of the page points at."""
    name, _, key = source.partition("#")
    value = read_json(root / name)
    for part in key.split("."):
        value = value[part]
    return value


def as_number(text: str) -> float:
    return float(text.replace("\u202f", "").replace("−", "-").removesuffix(" %"))


def is_shown(shown: str, value: float) -> bool:
    """Is `shown` this value, in one of the units of the page, rounded to its own decimals?"""
    places = len(shown.partition(".")[2].rstrip(" %"))
    units = (1.0, 1e6, 2.0**20, 0.01)
    return any(math.isclose(as_number(shown), value / unit, abs_tol=0.500001 * 10**-places) for unit in units)


def test_every_number_of_the_page_is_in_the_record_that_it_names(run: Any) -> None:
    page = Page(run.page())
    assert len(page.numbers) > 150
    for kind, source, text in page.numbers:
        if "paper" in kind.split():
            assert source == "paper"
            continue
        assert source, f"{text} names no source"
        first, *more = source.split(" | ")
        if more:
            a, b = (follow(run.paths.root, part) for part in (first, *more))
            derived = 100 * a / b if text.endswith("%") else a - b
            assert as_number(text) == pytest.approx(derived, abs=0.0501)
        elif "#seconds" in source:
            assert float(follow(run.paths.root, source)) > 0
        else:
            held = follow(run.paths.root, source)
            if source == "shards/index.json#chips":
                assert 0 <= as_number(text) <= len(held)
            elif isinstance(held, list):
                assert any(as_number(text) == pytest.approx(value, rel=1e-3) for value in held)
            else:
                assert is_shown(text, held), (text, held, source)


def test_the_paper_s_figures_are_the_paper_s(run: Any) -> None:
    known = {cell.value for cell in paper.CELLS} | set(paper.MEMORY_MB.values())
    known |= {value[0] for value in paper.PARAMETERS_M.values()} | {57.5, 52.2}
    shown = [as_number(text) for kind, _, text in Page(run.page()).numbers if "paper" in kind.split()]
    assert len(shown) > 20
    assert set(shown) <= known


def test_a_changed_value_changes_only_what_is_said_of_it(run: Any) -> None:
    def numbers() -> list[tuple[str, str, str]]:
        return Page(run.page()).numbers

    before = numbers()
    cell = run.find("evaluate", "ndvi")
    run.change(cell, lambda results: results["mask"].update(AP50=40.987))
    changed = [(old, new) for old, new in zip(before, numbers(), strict=True) if old != new]
    source = f"cells/{cell.id}/record.json#results.mask.AP50"
    assert [(new[1], old[2], new[2]) for old, new in changed] == [(source, "20.52", "40.99")]
    assert "40.99" in run.text("report.md") and "40.987" in run.text("results.csv")
    assert "41.0" in run.text("figures/ap50.svg") and "20.5<" not in run.text("figures/ap50.svg")


def test_fusion_is_held_against_the_primary_in_a_sentence_either_way(run: Any) -> None:
    page = run.page()
    assert "RGB+NDVI+NIR fused is 4.1 points above RGB alone" in page
    assert "RGB+NDVI fused is 1.4 points below RGB alone" in page
    assert "RGB+NDVI fused on pretrained, frozen backbones is 2.5 points below the same trained in full" in page
    value = 51.234
    run.change(run.find("evaluate", "rgb", "ndvi", "full"), lambda results: results["mask"].update(AP50=value))
    assert "RGB+NDVI fused is within 0.05 points of RGB alone" in run.page()
    assert "RGB+NDVI+NIR fused is 4.1 points above RGB alone" in run.text("report.md").replace("\\", "")


def test_the_paper_s_figure_stands_beside_the_same_cell(run: Any) -> None:
    run.summarise()
    rows = {(row["modalities"], row["arm"]): row for row in csv.DictReader(io.StringIO(run.text("results.csv")))}
    assert len(rows) == 7
    assert rows["rgb", "unimodal"]["paper_AP50"] == "39.73"
    assert rows["rgb+ndvi", "pretrained"]["paper_AP50"] == "46.67"
    assert rows["rgb+ndvi+nir", "full"]["paper_AP50"] == "48.5"
    assert float(rows["rgb+ndvi+nir", "pretrained"]["mask_AP50"]) == 55.334
    assert float(rows["rgb+ndvi+nir", "pretrained"]["points_above_primary_alone"]) == pytest.approx(4.1)


def test_leakage_is_printed_beside_every_ap50(run: Any) -> None:
    assert "the split allows leakage" not in run.page()
    for cell in run.cells.values():
        if cell.stage in ("evaluate", "gather"):
            run.change(cell, lambda results: results.update(allow_leakage=True))
    page = run.page()
    sentences = re.findall(r">([^<]*AP50 [\d.]+ against [\d.]+[^<]*)<", page)
    assert sentences and all("the split allows leakage" in sentence for sentence in sentences)
    table = page[page.index('id="table-results"') : page.index("</table>", page.index('id="table-results"'))]
    assert table.count("the split allows leakage") == 7
    assert "Leakage is allowed" in page
    assert run.text("figures/ap50.svg").count("the split allows leakage") == 7


def test_the_same_records_give_the_same_bytes(run: Any) -> None:
    def files() -> dict[str, bytes]:
        run.summarise()
        return {
            str(path.relative_to(run.paths.report)): path.read_bytes()
            for path in sorted(run.paths.report.rglob("*"))
            if path.is_file()
        }

    first = files()
    assert {"index.html", "report.md", "results.csv", "memory.csv", "figures/ap50.svg"} <= set(first)
    assert files() == first


def test_the_page_loads_nothing_and_runs_nothing(run: Any) -> None:
    text = run.page()
    page = Page(text)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"https?:|url\((?!#)|@import", re.sub(r"base64,[^\"]*", "", text))
    assert not re.search(r"\son\w+=", text)
    identifiers = re.findall(r'\sid="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(identifiers)


def test_the_data_summary_counts_scenes_chips_and_instances(run: Any) -> None:
    text = " ".join(" ".join(Page(run.page()).words).split())
    assert "Scenes: 10 accepted + 2 rejected of 12 given." in text and "do not add up" not in text
    assert "the file names no coordinate system" in text and "strip 7 cannot be read" in text
    assert "nodata is undeclared" in text and "stay in one split" in text
    sites = list(csv.DictReader(io.StringIO(run.text("data_sites.csv"))))
    assert [(row["Site"], row["Chips train"], row["Instances test"], row["Instances"]) for row in sites] == [
        ("banks", "16", "12", "57"),
        ("peel", "15", "9", "47"),
    ]
    run.change(run.find("gather"), lambda results: results["scenes"].update(rejected=1))
    assert "These do not add up." in run.page()


def test_the_result_tells_files_cells_and_the_best(run: Any) -> None:
    results = run.summarise()
    assert results["cells"] == 22 and results["states"] == {"done": 22, "failed": 0, "missing": 0}
    assert results["best"]["AP50"] == 55.334 and results["best"]["metric"] == "mask"
    assert all((run.paths.report / name).is_file() for name in results["files"])


def test_provenance_names_commit_fingerprint_hardware_and_cells(run: Any) -> None:
    page = run.page()
    for fact in ("c0ffee1", "5eed" * 16, "Test CPU", "2.14.1", "3.11.9", *run.cells):
        assert fact in page
    assert "2031-02-03" in page and "name: test-run" in page


@pytest.mark.slow
def test_the_stage_runs_as_a_process_and_leaves_a_record(run: Any) -> None:
    command = [
        sys.executable,
        "-m",
        "rtshpc.stages",
        "summarise",
        "--run-dir",
        str(run.paths.root),
        "--task",
        run.summary.id,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    record = read_record(run.paths.cell(run.summary.id).record)
    assert record is not None and record.results["cells"] == 22
    first = run.paths.report_page.read_bytes()
    # The summary's own record has its own time: it must not change the next page.
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert run.paths.report_page.read_bytes() == first
