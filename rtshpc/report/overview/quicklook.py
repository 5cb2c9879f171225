"""Small pictures of scenes, for the overview map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.modality import Expression
from rtshpc.core.records import replacing
from rtshpc.core.scenes import Scene
from rtshpc.geo.align import upright
from rtshpc.geo.crs import trusted_grid
from rtshpc.geo.raster import find_bands, open_raster, rejecting
from rtshpc.report.gallery import stretch

LONGEST_PX = 400
_QUALITY = 80


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
        shape = picture_size(dataset.height, dataset.width)
        pixels = dataset.read(indexes, out_shape=(len(indexes), *shape))
        valid = (dataset.read_masks(indexes, out_shape=(len(indexes), *shape)) > 0).all(axis=0)
        _, rows, cols = upright(trusted_grid(dataset)[0])
        undeclared = dataset.nodata is None
    valid &= np.isfinite(pixels).all(axis=0)
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
