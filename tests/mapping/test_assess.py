from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import shapely
from compare_making import FLAT, STEP, Cells, block, features, mapped
from hypothesis import given, settings, strategies as st

from rtshpc.geo.crs import LONLAT
from rtshpc.launch.__main__ import main as launch
from rtshpc.mapping.attributes import moved
from rtshpc.mapping.compare.assess import WHOLE, assess
from rtshpc.mapping.features import Features, write_features
from rtshpc.stages.__main__ import main


def counted(one: list[Cells], other: list[Cells], known: Cells, least: float) -> dict[str, float]:
    """The figures by counting cells and trying every way to pair."""
    parts = [[cells & known for cells in side] for side in (one, other)]
    keep = [
        [part for part, cells in zip(side, whole, strict=True) if part and 2 * len(part) >= len(cells)]
        for side, whole in zip(parts, (one, other), strict=True)
    ]
    fits = [(a, b) for a, b in itertools.product(*keep) if len(a & b) / len(a | b) >= least]
    areas = [len(set().union(*side)) for side in parts]
    shared = len(set().union(*parts[0]) & set().union(*parts[1]))
    return {
        "mapped": len(keep[0]),
        "reference": len(keep[1]),
        "right": len(fits),
        "found": len(fits),
        "mapped_m2": areas[0] * STEP**2,
        "reference_m2": areas[1] * STEP**2,
        "shared_m2": shared * STEP**2,
    }


def some(seed: int, count: int) -> list[Cells]:
    """Rectangles that do not overlap, one a square of 6 cells."""
    draw = np.random.default_rng(seed)
    found = []
    for place in draw.permutation(25)[:count].tolist():
        row, col = place // 5 * 6 + int(draw.integers(3)), place % 5 * 6 + int(draw.integers(3))
        found.append(block((row, row + int(draw.integers(1, 4))), (col, col + int(draw.integers(1, 4)))))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.51, 0.75]), st.booleans(), st.booleans())
def test_the_figures_are_those_of_counting_cells(seed: int, least: float, limited: bool, hidden: bool) -> None:
    one, other = some(seed, 14), some(seed + 1, 14)
    other += [set(cells) for cells in one[:4] if not any(cells & there for there in other)]
    known = block((0, 40), (0, 40)) if not limited else block((4, 21), (2, 19))
    ignored = block((7, 13), (8, 17)) if hidden else set[tuple[int, int]]()
    source = mapped(one, grounds=[("", known)] if limited else None)
    score = assess(source, features(other), features([ignored]) if hidden else None, least)[WHOLE].figures()
    for name, value in counted(one, other, known - ignored, least).items():
        assert score[name] == pytest.approx(value, rel=1e-5, abs=1e-3), name


def test_shares_are_of_what_is_there_and_empty_sides_have_none() -> None:
    ten = [block((0, 4), (col, col + 4)) for col in range(0, 50, 5)]
    figures = assess(mapped(ten[:8]), features(ten[4:]))[WHOLE].figures()
    assert (figures["precision"], figures["recall"]) == (0.5, pytest.approx(4 / 6))
    assert figures["f1"] == pytest.approx(2 * 4 / (8 + 6)) and figures["area_f1"] == pytest.approx(figures["f1"])
    empty = assess(mapped([]), features(ten))[WHOLE].figures()
    assert empty["precision"] is None and empty["recall"] == 0 and empty["f1"] == 0
    assert assess(mapped([]), features([]))[WHOLE].figures()["f1"] is None


def test_each_reference_is_matched_once_and_by_the_best() -> None:
    true = block((0, 10), (0, 10))
    found = [block((0, 10), (0, 8)), block((0, 10), (0, 9))]
    score = assess(mapped(found), features([true]), least_iou=0.5)[WHOLE]
    assert (score.mapped, score.right, score.found) == (2, 1, 1)
    assert score.shared_m2 == pytest.approx(90 * STEP**2, rel=1e-6)


def test_sites_are_scored_apart_and_together() -> None:
    grounds = [("b", block((0, 10), (0, 10))), ("a", block((0, 10), (20, 30)))]
    true = [block((1, 4), (1, 4)), block((1, 4), (21, 24)), block((5, 8), (22, 25)), block((40, 44), (0, 4))]
    scores = assess(mapped([true[0], true[1], block((5, 8), (1, 4))], grounds=grounds), features(true))
    assert list(scores) == ["a", "b", WHOLE]
    assert [(one.mapped, one.right, one.reference, one.found) for one in scores.values()] == [
        (1, 1, 2, 1),
        (2, 1, 1, 1),
        (3, 2, 3, 2),
    ]


