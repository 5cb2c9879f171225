"""Small rasters and configs for the tests of geo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from rtshpc.core.config import DataConfig
from rtshpc.core.scenes import Scene

SHARED = Path(__file__).resolve().parents[3] / "shared"
UTM = "EPSG:32608"
PLACE = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 7_600_000.0)
BANDS = ("red", "green", "blue", "ndvi", "nir")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared (real scenes and odd rasters)")


def write_tif(
    path: Path,
    pixels: Any,
    names: Sequence[str] = (),
    crs: str | None = UTM,
    transform: Affine | None = PLACE,
    scale: float | None = None,
    **profile: Any,
) -> Path:
    """Write (C, H, W) or (H, W) as a GeoTIFF."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crs": crs, "transform": transform, "dtype": pixels.dtype, **profile}
    options = {key: value for key, value in options.items() if value is not None}
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **options) as file:
        file.write(pixels)
        for index, name in enumerate(names, 1):
            file.set_band_description(index, name)
        if scale is not None:
            file.scales = [scale] * count
    return path


def reflectance(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Five int16 bands as in the paper's form: red, green, blue, ndvi, nir, x 10,000."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(200, 1200, (5, height, width)).astype(np.int16)
    pixels[4] = draw.integers(1500, 3500, (height, width))
    red, nir = pixels[0].astype(float), pixels[4].astype(float)
    pixels[3] = np.rint((nir - red) / (nir + red) * 10_000)
    return pixels


def slumps(height: int = 64, width: int = 64) -> np.ndarray:
    """A 0/1 mask of two slumps, one with a hole."""
    mask = np.zeros((height, width), np.uint8)
    mask[5:20, 5:20] = 1
    mask[10:14, 10:14] = 0
    mask[40:50, 30:45] = 1
    return mask


def write_sample(folder: Path, pixels: Any = None, mask: Any = None, **profile: Any) -> Path:
    """A folder with image.tif and mask.tif."""
    pixels = reflectance() if pixels is None else pixels
    options = {"names": BANDS, "scale": 1e-4, "nodata": -32768, **profile}
    write_tif(folder / "image.tif", pixels, **options)
    write_tif(folder / "mask.tif", slumps() if mask is None else mask)
    return folder


def config(root: Path, **changes: Any) -> DataConfig:
    """A data set of RGB, NDVI and NIR with masks."""
    values: dict[str, Any] = {
        "name": "test",
        "root": str(root),
        "scenes": {"glob": "*/image.tif"},
        "modalities": {
            "rgb": {"bands": ["red", "green", "blue"]},
            "ndvi": {"bands": ["ndvi"]},
            "nir": {"bands": ["nir"]},
        },
        "primary": "rgb",
        "labels": {"kind": "mask"},
        "chip": {"size_px": 32, "overlap_px": 8},
    }
    return DataConfig.model_validate({**values, **changes})


def scene_of(folder: Path, **changes: Any) -> Scene:
    """The scene of a sample folder."""
    values = {"id": folder.name, "image": str(folder / "image.tif"), "label": str(folder / "mask.tif")}
    return Scene.model_validate({**values, **changes})
