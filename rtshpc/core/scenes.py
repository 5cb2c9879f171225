"""Which scenes a data config names, and the fingerprints of input files. Standard library only."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, cast

from rtshpc.core.config import DataConfig
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import ConfigError, DataError, unknown
from rtshpc.core.records import file_sha256, read_json, write_json

GENERATOR_VERSION = 1
"""Raised by hand when `data.synthetic` draws other scenes from the same config."""

RASTER_SUFFIXES = frozenset({".tif", ".tiff", ".gtiff", ".jp2", ".vrt", ".img"})
"""Files of other kinds that a glob catches (`desktop.ini`, `.aux.xml`, `.ovr`) are no scenes."""

ANY = "*"
"""In `scenes.where`: any value but the empty one."""

VIRTUAL = "/vsi"
"""Begin of the names of GDAL's virtual files, e.g. `/vsicurl/https://...`; what they hold is asked of GDAL alone."""

_END = 1 << 20


class Scene(Section):
    """One scene of a data set; paths are absolute or relative to the current folder."""

    id: str = doc("unique name")
    image: str = doc("path of the GeoTIFF; empty = the index gives none, which rejects the scene")
    label: str = doc("path of the label file; empty = none", "")
    files: dict[str, str] = doc("modality -> raster of its own", {})
    ignore_file: str = doc("polygons of which some are ignore regions; empty = none", "")
    site: str = doc("site", "")
    date: str = doc("date of acquisition", "")
    split: str = doc("train, val or test, where the index says so", "")
    group: str = doc("scenes that overlap on the ground share it", "")
    generated: int | None = doc("index of a drawn scene in its site", None)


def list_scenes(data: DataConfig, generated_root: Path | None) -> list[Scene]:
    """The scenes of `data`, sorted by id; whether their files are there and whole is judged later.

    Args:
        data: the data set.
        generated_root: folder of drawn scenes; needed only where `scenes.generated` is given.

    Raises:
        DataError: the index is missing or empty, the glob matches nothing, or two scenes share an id.
        ConfigError: a column or a placeholder is unknown.
    """
    if data.scenes.generated is not None:
        scenes = _generated(data, generated_root)
    elif data.scenes.index:
        scenes = _indexed(data)
    else:
        scenes = _globbed(data)
    return in_order(scenes, data.name)


def in_order(scenes: Sequence[Scene], place: str) -> list[Scene]:
    """Scenes by id. Raises DataError where two share one; `place` says who listed them."""
    ordered = sorted(scenes, key=lambda scene: scene.id)
    for one, two in pairwise(ordered):
        if one.id == two.id:
            raise DataError(f'{place}: scene "{one.id}" is listed twice ({one.image}, {two.image}); ids must be unique')
    return ordered


def _generated(data: DataConfig, root: Path | None) -> list[Scene]:
    config = data.scenes.generated
    assert config is not None
    if root is None:
        raise DataError(f"{data.name}: scenes.generated needs a run folder to draw the scenes in")
    scenes: list[Scene] = []
    for site in config.sites:
        for index in range(config.scenes_per_site):
            name = f"{site}_{index:03d}"
            label = str(root / f"{name}_instances.tif") if data.labels.kind != "none" else ""
            scenes.append(Scene(id=name, image=str(root / f"{name}.tif"), label=label, site=site, generated=index))
    return scenes


def _indexed(data: DataConfig) -> list[Scene]:
    path = Path(data.root) / data.scenes.index
    rows = read_index(path)
    if not rows:
        raise DataError(f"{path}: the index lists no scene")
    known = {key for row in rows for key in row}
    columns = data.scenes.columns
    for field in type(columns).model_fields:
        column = getattr(columns, field)
        if column and column not in known:
            raise ConfigError(unknown(f"{path}: scenes.columns.{field}", column, known))
    for column in data.scenes.where:
        if column not in known:
            raise ConfigError(unknown(f"{path}: scenes.where", column, known))
    kept = [row for row in rows if _matches(row, data.scenes.where)]
    if not kept:
        raise DataError(f"{path}: none of {len(rows)} rows matches scenes.where = {dict(data.scenes.where)}")
    return [_from_row(data, row, number) for number, row in enumerate(kept, 1)]


def _matches(row: Mapping[str, str], where: Mapping[str, str]) -> bool:
    for column, wanted in where.items():
        value = row.get(column, "")
        if not value if wanted == ANY else value != wanted:
            return False
    return True


