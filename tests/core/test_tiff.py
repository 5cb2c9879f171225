"""What a TIFF says in its first directory is read without a raster library."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from rtshpc.core.tiff import GEO_KEYS, HEIGHT, PIXEL_SCALE, TIE_POINTS, WIDTH, FileHead, tiff_size


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}, {"tiled": True}])
def test_the_size_of_a_tiff_is_read_without_a_raster_library(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", "GTiff", width=70_000, height=33, count=1, dtype="uint8", **options) as file:
        file.write(np.zeros((1, 33, 70_000), np.uint8))
    assert tiff_size(path) == (70_000, 33)
    path.write_bytes(path.read_bytes()[:7])
    assert tiff_size(path) is None
    for kind, value in ((11, struct.pack("<f", math.nan)), (5, bytes(4)), (9, struct.pack("<i", -5)), (3, bytes(4))):
        assert tiff_size(patched(tmp_path / "odd.tif", WIDTH, kind, value)) is None
    path.write_bytes(b"not a raster at all")
    assert tiff_size(path) is None and tiff_size(tmp_path / "none.tif") is None


def write(path: Path, crs: str = "EPSG:32608", x: float = 500_000, **options: Any) -> Path:
    transform = from_origin(x, 7_600_000, 4, 4)
    with rasterio.open(
        path, "w", "GTiff", width=20, height=10, count=1, dtype="uint8", crs=crs, transform=transform, **options
    ) as file:
        file.write(np.ones((1, 10, 20), np.uint8))
    return path


def patched(path: Path, tag: int, kind: int, value: bytes) -> Path:
    """A raster whose directory says something else of one tag."""
    path.unlink(missing_ok=True)
    content = bytearray(write(path).read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    count = struct.unpack_from("<H", content, start)[0]
    at = next(
        at for at in range(start + 2, start + 2 + 12 * count, 12) if content[at : at + 2] == struct.pack("<H", tag)
    )
    content[at + 2 : at + 4], content[at + 8 : at + 12] = struct.pack("<H", kind), value
    path.write_bytes(content)
    return path


def stated(path: Path) -> Any:
    return FileHead.of(path).stated_place()


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}, {"compress": "lzw", "tiled": True}])
def test_files_of_one_grid_state_the_same_place_however_they_are_stored(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    one, other = write(tmp_path / "a.tif"), write(tmp_path / "b.tif", **options)
    assert stated(one) is not None and stated(one) == stated(other)


@pytest.mark.parametrize("change", [{"crs": "EPSG:32609"}, {"x": 500_000.001}])
def test_files_of_other_grids_state_other_places(tmp_path: Path, change: dict[str, Any]) -> None:
    assert stated(write(tmp_path / "a.tif")) != stated(write(tmp_path / "b.tif", **change))


def test_a_scale_or_heights_that_have_another_meaning_state_no_place(tmp_path: Path) -> None:
    for tag, number in ((PIXEL_SCALE, 0), (PIXEL_SCALE, 2), (TIE_POINTS, 5)):
        path = write(tmp_path / "a.tif")
        content, place = bytearray(path.read_bytes()), FileHead.of(path).tags[tag].offset + 8 * number
        content[place : place + 8] = struct.pack("<d", 0.0 if number == 0 else 0.1)
        path.write_bytes(content)
        assert stated(path) is None


@pytest.mark.parametrize("beside", ["a.tif.aux.xml", "a.aux", "a.tif.aux", "a.AUX", "a.xml"])
def test_a_file_that_others_may_overrule_states_no_place(tmp_path: Path, beside: str) -> None:
    path = write(tmp_path / "a.tif")
    (tmp_path / beside).write_text("")
    assert stated(path) is None


def test_a_file_without_a_whole_georeference_states_no_place(tmp_path: Path) -> None:
    assert stated(write(tmp_path / "a.tif", crs="")) is None
    content = write(tmp_path / "b.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(content[: FileHead.of(tmp_path / "b.tif").tags[GEO_KEYS[0]].offset + 3])
    assert stated(tmp_path / "b.tif") is None
    (tmp_path / "c.tif").write_bytes(b"no raster")
    assert stated(tmp_path / "c.tif") is None


def test_a_directory_behind_the_pixels_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with rasterio.open(path, "w", "GTiff", width=300, height=200, count=1, dtype="uint8") as file:
        file.write(np.ones((1, 200, 300), np.uint8))
    with rasterio.open(path, "r+") as file:  # rewritten at the end
        file.crs, file.transform = "EPSG:32608", from_origin(500_000, 7_600_000, 4, 4)
    head = FileHead.of(path)
    assert head.tags[PIXEL_SCALE].offset > len(head.start)
    assert head.values(WIDTH) == (300,) and head.values(HEIGHT) == (200,) and head.values(PIXEL_SCALE) == (4, 4, 0)
    assert head.stated_place() is not None and head.cut_off() == ""
