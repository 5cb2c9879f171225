from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import shapely
from compare_making import STEP, Cells, block, features, mapped
from pyproj import CRS

from rtshpc.core.errors import DataError
from rtshpc.mapping.attributes import ground_measures, moved
from rtshpc.mapping.compare.sources import Source
from rtshpc.mapping.compare.track import track
from rtshpc.mapping.features import Features, read_features, write_features
from rtshpc.stages.__main__ import main

GROUND = [("a", block((0, 60), (0, 60)))]


def told(*sources: Source) -> list[tuple[int, str, str, str, float, float]]:
    """Track, date, change, what it continues, cells, growth in cells (NaN = -1)."""
    found = track(sources)
    names = ("track", "date", "change", "continues", "area_m2", "growth_m2")
    rows = zip(*(found[name].tolist() for name in names), strict=True)
    return [
        (*row[:4], round(row[4] / STEP**2, 2), -1 if row[5] != row[5] else round(row[5] / STEP**2, 2)) for row in rows
    ]


def test_a_slump_that_grows_is_one_track_with_its_growth() -> None:
    sources = [mapped([block((0, 4), (0, 4 + 2 * year))], str(2018 + 3 * year), GROUND) for year in range(3)]
    assert told(*sources) == [
        (1, "2018", "first", "", 16, -1),
        (1, "2021", "same", "1", 24, 8),
        (1, "2024", "same", "1", 32, 8),
    ]
    found = track(sources)
    assert found["growth_m2_per_year"][1:] == pytest.approx([8 * STEP**2 / 3] * 2, rel=1e-3)
    assert found["year"] == pytest.approx([2018.5, 2021.5, 2024.5], abs=0.01)


def test_new_slumps_are_told_from_ground_that_was_never_mapped() -> None:
    half = [("a", block((0, 60), (0, 30)))]
    sources = [
        mapped([], "2018", half),
        mapped([block((0, 4), (0, 4)), block((0, 4), (40, 44))], "2019", GROUND),
    ]
    assert [(row[0], row[2]) for row in told(*sources)] == [(1, "new"), (2, "first")]


def test_a_slump_has_vanished_when_its_ground_was_mapped_without_it_for_good() -> None:
    slump, elsewhere = block((0, 4), (0, 4)), [("a", block((0, 60), (30, 60)))]
    gone = [
        mapped([slump], "2018", GROUND),
        mapped([], "2019", elsewhere),
        mapped([], "2020", GROUND),
        mapped([], "2021", GROUND),
    ]
    assert told(*gone) == [(1, "2018", "first", "", 16, -1), (1, "2020", "vanished", "1", 0, -16)]
    back = [mapped([slump], "2018", GROUND), mapped([], "2020", GROUND), mapped([slump], "2021", GROUND)]
    assert [row[1:3] for row in told(*back)] == [("2018", "first"), ("2021", "same")]
    unknown = [mapped([slump], "2018"), mapped([block((40, 44), (0, 4))], "2020")]
    assert [row[2] for row in told(*unknown)] == ["first", "first"]


def test_slumps_that_merge_are_one_track_from_then_on() -> None:
    before = [block((0, 4), (0, 4)), block((0, 4), (5, 15))]
    after = [block((0, 4), (0, 16))]
    assert told(mapped(before, "2018", GROUND), mapped(after, "2020", GROUND), mapped(after, "2021", GROUND)) == [
        (1, "2018", "first", "", 16, -1),
        (2, "2018", "first", "", 40, -1),
        (2, "2020", "merged", "1, 2", 64, 8),
        (2, "2021", "same", "2", 64, 0),
    ]


def test_the_largest_part_of_a_slump_that_splits_goes_on() -> None:
    before = [block((0, 4), (0, 16))]
    after = [block((0, 4), (0, 4)), block((0, 4), (5, 15))]
    assert told(mapped(before, "2018", GROUND), mapped(after, "2020", GROUND)) == [
        (1, "2018", "first", "", 64, -1),
        (1, "2020", "split", "1", 40, -8),
        (2, "2020", "split", "1", 16, -1),
    ]


