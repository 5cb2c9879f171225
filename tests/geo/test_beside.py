"""What lies beside a raster is read with it, though GDAL is told where nothing can lie there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from rtshpc.geo import raster
from rtshpc.geo.raster import has_mask, open_raster, reading

SCALED = "<PAMDataset><PAMRasterBand band='1'><Scale>0.5</Scale></PAMRasterBand></PAMDataset>"


def make(path: Path, **more: Any) -> None:
    common: dict[str, Any] = {"driver": "GTiff", "width": 8, "height": 8, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", **common, **more) as file:
        file.write(np.ones((1, 8, 8), np.uint8))


def settle(folder: Path, ago_s: float) -> None:
    """Make a folder look unchanged for so long."""
    then = time.time() - ago_s
    os.utime(folder, (then, then))


def seen(path: Path) -> tuple[bool, float, float]:
    with reading(), open_raster(path) as file:
        return has_mask(file), file.scales[0], file.transform.a


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize(
    ("beside", "content", "expected"),
    [
        ("a.tif.aux.xml", SCALED, (False, 0.5, 1.0)),
        ("a.TFW", "4\n0\n0\n-4\n2\n-2\n", (False, 1.0, 4.0)),
        ("a.tif.msk", None, (True, 1.0, 1.0)),
    ],
)
def test_a_file_that_appears_beside_a_raster_counts(
    tmp_path: Path, beside: str, content: str | None, expected: tuple[bool, float, float]
) -> None:
    path = tmp_path / "a.tif"
    make(path)
    settle(tmp_path, 100)
    assert seen(path) == (False, 1.0, 1.0)
    if content is None:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"), rasterio.open(path, "r+") as file:
            file.write_mask(np.eye(8, dtype=bool))
    else:
        (tmp_path / beside).write_text(content)
    assert (tmp_path / beside).exists()
    assert seen(path) == expected  # the folder has changed just now
    settle(tmp_path, 50)
    assert seen(path) == expected  # its new list is trusted


def test_a_folder_of_rasters_alone_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(raster.os, "scandir", lambda folder: listed.append(str(folder)) or scan(folder))
    (tmp_path / "masks").mkdir()
    for name in ("a.tif", "b.TIFF"):
        make(tmp_path / name, crs="EPSG:32610", transform=from_origin(400_000, 7_990_000, 4, 4))
    settle(tmp_path, 100)
    for name in ("a.tif", "b.TIFF", "a.tif"):
        assert seen(tmp_path / name) == (False, 1.0, 4.0)
    assert listed == [str(tmp_path)]
