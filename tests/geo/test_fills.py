"""Rules of `check` on values that stand for nothing, and on places that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geo_making import BANDS, reflectance, slumps, write_tif
from rasterio.transform import Affine

from rtshpc.geo.judge import judge_raster

LIMIT = float(np.finfo(np.float32).max)


def judged(path: Path, pixels: Any, **options: Any) -> tuple[str, set[str]]:
    found = judge_raster(write_tif(path, pixels, **options))
    return found.verdict, {reason.split(":")[0] for reason in found.reasons}


def holed(value: float, bands: int = 3) -> np.ndarray:
    """Bands of float32 with a tenth of the ground at `value`."""
    pixels = reflectance()[:bands].astype(np.float32)
    pixels[:, :7] = value
    return pixels


@pytest.mark.parametrize("value", [-LIMIT, LIMIT, -np.inf, np.inf])
@pytest.mark.parametrize("place", [{"crs": None}, {"crs": None, "transform": None}])
def test_a_scene_without_a_crs_is_no_table_whatever_its_nodata(
    tmp_path: Path, value: float, place: dict[str, Any]
) -> None:
    verdict, words = judged(tmp_path / "a.tif", holed(value), nodata=value, **place)
    assert verdict == "reject"
    assert words & {"no_crs", "no_georeference"}


def test_only_a_small_row_of_values_is_a_table(tmp_path: Path) -> None:
    row = np.arange(1, 5001, dtype=np.float32).reshape(1, 5000)
    nowhere = {"crs": None, "transform": None}
    assert judged(tmp_path / "a.tif", row[:, :100], **nowhere) == ("warn", {"no_georeference"})
    assert judged(tmp_path / "b.tif", row, **nowhere) == ("reject", {"no_georeference"})


@pytest.mark.parametrize("value", [-LIMIT, LIMIT, -np.inf, np.inf])
def test_nodata_at_the_limit_of_numbers_is_told_with_a_crs_too(tmp_path: Path, value: float) -> None:
    assert judged(tmp_path / "a.tif", holed(value), nodata=value) == ("warn", {"odd_nodata"})


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("nodata", [None, -9999.0])
def test_undeclared_nan_and_infinity_are_told(tmp_path: Path, value: float, nodata: float | None) -> None:
    assert judged(tmp_path / "a.tif", holed(value), nodata=nodata) == ("warn", {"undeclared_nan"})


def test_infinity_beside_declared_nan_is_told_and_nan_alone_is_not(tmp_path: Path) -> None:
    pixels = holed(np.nan)
    assert judged(tmp_path / "a.tif", pixels, nodata=np.nan) == ("accept", set())
    pixels[0, 30, 30] = np.inf
    assert judged(tmp_path / "a.tif", pixels, nodata=np.nan) == ("warn", {"undeclared_nan"})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-9999, "float32"), (-32768, "int16"), (65535, "uint16"), (255, "uint8"), (-3.4e38, "float32"), (1e35, "float64")],
)
def test_fill_values_that_nobody_declares_are_told(tmp_path: Path, value: float, dtype: str) -> None:
    pixels = (reflectance()[:3] // (8 if dtype == "uint8" else 1)).astype(dtype)
    assert judged(tmp_path / "a.tif", pixels) == ("accept", set())
    pixels[:, :7] = value
    assert judged(tmp_path / "a.tif", pixels) == ("warn", {"undeclared_fill"})
    nodata = float(np.array(value, dtype))
    assert judged(tmp_path / "b.tif", pixels, nodata=nodata) == ("accept", set())
    if value in (-9999, -32768, 65535, -3.4e38):
        assert judged(tmp_path / "c.tif", pixels[0]) == ("warn", {"undeclared_fill"})
    pixels[:, 1:7] = 500 // (8 if dtype == "uint8" else 1)
    few = judged(tmp_path / "d.tif", pixels)
    assert few == (("warn", {"undeclared_fill"}) if abs(value) > 1e30 else ("accept", set()))


@pytest.mark.parametrize(
    ("crs", "place", "verdict", "word"),
    [
        ("EPSG:4978", Affine(10, 0, 500_000, 0, -10, 7_600_000), "reject", "geocentric_crs"),
        ("EPSG:32608+5773", Affine(10, 0, 500_000, 0, -10, 7_600_000), "accept", ""),
        ("+proj=utm +zone=8 +ellps=bessel +towgs84=1,2,3 +units=m", Affine(10, 0, 5e5, 0, -10, 7.6e6), "accept", ""),
        ("EPSG:32608", Affine(1e6, 0, 500_000, 0, -1e6, 7_600_000), "reject", "off_earth"),
    ],
)
def test_a_place_must_be_a_map_of_the_earth(tmp_path: Path, crs: str, place: Affine, verdict: str, word: str) -> None:
    found = judged(tmp_path / "a.tif", reflectance(), names=BANDS, scale=1e-4, crs=crs, transform=place)
    assert found == (verdict, {word} if word else set())


def test_a_raster_of_one_bit_is_no_palette(tmp_path: Path) -> None:
    assert judged(tmp_path / "a.tif", slumps(), nbits=1) == ("accept", set())