def read_index(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV, or the properties of a GeoJSON's features, as text.

    Raises:
        DataError: it is not there, or neither.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such index; data.root is relative to the current folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the index cannot be read ({error})") from None
    if path.suffix.lower() in (".json", ".geojson"):
        try:
            features = cast("list[dict[str, Any]]", json.loads(text)["features"])
            tables = [dict(feature.get("properties") or {}) for feature in features]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"{path}: not a GeoJSON FeatureCollection") from None
    else:
        try:
            # The module looks for line ends itself: they may lie inside quotes.
            tables = [cast("dict[str, Any]", row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        except csv.Error as error:
            raise DataError(f"{path}: the index is no CSV ({error})") from None
    rows = [{str(key).strip(): _text(value) for key, value in table.items()} for table in tables]
    # Spreadsheets end in rows of nothing.
    return [row for row in rows if any(row.values())]


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _from_row(data: DataConfig, row: Mapping[str, str], number: int) -> Scene:
    """The scene of a row; one without a name or an image has no image, which rejects it and no other."""
    columns = data.scenes.columns

    def value(column: str) -> str:
        return row.get(column, "") if column else ""

    name, image = value(columns.scene), value(columns.image)
    if not name:
        name, image = f"unnamed row {number}" + (f" ({image})" if image else ""), ""
    facts = {**row, "scene": name, "site": value(columns.site), "stem": Path(image).stem}
    return scene_of(
        data, image, value(columns.label), facts, value(columns.date), value(columns.split), value(columns.group)
    )


def _globbed(data: DataConfig) -> list[Scene]:
    root = Path(data.root)
    pattern = data.scenes.glob
    refusal = f'scenes.glob = "{pattern}" is no pattern relative to data.root'
    if PurePath(pattern).is_absolute():
        raise ConfigError(f"{refusal}: it is absolute")
    try:
        found = sorted(path for path in root.glob(pattern) if path.suffix.lower() in RASTER_SUFFIXES and path.is_file())
    except ValueError as error:
        raise ConfigError(f"{refusal}: {error}") from None
    if not found:
        raise DataError(
            f'{root}: scenes.glob = "{pattern}" matches no GeoTIFF; data.root is relative to the current folder'
        )
    scenes: list[Scene] = []
    for path in found:
        relative = path.relative_to(root).as_posix()
        facts = {"scene": path.stem, "site": _site_of(data, relative), "stem": path.stem}
        scenes.append(scene_of(data, relative, "", facts))
    return scenes


def _site_of(data: DataConfig, relative: str) -> str:
    """The first group of `site_pattern` in the path; without a pattern the whole set is one site."""
    if not data.scenes.site_pattern:
        return data.name
    try:
        match = re.search(data.scenes.site_pattern, relative)
    except re.error as error:
        raise ConfigError(
            f'scenes.site_pattern = "{data.scenes.site_pattern}" is no regular expression: {error}'
        ) from None
    if match is None or not match.groups():
        raise ConfigError(
            f'scenes.site_pattern = "{data.scenes.site_pattern}" finds no site (its first group) in {relative}'
        )
    return match.group(1)


def scene_of(
    data: DataConfig,
    image: str,
    label: str,
    facts: Mapping[str, str],
    date: str = "",
    split: str = "",
    group: str = "",
) -> Scene:
    """The scene of an image: its own files by the templates of `data`.

    Args:
        data: the data set; names of files are relative to its root.
        image: the GeoTIFF; empty = there is none.
        label: the label file; empty = by the template, if any.
        facts: `scene`, `site` and `stem`, and what else may fill a template.
        date: of acquisition.
        split: by the index.
        group: by the index.

    Raises:
        ConfigError: a template has a placeholder that is no fact.
    """

    def fill(template: str, place: str) -> str:
        text = _fill(template, facts, place)
        return _placed(data, text) if text else ""

    files = {
        name: fill(modality.file, f"modalities.{name}.file")
        for name, modality in data.modalities.items()
        if modality.file
    }
    if data.labels.kind in ("none", "band"):
        label_path = ""
    elif data.labels.file:
        label_path = fill(data.labels.file, "labels.file")
    else:
        label_path = _placed(data, label) if label else ""
    return Scene(
        id=facts["scene"],
        image=_placed(data, image) if image else "",
        label=label_path,
        files=files,
        ignore_file=fill(data.labels.ignore_file, "labels.ignore_file"),
        site=facts["site"],
        date=date,
        split=split,
        group=group,
    )


def _placed(data: DataConfig, name: str) -> str:
    """A file's path; the name of a virtual one is no path, and two slashes in it are two."""
    return name if name.startswith(VIRTUAL) else str(Path(data.root) / name)


def _fill(template: str, facts: Mapping[str, str], place: str) -> str:
    """Put `facts` (and index columns) in the `{name}`s of a path; no format language, so no surprises."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in facts:
            raise ConfigError(unknown(place, "{" + name + "}", facts))
        return facts[name]

    return re.sub(r"\{([^{}]*)\}", one, template)


def data_fingerprint(data: DataConfig, scenes: Sequence[Scene], cache: Path | None) -> str:
    """SHA-256 over every input's relative path, size and ends, and the facts the index gives.

    Args:
        data: the data set; its root is left out of paths, so that a moved folder keeps its fingerprint.
        scenes: what `list_scenes` gave.
        cache: JSON file that remembers file -> (size, mtime, hash); None = none.
    """
    generated = data.scenes.generated
    if generated is not None:
        text = json.dumps({"generator": GENERATOR_VERSION, "config": generated.model_dump(mode="json")}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
    return hashlib.sha256(b"".join(_described(data, scenes, cache))).hexdigest()


def scene_fingerprints(data: DataConfig, scenes: Sequence[Scene], cache: Path | None) -> list[str]:
    """As `data_fingerprint`, one a scene; of virtual files the name alone counts."""
    return [hashlib.sha256(lines).hexdigest() for lines in _described(data, scenes, cache)]


def _described(data: DataConfig, scenes: Sequence[Scene], cache: Path | None) -> list[bytes]:
    """A scene's facts and inputs as lines of JSON."""
    known = _cached(cache)
    seen: dict[str, dict[str, Any]] = {}
    root = Path(data.root)
    found: list[bytes] = []
    for scene in scenes:
        lines = [json.dumps([scene.id, scene.site, scene.date, scene.split, scene.group])]
        for role, path in _inputs(scene):
            entry = seen.get(path)
            if entry is None:
                entry = seen[path] = _file_entry(Path(path), known.get(str(Path(path).absolute())))
            lines.append(json.dumps([role, _relative(path, root), entry["size"], entry["hash"]]))
        found.append("".join(f"{line}\n" for line in lines).encode())
    if cache is not None:
        fresh = {str(Path(path).absolute()): entry for path, entry in seen.items()}
        if fresh != known:
            write_json(cache, fresh)
    return found


def weights_sha256(path: Path, cache: Path, remember: bool) -> str:
    """SHA-256 of a file of weights.

    Args:
        path: the file.
        cache: JSON file that remembers file -> (size, mtime, hash).
        remember: write what was not known; else only read.

    Raises:
        OSError: the file cannot be read.
    """
    stat, known, name = path.stat(), _cached(cache), str(path.absolute())
    entry = known.get(name, {})
    if entry.get("size") == stat.st_size and entry.get("mtime_ns") == stat.st_mtime_ns:
        return str(entry["hash"])
    digest = file_sha256(path)
    if remember:
        write_json(cache, {**known, name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "hash": digest}})
    return digest


def _cached(cache: Path | None) -> dict[str, dict[str, Any]]:
    value: Any = read_json(cache) if cache is not None else None
    return cast("dict[str, dict[str, Any]]", value) if isinstance(value, dict) else {}


def _inputs(scene: Scene) -> Iterable[tuple[str, str]]:
    yield "image", scene.image
    if scene.label:
        yield "label", scene.label
    for name in sorted(scene.files):
        if scene.files[name]:
            yield f"modality {name}", scene.files[name]
    if scene.ignore_file:
        yield "ignore", scene.ignore_file


def _relative(path: str, root: Path) -> str:
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return Path(path).as_posix()


def _file_entry(path: Path, old: dict[str, Any] | None) -> dict[str, Any]:
    """Size, mtime and the hash of the first and last MiB; an absent file is an input too: its absence counts."""
    try:
        stat = path.stat()
        if old is not None and old.get("size") == stat.st_size and old.get("mtime_ns") == stat.st_mtime_ns:
            return old
        with path.open("rb") as file:
            ends = file.read(_END)
            if stat.st_size > _END:
                file.seek(max(_END, stat.st_size - _END))
                ends += file.read(_END)
    except (OSError, ValueError):
        return {"size": -1, "mtime_ns": 0, "hash": "absent"}
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "hash": hashlib.sha256(ends).hexdigest()}
