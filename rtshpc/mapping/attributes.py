"""What is said of each mapped instance: its measures on the ground, and its pixels against those around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.scenes import Scene
from rtshpc.geo.chips import ChipBox
from rtshpc.geo.crs import LONLAT, Six, transformer
from rtshpc.geo.scene import OpenScene, open_scene
from rtshpc.mapping import features as table
from rtshpc.mapping.features import Features
from rtshpc.mapping.mosaic import MapInstance

RING_PX = 5
"""The ring around an instance is as wide; pixels of other instances are no part of it."""
_BLOCK_PX = 1024
_GEOD = pyproj.Geod(ellps="WGS84")
_RING = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RING_PX + 1, 2 * RING_PX + 1))

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""


class Placed(Protocol):
    """A scene of a group, as `core.mapping.ground.MapScene` is one."""

    @property
    def scene(self) -> Scene: ...

    @property
    def row(self) -> int:
        """Of its pixel (0, 0) on the group's lattice, px."""
        ...

    @property
    def col(self) -> int:
        """Likewise."""
        ...


@dataclass(frozen=True)
class Origin:
    """What made the instances: the trained cell (or file of weights), and the image's SHA-256 ("" = no image)."""

    model: str
    container: str


def describe(
    instances: Sequence[MapInstance],
    geometry: Sequence[Any],
    crs_wkt: str,
    transform: Six,
    sources: Sequence[Placed],
    data: DataConfig,
    origin: Origin,
    dem: str = "",
) -> tuple[Features, list[str]]:
    """The finished table of a group's instances.

    Args:
        instances: on the group's lattice.
        geometry: their outlines in the lattice's CRS.
        crs_wkt: CRS of the lattice.
        transform: of the lattice's pixel corners.
        sources: the group's scenes; an instance is measured in the one that holds most of it.
        data: how scenes are read, and the names of the classes.
        origin: what made them.
        dem: modality that holds elevations in metres; "" = none.

    Returns:
        The table, rows as `instances`, and what could not be measured (`SCENE: reason: detail`).
    """
    scenes = {source.scene.id: source.scene for source in sources}
    own = [scenes[instance.scene] for instance in instances]
    pixels, notes = measure(instances, _ground_steps(geometry, crs_wkt, transform), sources, data, dem)
    columns: dict[str, Any] = {
        table.SCORE: np.array([instance.score for instance in instances], np.float64),
        table.CLASS: [data.classes[instance.kind] for instance in instances],
        **ground_measures(geometry, crs_wkt),
        table.SCENE: [scene.id for scene in own],
        table.DATE: [scene.date for scene in own],
        table.SITE: [scene.site for scene in own],
        **pixels,
        table.MODEL: [origin.model] * len(own),
        table.CONTAINER: [origin.container] * len(own),
    }
    return Features(crs_wkt, geometry, columns), notes  # pyright: ignore[reportArgumentType]


def equal_area(crs_wkt: str, x: float, y: float) -> str:
    """WKT of Lambert's azimuthal equal-area projection (WGS84) around a point of a CRS: no seam near it, at any pole."""
    lon, lat = transformer(crs_wkt, LONLAT).transform(x, y)
    if not (np.isfinite(lon) and np.isfinite(lat)):
        lon = lat = 0.0
    return pyproj.CRS.from_proj4(
        f"+proj=laea +lat_0={float(lat)!r} +lon_0={float(lon)!r} +datum=WGS84 +units=m +no_defs"
    ).to_wkt()


def moved(geometry: Any, source_wkt: str, target_wkt: str) -> NDArray[np.object_]:
    """Shapes in another CRS, vertex by vertex."""
    change = transformer(source_wkt, target_wkt)

    def move(points: Floats) -> Floats:
        return np.column_stack(change.transform(points[:, 0], points[:, 1]))

    return np.asarray(shapely.transform(np.asarray(geometry, np.object_), move), np.object_)


