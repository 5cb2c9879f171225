"""What can be compared: map runs, and layers of polygons in any format that GDAL reads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio.raw
import pyproj
import shapely

from rtshpc.core.errors import DataError
from rtshpc.core.paths import RunPaths
from rtshpc.mapping import features as table
from rtshpc.mapping.compare.match import areal
from rtshpc.mapping.features import Features, read_features
from rtshpc.mapping.layers import MAPPED


@dataclass(frozen=True)
class Source:
    """A map.

    Attributes:
        name: as it was asked for.
        features: its instances.
        grounds: the scenes that were mapped, with site and date; None where it is not known.
    """

    name: str
    features: Features
    grounds: Features | None


def read_source(path: Path) -> Source:
    """A map run's layers, or a file of polygons, of which the mapped ground is not known.

    Raises:
        DataError: nothing can be read there.
    """
    if not path.is_dir():
        return Source(str(path), read_layer(path), None)
    layers = RunPaths(path).layers
    files = layers / "slumps.parquet", layers / "footprints.parquet"
    if not all(file.is_file() for file in files):
        raise DataError(f"{path}: holds no finished map (no {files[0].relative_to(path)}); see `status {path}`")
    instances, grounds = map(read_features, files)
    mapped = np.array([state == MAPPED for state in grounds["state"]], np.bool_)
    return Source(str(path), instances, grounds.take(mapped))


def read_layer(path: Path) -> Features:
    """The polygons of a vector file, its first layer, with their columns; broken ones are repaired, others left out.

    Raises:
        DataError: it cannot be read, or has no CRS.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            meta, _, blobs, columns = pyogrio.raw.read(path, force_2d=True)
        shapes = np.array([None if blob is None else shapely.from_wkb(blob) for blob in blobs], np.object_)
    except (RuntimeError, ValueError, shapely.errors.ShapelyError) as error:
        raise DataError(
            f"{path}: cannot be read as a layer of polygons: {' '.join(str(error).split())[:200]}"
        ) from None
    if not meta["crs"]:
        raise DataError(f"{path}: has no CRS")
    repaired: list[Any] = [None if shape is None else areal(shapely.make_valid(shape)) for shape in shapes]
    kept = np.array([shape is not None and not shape.is_empty for shape in repaired], np.bool_)
    crs = pyproj.CRS.from_user_input(meta["crs"]).to_wkt()
    found = dict(zip(meta["fields"].tolist(), columns, strict=True))
    return Features(crs, np.array([*repaired, None], np.object_)[:-1], found).take(kept)


def words(features: Features, name: str, place: str) -> list[str]:
    """A column as text.

    Raises:
        DataError: there is no such column.
    """
    if name not in features.columns:
        raise DataError(f'{place}: has no column "{name}", but {", ".join(features.columns) or "none"}')
    return [str(value) for value in features[name]]


def sites_of(features: Features) -> list[str]:
    """The column `site`, empty words without one."""
    return words(features, table.SITE, "") if table.SITE in features.columns else [""] * len(features)
