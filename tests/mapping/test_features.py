"""The table of mapped instances: what is written is read, in the same bytes, and others can open it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyproj
import pytest
from hypothesis import given, settings, strategies as st
from table_making import UTM, table

from rtshpc.core.errors import RunError
from rtshpc.geo.align import same_crs
from rtshpc.mapping.features import Features, joined, read_features, write_features


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_written_is_read_back_and_written_again_in_the_same_bytes(tmp_path: Path, count: int) -> None:
    written = table(count)
    write_features(tmp_path / "a.parquet", written)
    found = read_features(tmp_path / "a.parquet")
    assert found.same(written)
    write_features(tmp_path / "b.parquet", found)
    write_features(tmp_path / "c.parquet", written)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "c.parquet").read_bytes()
    assert read_features(tmp_path / "b.parquet").same(found)


def test_a_row_may_have_no_place(tmp_path: Path) -> None:
    rows = table(3)
    placeless = Features(UTM, [None, *rows.geometry[1:]], rows.columns)  # pyright: ignore[reportArgumentType]
    for count in (3, 1):
        written = placeless.take(np.arange(count)).ordered()
        write_features(tmp_path / "a.parquet", written)
        assert read_features(tmp_path / "a.parquet").same(written)


@pytest.mark.parametrize("epsg", [4326, 3413, 6931, 32660, 3338])
def test_the_crs_comes_back_with_its_meaning(tmp_path: Path, epsg: int) -> None:
    wkt = pyproj.CRS.from_epsg(epsg).to_wkt()
    write_features(tmp_path / "a.parquet", table(2, wkt))
    assert same_crs(read_features(tmp_path / "a.parquet").crs_wkt, wkt)


def test_geopandas_opens_it_with_nulls_where_nothing_is_known(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="needs geopandas (extra benchmarks)")
    write_features(tmp_path / "a.parquet", table(3))
    frame = geopandas.read_parquet(tmp_path / "a.parquet")
    assert frame.crs == pyproj.CRS.from_epsg(32608) and frame.geometry.is_valid.all()
    assert frame["elevation_m"].isna().tolist() == [True, False, False]
    assert frame["pieces"].tolist() == [0, 1, 2] and frame["scene"].tolist() == ["scene 0", "scene 1", "scene 0"]


def test_a_damaged_or_absent_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(RunError, match=r"a\.parquet: no table of outlines can be read: no such file"):
        read_features(path)
    write_features(path, table(400))
    whole = path.read_bytes()
    for broken in (whole[:100], b"", whole[:40] + b"\0" * 400 + whole[440:]):
        path.write_bytes(broken)
        with pytest.raises(RunError, match="no table of outlines can be read"):
            read_features(path)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_of_rows_depends_on_what_they_say_alone(order: list[int]) -> None:
    rows = table(6)
    assert rows.take(np.array(order)).ordered().same(rows.ordered())


def test_tables_are_joined_and_what_one_lacks_is_not_known_there() -> None:
    one, two = table(2), table(3, seed=1, mean_ndvi=[0.1, 0.2, 0.3], note=["a", "b", "c"])
    whole = joined([one, two])
    assert len(whole) == 5 and list(whole.columns) == [*one.columns, "mean_ndvi", "note"]
    np.testing.assert_array_equal(whole["mean_ndvi"], [np.nan, np.nan, 0.1, 0.2, 0.3])
    assert whole["note"].tolist() == ["", "", "a", "b", "c"]
    assert joined([Features(UTM, [], {}), one])["pieces"].tolist() == [0, 1]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="several CRSs"):
        joined([one, table(1, pyproj.CRS.from_epsg(3413).to_wkt())])


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="column score has 2 values of 3"):
        table(3, score=[0.5, 0.6])
