"""Outlines on the ground with a column of values each: the table that merge writes and all later steps read.

A table is one GeoParquet file (version 1.1.0): GeoPandas, QGIS and GDAL open it, and the same table gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyproj
import shapely
from numpy.typing import NDArray
from pyarrow import parquet

from rtshpc.core.errors import RunError
from rtshpc.core.records import replacing
from rtshpc.geo.align import same_crs

GEOMETRY = "geometry"
SCORE, CLASS, SCENE, DATE, SITE = "score", "class", "scene", "date", "site"
AREA, PERIMETER, ELONGATION = "area_m2", "perimeter_m", "elongation"
SLOPE, ELEVATION, ASPECT = "slope_deg", "elevation_m", "aspect_deg"
MODEL, CONTAINER = "model", "container"
COLUMNS = (SCORE, CLASS, AREA, PERIMETER, ELONGATION, SCENE, DATE, SITE, MODEL, CONTAINER)
"""What every table of mapped instances has, the geometry apart; `mean_*`, `ring_*` and the terrain's come with the data."""


@dataclass(frozen=True)
class Features:
    """Polygons of one CRS and their columns.

    Attributes:
        crs_wkt: coordinate reference system, WKT; coordinates are x before y whatever it says of its axes.
        geometry: (N,) shapely polygons and multipolygons; None where the place is not known.
        columns: name -> (N,) float64 (NaN = not known), int64, or words (object array of str; "" = not known), in the
            order of the files.
    """

    crs_wkt: str
    geometry: NDArray[np.object_]
    columns: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "geometry", _objects(self.geometry))
        object.__setattr__(self, "columns", {name: _column(values) for name, values in self.columns.items()})
        wrong = [name for name, values in self.columns.items() if len(values) != len(self.geometry)]
        if wrong:
            raise ValueError(f"column {wrong[0]} has {len(self.columns[wrong[0]])} values of {len(self.geometry)}")

    def __len__(self) -> int:
        return len(self.geometry)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def take(self, chosen: NDArray[Any]) -> Features:
        """The rows of a boolean mask or of indexes, in their order."""
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Features(self.crs_wkt, self.geometry[chosen], columns)

    def rows_by(self, name: str) -> dict[str, NDArray[np.int64]]:
        """Value of a column of words -> the rows that have it."""
        found: dict[str, list[int]] = {}
        for row, value in enumerate(self[name]):
            found.setdefault(value, []).append(row)
        return {value: np.array(rows, np.int64) for value, rows in found.items()}

    def with_columns(self, **columns: Any) -> Features:
        """The same rows with further (or other) columns."""
        return Features(self.crs_wkt, self.geometry, {**self.columns, **columns})

    def same(self, other: Features) -> bool:
        """Whether CRS, outlines (bit by bit), columns and values are the same, in the same order."""
        if len(self) != len(other) or list(self.columns) != list(other.columns):
            return False
        blobs = [shapely.to_wkb(one.geometry, byte_order=1).tolist() for one in (self, other)]
        values = [(column, other[name]) for name, column in self.columns.items()]
        return (
            same_crs(self.crs_wkt, other.crs_wkt)
            and blobs[0] == blobs[1]
            and all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in values)
        )

    def ordered(self) -> Features:
        """Rows by site, date, scene, from the top, from the left, then by whatever else tells two apart.

        The order depends on what the rows say, never on the order in which they came.
        """
        bounds = np.nan_to_num(shapely.bounds(self.geometry).reshape(-1, 4))
        words = [self.columns.get(name, np.full(len(self), "")) for name in (SITE, DATE, SCENE)]
        wkb = [blob or b"" for blob in shapely.to_wkb(self.geometry, byte_order=1)]
        rest = [values for _, values in sorted(self.columns.items())]
        keys = [
            (
                *(str(word[row]) for word in words),
                -bounds[row, 3],
                bounds[row, 0],
                wkb[row],
                [str(v[row]) for v in rest],
            )
            for row in range(len(self))
        ]
        return self.take(np.array(sorted(range(len(self)), key=keys.__getitem__), np.int64))