def test_a_reference_in_another_crs_is_the_same_reference() -> None:
    cells = some(3, 12)
    plain = features(cells)
    shapes = moved(shapely.segmentize(plain.geometry, 1.0), FLAT, LONLAT)
    score = assess(mapped(cells), Features(LONLAT, shapes, {}))[WHOLE]
    assert score.right == score.found == 12
    assert score.shared_m2 == pytest.approx(score.mapped_m2, rel=1e-6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished map of two dates, as it lies on disk."""
    grounds = [("a", block((0, 20), (0, 20))), ("a", block((0, 20), (0, 20)))]
    cells = [block((1, 5), (1, 5)), block((1, 5), (10, 14)), block((1, 5), (1, 5))]
    dates = ["2019", "2019", "2021"]
    table = features(cells, date=dates, site=["a"] * 3, score=np.array([0.9, 0.2, 0.9]))
    ground = features([cells for _, cells in grounds], date=["2019", "2021"], site=["a", "a"], state=["mapped"] * 2)
    write_features(tmp_path / "run" / "layers" / "slumps.parquet", table)
    write_features(tmp_path / "run" / "layers" / "footprints.parquet", ground)
    return tmp_path / "run"


def write_reference(path: Path, cells: list[Cells], **columns: list[str]) -> str:
    geometry = np.array([shape.wkb for shape in features(cells).geometry], np.object_)
    fields = {name: np.array(values, np.object_) for name, values in columns.items()}
    pyogrio.raw.write(path, geometry, list(fields.values()), list(fields), crs=FLAT, geometry_type="Unknown")
    return str(path)


def test_the_command_prints_what_the_computation_gives(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = [block((1, 5), (1, 5)), block((10, 14), (1, 5)), block((1, 5), (9, 15))]
    reference = write_reference(tmp_path / "r.gpkg", cells, sort=["rts", "rts", "unsure"])
    line = [
        "assess",
        str(run),
        reference,
        "--date",
        "2019",
        "--ignore-property",
        "sort",
        "--ignore-when",
        "unsure",
        "--json",
    ]
    assert main(line) == 0
    figures = json.loads(capfd.readouterr().out)["sites"][WHOLE]
    assert (figures["mapped"], figures["right"], figures["reference"]) == (1, 1, 2)
    assert (figures["precision"], figures["recall"], figures["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert main([*line[:-1], "--least-score", "0.95"]) == 0
    shown = capfd.readouterr().out
    assert "right: IoU of at least 0.5" in shown and "all" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--date", "2020"], '--date = "2020" is unknown. Known: 2019, 2021.'),
        ([], "a map of several dates: choose one with --date: 2019, 2021"),
        (["--date", "2019", "--iou", "0"], "--iou = 0 must be above 0 and at most 1"),
        (["--date", "2019", "--ignore-property", "sorte"], 'has no column "sorte", but sort'),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    reference = write_reference(tmp_path / "r.gpkg", [block((1, 5), (1, 5))], sort=["rts"])
    assert main(["assess", str(run), reference, *options]) == 2
    error = capfd.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_what_cannot_be_read_is_named(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.gpkg").write_text("no layer")
    for reference, says in (("nothing.gpkg", "no such file"), ("text.gpkg", "cannot be read as a layer of polygons")):
        assert main(["assess", str(run), str(tmp_path / reference), "--date", "2019"]) == 2
        assert says in capfd.readouterr().err
    assert main(["assess", str(tmp_path), str(tmp_path / "text.gpkg")]) == 2
    assert "holds no finished map" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["assess", "track"])
def test_the_launcher_hands_its_line_to_the_tool(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []

    def called(line: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        lines.append(line[1:])
        return subprocess.CompletedProcess(line, 2)

    monkeypatch.setattr(subprocess, "run", called)
    assert launch([command, "a map", "--out", "$x"]) == 2
    assert lines == [["-m", "rtshpc.stages", command, "a map", "--out", "$x"]]
