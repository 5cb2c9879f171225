"""What a user gives to map -> scenes: a list, an index, a folder, or one raster. Standard library only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import ConfigError, DataError, unknown
from rtshpc.core.scenes import RASTER_SUFFIXES, VIRTUAL, Scene, in_order, read_index, scene_of

INDEX_SUFFIXES = (".csv", ".json", ".geojson")
COLUMNS = ("scene", "image", "site", "date")
"""Columns of an index to map, where the training's index has no other name for them."""

_REMOTE = {"https://": "/vsicurl/https://", "http://": "/vsicurl/http://", "s3://": "/vsis3/", "gs://": "/vsigs/"}

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

Row = Mapping[str, str]


def scenes_to_map(given: str, data: DataConfig, root: str = "") -> tuple[DataConfig, list[Scene]]:
    """The scenes that SCENES means, by id, and the data config with the root that their files are relative to.

    Args:
        given: a CSV or GeoJSON index (columns `image`, and `scene`, `site`, `date` where it has them), a text file with a
            raster a line, a folder of rasters, or one raster; rasters may be virtual (`/vsizip/...`) or URLs.
        data: of the training; its templates say where the files of other modalities are.
        root: what names of files are relative to; empty = the folder of the list, the folder itself, or nothing.

    Raises:
        DataError: there is no such thing, it names no raster, or two scenes have one name.
        ConfigError: an index has no column of images, or a template has an unknown placeholder.
    """
    path = Path(given)
    remote = _virtual(given) != given or given.startswith(VIRTUAL)
    if not remote and not path.exists():
        raise DataError(f"{given}: no such list, index, folder or raster to map")
    if remote or path.suffix.lower() in RASTER_SUFFIXES:
        folder, rows = ".", [{"image": given}]
    elif path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.suffix.lower() in RASTER_SUFFIXES and one.is_file())
        folder, rows = given, [{"image": name, "site": path.resolve().name} for name in names]
    elif path.suffix.lower() in INDEX_SUFFIXES:
        folder, rows = str(path.parent), _of_index(path, data)
    else:
        folder, rows = str(path.parent), [{"image": line} for line in _lines(path)]
    if not rows:
        raise DataError(f"{given}: names no raster to map ({', '.join(sorted(RASTER_SUFFIXES))})")
    data = data.model_copy(update={"root": root or folder})
    return data, in_order([_scene(data, row) for row in _named(rows)], given)


def _virtual(name: str) -> str:
    """The name under which GDAL reads a URL; other names as they are."""
    for scheme, prefix in _REMOTE.items():
        if name.lower().startswith(scheme):
            return prefix + name[len(scheme) :]
    return name


def _of_index(path: Path, data: DataConfig) -> list[Row]:
    """Rows of an index, under the names of COLUMNS as well as its own."""
    rows, columns = read_index(path), data.scenes.columns
    known = {key for row in rows for key in row}
    names = {name: next((key for key in (getattr(columns, name), name) if key in known), "") for name in COLUMNS}
    if rows and not names["image"]:
        raise ConfigError(unknown(f"{path}: column of images", columns.image, known))
    return [{**row, **{name: row.get(key, "") for name, key in names.items() if key}} for row in rows]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no list of rasters: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _named(rows: Sequence[Row]) -> list[Row]:
    """Rows with a name each: the index's, else the stem of the image, else, where two share that, the whole path."""
    stems = Counter(Path(row["image"]).stem for row in rows if not row.get("scene"))
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        image = row.get("image", "")
        stem = Path(image).stem
        whole = image.removesuffix(Path(image).suffix).strip("/.").replace("/", "-")
        own = f"unnamed row {number}" if not image else stem if stems[stem] == 1 else whole
        found.append({**row, "scene": row.get("scene") or own})
    return found


def _scene(data: DataConfig, row: Row) -> Scene:
    facts = {"site": "", **row, "stem": Path(row["image"]).stem}
    # What a list says too little of to find is missing, as a file that is not there.
    known = {
        name: one
        for name, one in data.modalities.items()
        if one.required or facts.keys() >= set(_PLACEHOLDER.findall(one.file))
    }
    labels = data.labels.model_copy(update={"kind": "none", "ignore_file": ""})
    plain = data.model_copy(update={"labels": labels, "modalities": known})
    return scene_of(plain, _virtual(row["image"]), "", facts, row.get("date", ""))
