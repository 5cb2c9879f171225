"""What finds the layers again: a STAC collection with an item a scene, and virtual rasters over the scenes' images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pystac
import rasterio
import shapely

from rtshpc.core.errors import MissingExtra, RunError, SceneRejected
from rtshpc.core.records import replacing, write_json
from rtshpc.geo.crs import crs_facts
from rtshpc.geo.raster import open_raster
from rtshpc.hpc.gdal import gdal
from rtshpc.mapping.layers import Outcome, footprint

PARQUET, PACKAGE, COG = "application/vnd.apache.parquet", "application/geopackage+sqlite3", pystac.MediaType.COG
_KINDS = {".parquet": PARQUET, ".gpkg": PACKAGE, ".tif": COG, ".vrt": "application/xml", ".html": "text/html"}
_PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_EVER = (datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
"""Of a scene without a date that can be read; STAC wants a time of every item."""
_FORMS = (
    ("%Y-%m-%d", timedelta(days=1)),
    ("%Y%m%d", timedelta(days=1)),
    ("%Y/%m/%d", timedelta(days=1)),
    ("%Y-%m", None),
    ("%Y", None),
)
_VIRTUAL = re.compile(r"^/vsi(?:curl/|(s3|gs)/)")


@dataclass(frozen=True)
class Entry:
    """A mapped scene in the catalog.

    Attributes:
        outcome: what is known of the scene.
        folder: where its item and its files are.
        files: what they are for -> file.
        properties: further facts, numbers and words.
    """

    outcome: Outcome
    folder: Path
    files: Mapping[str, Path]
    properties: Mapping[str, Any] = field(default_factory=dict[str, Any])


def times(date: str) -> tuple[datetime, datetime] | None:
    """First and last second that a date means: a day, a month, a year, or an instant; None where it means none."""
    text = date.strip()
    with suppress(ValueError, OverflowError):
        for form, length in _FORMS:
            with suppress(ValueError):
                start = datetime.strptime(text, form).replace(tzinfo=UTC)
                end = start + length if length else _next(start, form)
                return start, end - timedelta(seconds=1)
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC), moment.astimezone(UTC)
    return None


def _next(start: datetime, form: str) -> datetime:
    """The start of the next month or year."""
    if form == "%Y" or start.month == 12:
        return start.replace(year=start.year + 1, month=1)
    return start.replace(month=start.month + 1)


def write_catalog(path: Path, name: str, title: str, entries: Sequence[Entry], files: Mapping[str, Path]) -> list[Path]:
    """Write the collection `path` and an `item.json` in the folder of each entry; links are relative.

    Args:
        path: of the collection.
        name: its id.
        title: for people.
        entries: the mapped scenes.
        files: of the whole run.

    Raises:
        RunError: what is read back is not what was written.
    """
    items = [_item(entry) for entry in sorted(entries, key=lambda entry: entry.outcome.scene)]
    known = [times(entry.outcome.date) or _EVER for entry in entries] or [_EVER]
    boxes = [list(item.bbox) for item in items if item.bbox] or [[-180.0, -90.0, 180.0, 90.0]]
    collection = pystac.Collection(
        id=name,
        description=f"Retrogressive thaw slumps mapped in {len(items)} scenes.",
        extent=pystac.Extent(
            pystac.SpatialExtent([_around(boxes)]),
            pystac.TemporalExtent([[min(start for start, _ in known), max(end for _, end in known)]]),
        ),
        title=title,
        license="other",
        assets=_assets(files, path.parent),
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    # A collection that knew its place would lay out its items itself.
    collection.add_items(items)
    collection.set_self_href(str(path))
    written = [path, *(Path(str(item.get_self_href())) for item in items)]
    for item in items:
        write_json(Path(str(item.get_self_href())), item.to_dict(include_self_link=False))
    write_json(path, collection.to_dict(include_self_link=False))
    _check(path, items)
    return written


def _item(entry: Entry) -> pystac.Item:
    outcome, shape, ground = entry.outcome, footprint(entry.outcome), entry.outcome.ground
    assert ground is not None
    start, end = times(outcome.date) or _EVER
    spelled = {"start_datetime": _spell(start), "end_datetime": _spell(end)} if start != end else {}
    item = pystac.Item(
        id=outcome.scene,
        geometry=None if shape is None else shapely.geometry.mapping(shape),
        bbox=None if shape is None else _box(shape),
        datetime=None if spelled else start,
        properties={
            **spelled,
            "proj:wkt2": ground.crs_wkt,
            "proj:shape": [ground.height, ground.width],
            "proj:transform": list(ground.transform),
            "rtshpc:site": outcome.site,
            "rtshpc:date": outcome.date,
            **entry.properties,
        },
        stac_extensions=[_PROJECTION],
        assets={**_assets(entry.files, entry.folder), "image": pystac.Asset(_address(outcome.image), roles=["source"])},
    )
    item.set_self_href(str(entry.folder / "item.json"))
    return item


def _spell(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _assets(files: Mapping[str, Path], folder: Path) -> dict[str, pystac.Asset]:
    found: dict[str, pystac.Asset] = {}
    for name, path in files.items():
        href = f"./{Path(os.path.relpath(path, folder)).as_posix()}"
        found[name] = pystac.Asset(href, media_type=_KINDS[path.suffix], roles=["data"])
    return found


def _address(image: str) -> str:
    """A path or URL that others can open; GDAL's names of remote files become URLs again."""
    match = _VIRTUAL.match(image)
    if match is None:
        return image if image.startswith("/vsi") else Path(image).absolute().as_posix()
    rest = image[match.end() :]
    return f"{match.group(1)}://{rest}" if match.group(1) else rest