def ground_measures(geometry: Sequence[Any], crs_wkt: str) -> dict[str, Floats]:
    """`area_m2`, `perimeter_m` (with holes, geodesic) and `elongation` (sides of the narrowest rectangle), NaN off the Earth.

    Areas are taken in an equal-area projection around the shapes and differ from geodesic ones by far less than 0.1 %.
    """
    if not len(geometry):
        return {name: np.zeros(0) for name in (table.AREA, table.PERIMETER, table.ELONGATION)}
    left, bottom, right, top = shapely.total_bounds(np.asarray(geometry, np.object_))
    shapes = moved(geometry, crs_wkt, equal_area(crs_wkt, (left + right) / 2, (bottom + top) / 2))
    known = np.isfinite(shapely.bounds(shapes)).all(axis=1)
    area, elongation = np.full(len(shapes), np.nan), np.full(len(shapes), np.nan)
    area[known] = shapely.area(shapes[known])
    boxes = shapely.oriented_envelope(shapes[known])
    sides = np.linalg.norm(np.diff(shapely.get_coordinates(boxes).reshape(-1, 5, 2)[:, :3], axis=1), axis=2)
    elongation[known] = sides.max(axis=1, initial=0) / sides.min(axis=1, initial=np.inf)
    return {table.AREA: area, table.PERIMETER: _perimeters(geometry, crs_wkt), table.ELONGATION: elongation}


def _perimeters(geometry: Sequence[Any], crs_wkt: str) -> Floats:
    parts, owner = shapely.get_parts(np.asarray(geometry, np.object_), return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    lons, lats = transformer(crs_wkt, LONLAT).transform(points[:, 0], points[:, 1])
    steps = np.flatnonzero(ring[1:] == ring[:-1])
    metres = np.asarray(_GEOD.inv(lons[steps], lats[steps], lons[steps + 1], lats[steps + 1])[2])
    return np.bincount(owner[part[ring[steps]]], metres, len(geometry))


def _ground_steps(geometry: Sequence[Any], crs_wkt: str, transform: Six) -> Floats:
    """(N, 2, 2) m: east and north of one column and of one row, at the middle of each shape."""
    a, b, _, d, e, _ = transform
    if not len(geometry):
        return np.zeros((0, 2, 2))
    bounds = shapely.bounds(np.asarray(geometry, np.object_))
    x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
    to_lonlat = transformer(crs_wkt, LONLAT)
    lon, lat = to_lonlat.transform(x, y)
    steps = np.empty((len(bounds), 2, 2))
    for at, (dx, dy) in enumerate(((a, d), (b, e))):
        azimuth, _, metres = _GEOD.inv(lon, lat, *to_lonlat.transform(x + dx, y + dy))
        angle = np.radians(azimuth)
        steps[:, at] = np.column_stack([metres * np.sin(angle), metres * np.cos(angle)])
    return steps


def pixel_columns(data: DataConfig, dem: str = "") -> dict[str, list[str]]:
    """Modality -> what its columns are called after `mean_` and `ring_`: itself, with the band where it has several."""
    names: dict[str, list[str]] = {}
    for name, modality in data.modalities.items():
        if name == dem:
            continue
        bands = [re.sub(r"\W+", "_", band).lower() for band in modality.bands]
        if len(bands) != len(set(bands)):
            bands = [str(number) for number in range(1, len(bands) + 1)]
        names[name] = [f"{name}_{band}" for band in bands] if len(bands) > 1 else [name]
    return names


def measure(
    instances: Sequence[MapInstance], steps: Floats, sources: Sequence[Placed], data: DataConfig, dem: str = ""
) -> tuple[dict[str, Floats], list[str]]:
    """Means of each modality inside each instance and in the ring around it, in the modality's unit, and the terrain's.

    Pixels are read block by block, so that neither large scenes nor large instances take memory. A scene that can no
    longer be read leaves its instances unmeasured (NaN) and a note.
    """
    count = len(instances)
    columns = pixel_columns(data, dem)
    names = [f"{kind}_{name}" for kind in ("mean", "ring") for group in columns.values() for name in group]
    names += [table.SLOPE, table.ELEVATION, table.ASPECT] if dem else []
    found = {name: np.full(count, np.nan) for name in names}
    notes: list[str] = []
    for source in sorted(sources, key=lambda source: source.scene.id):
        own = np.array([instance.scene == source.scene.id for instance in instances], np.bool_)
        if not own.any():
            continue
        try:
            with open_scene(source.scene, data, with_labels=False) as opened:
                sums = _Sums(opened, count, dem)
                for block in _blocks(instances, own, source, opened):
                    sums.add(block, instances, steps)
        except SceneRejected as error:
            notes.append(f"{source.scene.id}: {error}")
            continue
        for name, values in sums.means(columns).items():
            found[name][own] = values[own]
    return found, notes


@dataclass(frozen=True)
class _Block:
    """A part of a scene, px of the scene, and the instances that lie in it or whose rings do."""

    top: int
    left: int
    bottom: int
    right: int
    near: list[int]
    own: list[int]
    row: int
    col: int

    def place(self, instance: MapInstance, margin: int = 0) -> Box:
        """The part of the block that an instance's box takes, px of the scene; empty where bottom <= top."""
        row, col = instance.row - self.row, instance.col - self.col
        height, width = instance.mask.shape
        top, left = max(row - margin, self.top), max(col - margin, self.left)
        bottom, right = min(row + height + margin, self.bottom), min(col + width + margin, self.right)
        return top, left, bottom if right > left else top, right

    def within(self, box: Box) -> tuple[slice, slice]:
        """A box as places in an array of the block."""
        top, left, bottom, right = box
        return slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)

    def mask(self, instance: MapInstance, box: Box) -> Mask:
        """The instance's pixels in a box."""
        top, left, bottom, right = box
        row, col = instance.row - self.row, instance.col - self.col
        height, width = instance.mask.shape
        found = np.zeros((bottom - top, right - left), np.bool_)
        rows, cols = slice(max(top, row), min(bottom, row + height)), slice(max(left, col), min(right, col + width))
        if rows.start < rows.stop and cols.start < cols.stop:
            part = instance.mask[rows.start - row : rows.stop - row, cols.start - col : cols.stop - col]
            found[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left] = part
        return found


