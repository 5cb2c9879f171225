"""The catalog: a reader of STAC finds every file, at the place and time that the scene has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from geo_making import write_tif
from hypothesis import given, settings, strategies as st
from rasterio.transform import Affine
from table_making import outcome, table

from rtshpc.core.errors import RunError
from rtshpc.mapping import catalog
from rtshpc.mapping.catalog import Entry, times, write_catalog, write_mosaics
from rtshpc.mapping.layers import write_layer


def test_a_reader_of_stac_finds_every_scene_and_file(tmp_path: Path) -> None:
    entries = []
    for name, epsg, left in (("b c/d", 32608, 500_000), ("a", 32601, 376_000)):
        folder = tmp_path / "scenes" / name[0]
        folder.mkdir(parents=True)
        files = write_layer(folder, "slumps", table(2))
        entries.append(Entry(outcome(name, epsg, left, 7_660_000, 100), folder, files, {"rtshpc:instances": 2}))
    whole = write_layer(tmp_path, "slumps", table(3))
    written = write_catalog(tmp_path / "collection.json", "run", "A run", entries, whole)
    assert len(written) == 3 and all(path.is_file() for path in written)
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_catalog(written[0], "run", "A run", entries[::-1], whole)] == first
    collection = pystac.Collection.from_file(str(written[0]))
    items = {item.id: item for item in collection.get_items()}
    assert set(items) == {"b c/d", "a"}
    crossing = items["a"]
    assert crossing.bbox is not None and crossing.bbox[0] > 179 and crossing.bbox[2] < -179
    assert crossing.geometry is not None and crossing.geometry["type"] == "MultiPolygon"
    assert crossing.properties["proj:shape"] == [100, 100] and crossing.properties["proj:transform"][0] == 100
    assert crossing.properties["start_datetime"] == "2020-07-01T00:00:00Z"
    assert crossing.properties["end_datetime"] == "2020-07-01T23:59:59Z"
    assert Path(crossing.assets["table"].get_absolute_href() or "").is_file()
    assert crossing.assets["image"].href == str(Path("a.tif").absolute())
    west, _, east, _ = collection.extent.spatial.bboxes[0]
    assert west == crossing.bbox[0] and -136 < east < -134
    for path in written:
        links = [link["href"] for link in json.loads(path.read_text())["links"]]
        assert links and not [href for href in links if href.startswith("/")]


def test_a_catalog_whose_files_are_not_there_is_refused(tmp_path: Path) -> None:
    entry = Entry(outcome("a", 32608, 500_000, 7_660_000, 10), tmp_path, {"table": tmp_path / "absent.parquet"})
    with pytest.raises(
        RunError, match=r"collection\.json: does not read back as it was written: a: \./absent\.parquet"
    ):
        write_catalog(tmp_path / "collection.json", "run", "A run", [entry], {})


@pytest.mark.parametrize(
    ("date", "first", "last"),
    [
        ("2020-07-01", (2020, 7, 1), (2020, 7, 1, 23, 59, 59)),
        ("20200701", (2020, 7, 1), (2020, 7, 1, 23, 59, 59)),
        ("2020-12", (2020, 12, 1), (2020, 12, 31, 23, 59, 59)),
        ("2020", (2020, 1, 1), (2020, 12, 31, 23, 59, 59)),
        ("2020-07-01T12:30:00+02:00", (2020, 7, 1, 10, 30), (2020, 7, 1, 10, 30)),
    ],
)
def test_a_date_is_the_time_it_means(date: str, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert times(date) == (datetime(*first, tzinfo=UTC), datetime(*last, tzinfo=UTC))  # type: ignore[misc]


@settings(max_examples=50)
@given(text=st.text(max_size=12) | st.from_regex(r"\d{1,9}", fullmatch=True))
def test_any_text_is_a_time_or_none(text: str) -> None:
    found = times(text)
    assert found is None or found[0] <= found[1]


degrees = st.integers(-720, 720).map(lambda quarters: quarters / 4)


@settings(max_examples=100)
@given(spans=st.lists(st.tuples(degrees, degrees.map(abs)), min_size=1, max_size=5))
def test_the_box_around_boxes_holds_them_all_and_is_no_wider_than_it_must_be(spans: list[tuple[float, float]]) -> None:
    boxes = [[west, 60.0, west + width if west + width <= 180 else west + width - 360, 70.0] for west, width in spans]
    west, south, east, north = catalog._around(boxes)
    assert -180 <= west <= 180 and -180 <= east <= 180 and (south, north) == (60, 70)
    width = east - west if east >= west else east - west + 360
    from_each = [max((start - first) % 360 + reach for start, reach in spans) for first, _ in spans]
    assert width == min(*from_each, 360)
    assert width == 360 or all((start - west) % 360 + reach <= width for start, reach in spans)


BINDINGS = """
import json, os
class Dataset:
    def __init__(self, path): self.path = path
    def FlushCache(self): pass