def _box(shape: Any) -> list[float]:
    """West, south, east, north; of a shape in parts on both sides of longitude 180, west is larger than east."""
    west, south, east, north = shape.bounds
    if west == -180 and east == 180:
        parts = [part.bounds for part in shapely.get_parts(shape)]
        ahead = [part[0] for part in parts if part[2] == 180]
        behind = [part[2] for part in parts if part[0] == -180]
        # A part from edge to edge goes round the pole.
        if min(ahead) > max(behind):
            west, east = min(ahead), max(behind)
    return [float(west), float(south), float(east), float(north)]


def _around(boxes: Sequence[Sequence[float]]) -> list[float]:
    """The narrowest box around boxes: its sides lie at the widest gap between their longitudes."""
    spans = sorted((west, east if east >= west else east + 360) for west, _, east, _ in boxes)
    # The widest of those that go on over 180 comes back to where the first ones lie.
    first, reached = spans[0][0], max(spans[0][1], max(end for _, end in spans) - 360)
    gap, west, east = 0.0, first, reached
    for start, end in [*spans[1:], (first + 360, first + 360)]:
        if start - reached > gap:
            gap, west, east = start - reached, start, reached
        reached = max(reached, end)
    if gap == 0:
        west, east = -180.0, 180.0
    west, east = west - 360 if west >= 180 else west, east - 360 if east > 180 else east
    return [west, min(box[1] for box in boxes), east, max(box[3] for box in boxes)]


def _check(path: Path, items: Sequence[pystac.Item]) -> None:
    """Read the collection back with all that it names.

    Raises:
        RunError: an item differs, or a file of our own is not there.
    """
    collection = pystac.Collection.from_file(str(path))
    found = {item.id: item for item in collection.get_items(recursive=True)}
    wrong = [item.id for item in items if item.id not in found or found[item.id].geometry != _json(item.geometry)]
    for owner in (collection, *found.values()):
        for name, asset in owner.assets.items():
            if name != "image" and not Path(str(asset.get_absolute_href())).is_file():
                wrong.append(f"{owner.id}: {asset.href}")
    if wrong or len(found) != len(items):
        raise RunError(f"{path}: does not read back as it was written: {', '.join(wrong[:3])}")


def _json(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return (
        [_json(one) for one in value]
        if isinstance(value, list | tuple)
        else ({key: _json(one) for key, one in value.items()} if isinstance(value, dict) else value)
    )


def write_mosaics(name: Callable[[int], Path], images: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Virtual rasters (VRT) over images, one for each CRS and kind of bands, by GDAL's bindings in a process of their own.

    Args:
        name: number from 0 on -> path of a virtual raster.
        images: paths or GDAL's virtual names.

    Returns:
        The files, and what could not be part of one and why.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    notes: list[str] = []
    for image in sorted(set(images)):
        try:
            with open_raster(image) as dataset:
                a, b, _, d, e, _ = tuple(dataset.transform)[:6]
                if b or d or a < 0 or e > 0:
                    notes.append(f"{image}: no part of a virtual raster: it is rotated, mirrored or south-up")
                    continue
                facts = (dataset.dtypes, dataset.nodatavals, dataset.descriptions, dataset.scales, dataset.offsets)
                wkt = dataset.crs.to_wkt()
                key = (crs_facts(wkt).name, wkt, *(str(band) for band in zip(*facts, strict=True)))
                groups.setdefault(key, []).append(image)
        except SceneRejected as error:
            notes.append(f"{image}: no part of a virtual raster: {error}")
    written: list[Path] = []
    for number, (_, members) in enumerate(sorted(groups.items())):
        path = name(number)
        sources = [one if one.startswith("/vsi") else str(Path(one).absolute()) for one in members]
        try:
            with replacing(path) as temporary:
                gdal("BuildVRT", str(temporary), sources)
                _finish_mosaic(temporary, path, sources)
        except MissingExtra as error:
            return [], [*notes, f"no virtual rasters: {error}"]
        written.append(path)
    return written, notes


def _finish_mosaic(temporary: Path, path: Path, sources: Sequence[str]) -> None:
    """Give the bands the names they have in the sources, which GDAL drops; all sources must be there."""
    with rasterio.open(sources[0]) as first, rasterio.open(temporary, "r+") as dataset:
        taken = len(set(dataset.files) - {str(temporary)})
        if taken < len(sources):
            raise RunError(f"{path}: {len(sources)} rasters were given, {taken} are in it")
        if any(first.descriptions):
            dataset.descriptions = first.descriptions