def joined(tables: Sequence[Features]) -> Features:
    """Tables of one CRS as one; a column that one of them lacks is not known there.

    Raises:
        ValueError: no table, or tables of several CRSs.
    """
    first = tables[0]
    if not all(same_crs(table.crs_wkt, first.crs_wkt) for table in tables[1:]):
        raise ValueError("tables of several CRSs cannot be one")
    known = {name: values.dtype.kind for table in reversed(tables) for name, values in table.columns.items()}
    names = dict.fromkeys(name for table in tables for name in table.columns)
    columns = {name: np.concatenate([_values(table, name, known[name]) for table in tables]) for name in names}
    return Features(first.crs_wkt, np.concatenate([table.geometry for table in tables]), columns)


def _values(table: Features, name: str, kind: str) -> NDArray[Any]:
    """A column, or as many unknowns of its kind."""
    if name in table.columns:
        return table.columns[name]
    return _objects([""] * len(table)) if kind == "O" else np.full(len(table), np.nan)


def write_features(path: Path, features: Features) -> None:
    """Write a table as GeoParquet, whole or not at all."""
    fields: dict[str, Any] = {GEOMETRY: pa.array(shapely.to_wkb(features.geometry, byte_order=1), pa.binary())}
    for name, values in features.columns.items():
        # An unknown number is null, as readers of the format expect, and not NaN.
        kind = {"O": pa.string(), "i": pa.int64(), "f": pa.float64()}[values.dtype.kind]
        fields[name] = pa.array(values, kind, from_pandas=values.dtype.kind == "f")
    table = pa.table(fields).replace_schema_metadata({"geo": json.dumps(_geo(features), sort_keys=True)})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_features(path: Path) -> Features:
    """Read what `write_features` wrote; the CRS comes back as WKT of the same meaning.

    Raises:
        RunError: the file is not there, damaged, or no GeoParquet of polygons.
    """
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        geo = json.loads((table.schema.metadata or {})[b"geo"])
        crs_wkt = _wkt(json.dumps(geo["columns"][GEOMETRY]["crs"]))
        geometry = shapely.from_wkb(table[GEOMETRY].to_numpy(zero_copy_only=False))
    except (
        OSError,
        pa.ArrowException,
        KeyError,
        ValueError,
        pyproj.exceptions.CRSError,
        shapely.GEOSException,
    ) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]
        raise RunError(f"{path}: no table of outlines can be read: {why}") from None
    names = [name for name in table.column_names if name != GEOMETRY]
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in names}
    return Features(crs_wkt, geometry, columns)


@lru_cache(maxsize=256)
def _wkt(projjson: str) -> str:
    """WKT of a CRS; making one of PROJJSON takes long."""
    return pyproj.CRS.from_json(projjson).to_wkt()


def _geo(features: Features) -> dict[str, Any]:
    """The file's `geo` metadata, GeoParquet 1.1.0."""
    kinds = {3: "Polygon", 6: "MultiPolygon"}
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted(kinds[int(kind)] for kind in set(shapely.get_type_id(features.geometry)) - {-1}),
        "crs": pyproj.CRS.from_wkt(features.crs_wkt).to_json_dict(),
    }
    if not shapely.is_missing(features.geometry).all():
        column["bbox"] = [float(value) for value in shapely.total_bounds(features.geometry)]
    return {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}


def _objects(values: Any) -> NDArray[np.object_]:
    """A one-dimensional object array, also of shapes that are sequences themselves."""
    if isinstance(values, np.ndarray) and values.dtype == np.object_ and values.ndim == 1:
        return values
    found = np.empty(len(values), np.object_)
    found[:] = list(values)
    return found


def _column(values: Any) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "f":
        return array.astype(np.float64, copy=False)
    return (
        _objects(["" if value is None else str(value) for value in values]) if len(values) else np.empty(0, np.object_)
    )