@pytest.mark.parametrize(("moved_by", "tracks"), [(1, 1), (2, 1), (3, 2)])
def test_half_of_the_smaller_must_be_shared(moved_by: int, tracks: int) -> None:
    sources = [mapped([block((0, 4), (0, 4))], "2018"), mapped([block((0, 4), (moved_by, moved_by + 4))], "2019")]
    assert len({row[0] for row in told(*sources)}) == tracks


def test_neighbours_are_not_taken_for_each_other() -> None:
    cells = [block((0, 4), (col, col + 4)) for col in range(0, 40, 4)]
    found = told(mapped(cells, "2018", GROUND), mapped([{(r + 1, c) for r, c in one} for one in cells], "2019", GROUND))
    assert [row[2] for row in found] == ["first", "same"] * 10


def test_the_order_of_maps_and_of_their_rows_is_nothing() -> None:
    draw = np.random.default_rng(2)
    sources = []
    for year in range(4):
        cells: list[Cells] = [
            block((r, r + int(draw.integers(2, 6))), (c, c + int(draw.integers(2, 7))))
            for r in (0, 10, 20)
            for c in (0, 10, 20)
        ]
        sources.append(mapped([cells[at] for at in draw.permutation(9)[:7]], f"{2015 + year}-07-01", GROUND))
    tables = [track(order) for order in itertools.permutations(sources)]
    assert all(one.same(tables[0]) for one in tables)


def test_maps_in_other_crs_and_across_the_antimeridian_are_linked() -> None:
    center = CRS.from_proj4("+proj=laea +lat_0=68 +lon_0=180 +datum=WGS84").to_wkt()
    sources = []
    for date, zone, side in (("2018", 60, 100), ("2020", 1, 140)):
        crs = CRS.from_epsg(32600 + zone).to_wkt()
        shapes = moved([shapely.segmentize(shapely.box(-side, -50, side, 50), 10)], center, crs).tolist()
        columns: dict[str, Any] = {"date": [date], **ground_measures(shapes, crs)}
        sources.append(Source(date, Features(crs, np.array([*shapes, None], np.object_)[:-1], columns), None))
    found = track(sources)
    assert found["change"].tolist() == ["first", "same"]
    assert found["growth_m2"][1] == pytest.approx(80 * 100, rel=1e-3)


def test_a_date_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match='date "soon" of a map cannot be read'):
        track([mapped([block((0, 4), (0, 4))], "soon")])


def test_the_command_writes_a_table_and_a_layer_that_read_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for year in (2018, 2020):
        table = features([block((0, 4), (0, year - 2010))], date=[str(year)], site=["a b"], score=np.array([0.5]))
        ground = features([GROUND[0][1]], date=[str(year)], site=["a b"], state=["mapped"])
        write_features(tmp_path / f"run {year}" / "layers" / "slumps.parquet", table)
        write_features(tmp_path / f"run {year}" / "layers" / "footprints.parquet", ground)
    runs = [str(tmp_path / f"run {year}") for year in (2020, 2018)]
    assert main(["track", *runs, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["changes"] == {"first": 1, "same": 1} and told["growth_m2"] == pytest.approx(8 * STEP**2, rel=1e-5)
    layer = pyogrio.raw.read(tmp_path / "out" / "tracks.gpkg", layer="tracks")
    assert len(layer[2]) == len(read_features(tmp_path / "out" / "tracks.parquet")) == 2
    with (tmp_path / "out" / "tracks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["track"], row["change"], row["growth_m2"] == "") for row in rows] == [
        ("1", "first", True),
        ("1", "same", False),
    ]
    assert main(["track", *runs, "--out", str(tmp_path / "out")]) == 0
    assert "1 slumps at 2 dates: 2018, 2020" in capfd.readouterr().out
    assert main(["track", *runs, "--out", str(tmp_path / "out"), "--share", "2"]) == 2