def _blocks(instances: Sequence[MapInstance], own: Mask, source: Placed, opened: OpenScene) -> Iterator[_Block]:
    """The blocks of a scene that hold own instances or their rings, row by row."""
    height, width = opened.grid.height, opened.grid.width
    near: dict[tuple[int, int], list[int]] = {}
    for number, instance in enumerate(instances):
        row, col = instance.row - source.row, instance.col - source.col
        top, left = max(row - RING_PX, 0), max(col - RING_PX, 0)
        bottom = min(row + instance.mask.shape[0] + RING_PX, height)
        right = min(col + instance.mask.shape[1] + RING_PX, width)
        if top < bottom and left < right:
            for at in range(top // _BLOCK_PX, (bottom - 1) // _BLOCK_PX + 1):
                for to in range(left // _BLOCK_PX, (right - 1) // _BLOCK_PX + 1):
                    near.setdefault((at, to), []).append(number)
    for (at, to), numbers in sorted(near.items()):
        mine = [number for number in numbers if own[number]]
        if mine:
            top, left = at * _BLOCK_PX, to * _BLOCK_PX
            bottom, right = min(top + _BLOCK_PX, height), min(left + _BLOCK_PX, width)
            yield _Block(top, left, bottom, right, numbers, mine, source.row, source.col)


class _Sums:
    """Sums and counts of a scene's pixels for each instance, inside (0) and in the ring (1)."""

    def __init__(self, opened: OpenScene, count: int, dem: str) -> None:
        self._opened, self._dem = opened, dem
        channels = {name: len(opened.read(ChipBox(0, 0, 1)).pixels[name]) for name in opened.scaling}
        self._sums = {name: np.zeros((2, number, count)) for name, number in channels.items()}
        self._counts = {name: np.zeros((2, count), np.int64) for name in channels}
        self._terrain = np.zeros((3, count))
        self._steep = np.zeros(count, np.int64)

    def add(self, block: _Block, instances: Sequence[MapInstance], steps: Floats) -> None:
        """Add what a block holds."""
        row, col = max(block.top - 1, 0), max(block.left - 1, 0)
        part = self._opened.read(ChipBox(row, col, _BLOCK_PX + 2))
        gradient = self._gradient(part) if self._dem else None
        taken = np.zeros((block.bottom - block.top, block.right - block.left), np.bool_)
        for number in block.near:
            box = block.place(instances[number])
            if box[0] < box[2]:
                taken[block.within(box)] |= block.mask(instances[number], box)
        for number in block.own:
            top, left, bottom, right = box = block.place(instances[number], RING_PX)
            around = (top - RING_PX, left - RING_PX, bottom + RING_PX, right + RING_PX)
            wide = block.mask(instances[number], around)
            grown = cv2.dilate(wide.view(np.uint8), _RING).view(np.bool_)
            inner = slice(RING_PX, -RING_PX)
            inside, ring = wide[inner, inner], grown[inner, inner] & ~taken[block.within(box)]
            place = (slice(top - row, bottom - row), slice(left - col, right - col))
            self._add_values(number, part, place, (inside, ring))
            if gradient is not None:
                self._add_terrain(number, gradient[:, *place][:, inside], steps[number])

    def _add_values(self, number: int, part: Any, place: Any, masks: tuple[Mask, Mask]) -> None:
        for name, sums in self._sums.items():
            pixels, valid = part.pixels[name][:, *place], part.valid[name][place]
            for kind, mask in enumerate(masks):
                chosen = mask & valid
                sums[kind, :, number] += pixels[:, chosen].sum(axis=1, dtype=np.float64)
                self._counts[name][kind, number] += np.count_nonzero(chosen)

    def _gradient(self, part: Any) -> Floats:
        """(2, H, W) Rise of the elevations per column and per row (Horn's weights); NaN beside what is missing."""
        scale, offset = self._opened.scaling[self._dem]
        heights = part.pixels[self._dem][0].astype(np.float64) * scale + offset
        z = np.pad(np.where(part.valid[self._dem], heights, np.nan), 1, constant_values=np.nan)
        across = z[:, 2:] - z[:, :-2]
        down = z[2:] - z[:-2]
        known = np.where(np.isfinite(z[1:-1, 1:-1]), 0.125, np.nan)
        return np.stack(
            [
                (across[:-2] + 2 * across[1:-1] + across[2:]) * known,
                (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) * known,
            ]
        )

    def _add_terrain(self, number: int, rises: Floats, step: Floats) -> None:
        """`rises`: (2, P) per column and row; `step`: east and north metres of these."""
        rises = rises[:, np.isfinite(rises).all(axis=0)]
        if rises.size and abs(np.linalg.det(step)) > 0:
            east, north = np.linalg.solve(step, rises)
            self._terrain[:, number] += [east.sum(), north.sum(), np.degrees(np.arctan(np.hypot(east, north))).sum()]
            self._steep[number] += rises.shape[1]

    def means(self, columns: Mapping[str, list[str]]) -> dict[str, Floats]:
        """Column -> (N,) values in physical units; NaN where no pixel was valid."""
        found: dict[str, Floats] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, (scale, offset) in self._opened.scaling.items():
                means = self._sums[name] / self._counts[name][:, None] * scale + offset
                if name == self._dem:
                    found[table.ELEVATION] = means[0, 0]
                    east, north, slope = self._terrain / self._steep
                    found[table.SLOPE] = slope
                    level = (east == 0) & (north == 0)
                    found[table.ASPECT] = np.where(level, np.nan, np.degrees(np.arctan2(-east, -north)) % 360)
                    continue
                for kind, values in zip(("mean", "ring"), means, strict=True):
                    found |= {f"{kind}_{column}": values[at] for at, column in enumerate(columns[name])}
        return found