def UseExceptions(): pass
def BuildVRT(path, sources, **options):
    listed = [f'<SimpleSource><SourceFilename relativeToVRT="0">{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
              for source in sources[: int(os.environ.get("TAKEN", "99"))]]
    with open(path, "w") as file:
        file.write('<VRTDataset rasterXSize="20" rasterYSize="20"><GeoTransform>0,1,0,0,0,-1</GeoTransform><VRTRasterBand dataType="Int16" band="1">')
        file.write("".join(listed) + "</VRTRasterBand></VRTDataset>")
    return Dataset(path)
"""


@pytest.fixture
def bindings(gdal_bindings: Callable[[str], None]) -> None:
    """A stand-in for GDAL's bindings that writes the simplest virtual raster."""
    gdal_bindings(BINDINGS)


def _images(folder: Path) -> list[str]:
    pixels, place = np.ones((1, 20, 20), np.int16), Affine(10, 0, 500_000, 0, -10, 7_600_000)
    files = {
        "a": {},
        "b": {},
        "zone": {"crs": "EPSG:32609"},
        "bands": {"pixels": np.ones((2, 20, 20), np.int16)},
        "named": {"names": ["red"]},
        "south": {"transform": Affine(10, 0, 500_000, 0, 10, 7_600_000)},
    }
    for name, options in files.items():
        write_tif(folder / f"{name}.tif", **{"pixels": pixels, "transform": place, **options})
    (folder / "broken.tif").write_bytes(b"")
    return [str(folder / f"{name}.tif") for name in (*files, "broken")]


def test_rasters_of_one_kind_share_a_virtual_raster_and_others_are_named(bindings: None, tmp_path: Path) -> None:
    written, notes = write_mosaics(lambda number: tmp_path / f"rasters-{number}.vrt", _images(tmp_path))
    sources = []
    for path in written:
        with rasterio.open(path) as dataset:
            sources.append(sorted(Path(name).stem for name in dataset.files if name.endswith(".tif")))
    assert sources == [["named"], ["a", "b"], ["bands"], ["zone"]]
    with rasterio.open(written[0]) as dataset:
        assert dataset.descriptions == ("red",)
    assert [note.split(": ")[0] for note in notes] == [str(tmp_path / "broken.tif"), str(tmp_path / "south.tif")]


def test_a_raster_that_gdal_left_out_is_noticed(
    bindings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKEN", "1")
    with pytest.raises(RunError, match="2 rasters were given, 1 are in it"):
        write_mosaics(lambda number: tmp_path / f"{number}.vrt", _images(tmp_path)[:2])
    assert not list(tmp_path.glob("*.vrt"))


def test_without_bindings_the_rest_goes_on_and_a_note_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RTSHPC_GDAL_PYTHON", sys.executable)
    written, notes = write_mosaics(lambda number: tmp_path / f"{number}.vrt", _images(tmp_path)[:2])
    assert written == [] and len(notes) == 1 and notes[0].startswith("no virtual rasters: GDAL's bindings: ")
