"""Small pictures of scenes, for the overview map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rtshpc.core.config import DataConfig
from rtshpc.core.config.modality import Expression
from rtshpc.core.errors import SceneRejected
from rtshpc.core.records import replacing
from rtshpc.core.scenes import Scene
from rtshpc.geo.align import upright, valid_in
from rtshpc.geo.crs import trusted_grid
from rtshpc.geo.raster import Mask, find_bands, has_mask, invalid, open_raster, rejecting
from rtshpc.report.gallery import stretch

LONGEST_PX = 400
_QUALITY = 80
_LEAST_CACHE = 32 << 20


def picture_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the picture of a scene of so many px."""
    share = min(1.0, LONGEST_PX / max(height, width))
    return max(1, math.ceil(height * share)), max(1, math.ceil(width * share))


def quicklook(scene: Scene, data: DataConfig) -> bytes:
    """A WebP of the primary modality, north up as its grid is, clear where it holds nothing.

    Overviews are used where the file has them; else it is decoded once, a row of blocks at a time.

    Raises:
        SceneRejected: the raster cannot be read.
    """
    modality = data.modalities[data.primary]
    path = scene.files.get(data.primary, "") if modality.file else scene.image
    bands = modality.bands or Expression(modality.expression).names
    with rejecting(path), open_raster(path, data.max_pixels) as dataset:
        indexes = list(find_bands(dataset, bands, () if modality.file else data.band_names))
        pixels, valid = _decimated(dataset, indexes)
        _, rows, cols = upright(trusted_grid(dataset)[0])
        undeclared = dataset.nodata is None
    if undeclared or data.missing_value is not None:
        valid &= (pixels != (data.missing_value or 0)).any(axis=0)
    shown = (stretch(pixels, valid) * 255).astype(np.uint8)
    colours = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)
    image = np.dstack([colours[..., ::-1], np.where(valid, 255, 0).astype(np.uint8)])
    image = image[::-1] if rows else image
    image = image[:, ::-1] if cols else image
    done, packed = cv2.imencode(".webp", np.ascontiguousarray(image), [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    if not done:
        raise SceneRejected("unreadable", f"{scene.id}: its picture cannot be packed")
    return packed.tobytes()


def _decimated(dataset: DatasetReader, indexes: Sequence[int]) -> tuple[NDArray[Any], Mask]:
    """Bands at the size of a picture, and where none of them is missing.

    A row of blocks at a time, all bands of it: what is compressed is taken apart once, in a cache of two rows of blocks.
    """
    high, wide = picture_size(dataset.height, dataset.width)
    deep = max(rows for rows, _ in dataset.block_shapes)
    strips = min(high, math.ceil(dataset.height / deep))
    cache = _LEAST_CACHE + 2 * dataset.width * deep * sum(np.dtype(kind).itemsize for kind in dataset.dtypes)
    pixels, valid = list[NDArray[Any]](), list[Mask]()
    with rasterio.Env(GDAL_NUM_THREADS="1", GDAL_CACHEMAX=cache):
        for strip in range(strips):
            first, last = high * strip // strips, high * (strip + 1) // strips
            top, bottom = (round(row * dataset.height / high) for row in (first, last))
            window = Window(0, top, dataset.width, bottom - top)  # pyright: ignore[reportCallIssue]
            pixels.append(dataset.read(indexes, window=window, out_shape=(len(indexes), last - first, wide)))
            bad = [
                invalid(band, dataset.nodatavals[index - 1]) for band, index in zip(pixels[-1], indexes, strict=True)
            ]
            valid.append(valid_in(bad, np.ones((last - first, wide), np.bool_)))
            if has_mask(dataset):
                valid[-1] = valid[-1] & (dataset.read_masks(1, window=window, out_shape=(last - first, wide)) > 0)
    return np.concatenate(pixels, axis=1), np.concatenate(valid)


def write_quicklooks(scenes: Mapping[Path, Scene], data: DataConfig) -> list[str]:
    """Write the picture of each scene to its path.

    Returns:
        Which could not be drawn and why: a map is none the worse for it.
    """
    notes: list[str] = []
    for path, scene in scenes.items():
        try:
            picture = quicklook(scene, data)
        except SceneRejected as error:
            notes.append(f"{scene.id}: no picture: {error}")
            continue
        with replacing(path) as temporary:
            temporary.write_bytes(picture)
    return notes
