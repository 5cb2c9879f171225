"""Whether a raster's georeference can be trusted, and what a pixel measures on the ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import pyproj
from pyproj.exceptions import CRSError, ProjError
from rasterio.io import DatasetReader

from rtshpc.core.errors import SceneRejected
from rtshpc.core.tiff import MATRIX, PIXEL_SCALE, TIE_POINTS, FileHead
from rtshpc.geo.raster import Grid

EARTH_RADII_M = (6_350_000.0, 6_400_000.0)
"""Semi-major axes of the ellipsoids in use for the Earth lie well inside."""
AREA_TOLERANCE = 0.1
"""Pixel areas off by more than this share from the map's are told."""

Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Finding:
    """One thing that is odd (`warn`) or fatal (`reject`) about a raster or its labels."""

    severity: Literal["warn", "reject"]
    reason: str
    detail: str

    @classmethod
    def note(cls, text: str) -> Finding:
        """A warning from `reason: detail`."""
        reason, _, detail = text.partition(": ")
        return cls("warn", reason, detail) if detail else cls("warn", "note", text)


@dataclass(frozen=True)
class CrsFacts:
    """What matters of a coordinate reference system; `fatal` names why it is useless."""

    fatal: tuple[str, str] | None
    geographic: bool
    unit_m: float
    method: str
    name: str


@lru_cache(maxsize=256)
def crs_facts(wkt: str) -> CrsFacts:
    """Look at a CRS once per distinct WKT."""
    try:
        crs = pyproj.CRS.from_wkt(wkt)
    except CRSError as error:
        return CrsFacts(("no_crs", f"the CRS is not understood: {error}"), False, 1.0, "", "")
    if crs.geodetic_crs is None or crs.ellipsoid is None:
        return CrsFacts(
            ("local_crs", f'CRS "{crs.name}" is a local one: it lies nowhere on the Earth'), False, 1.0, "", crs.name
        )
    radius = crs.ellipsoid.semi_major_metre
    if not EARTH_RADII_M[0] <= radius <= EARTH_RADII_M[1]:
        detail = f'CRS "{crs.name}" is of a body with a radius of {radius / 1000:.0f} km, not of the Earth'
        return CrsFacts(("not_earth", detail), False, 1.0, "", crs.name)
    if not crs.is_projected and not crs.is_geographic:
        detail = f'CRS "{crs.name}" is neither projected nor geographic: {crs.type_name}'
        return CrsFacts(("geocentric_crs", detail), False, 1.0, "", crs.name)
    operation = crs.coordinate_operation
    axes = crs.axis_info
    unit = axes[0].unit_conversion_factor if axes and crs.is_projected else 1.0
    return CrsFacts(None, crs.is_geographic, unit, operation.method_name if operation else "", crs.name)


@lru_cache(maxsize=256)
def transformer(source_wkt: str, target_wkt: str) -> pyproj.Transformer:
    """Coordinates of one CRS -> another, x before y."""
    return pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(source_wkt), pyproj.CRS.from_wkt(target_wkt), always_xy=True)


LONLAT = pyproj.CRS.from_epsg(4326).to_wkt()


def to_lonlat(wkt: str, xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Longitudes and latitudes in degrees; infinite where there are none."""
    lons, lats = transformer(wkt, LONLAT).transform(list(xs), list(ys))
    return [float(lon) for lon in lons], [float(lat) for lat in lats]


def corners(transform: Six, width: int, height: int, steps: int = 4) -> tuple[list[float], list[float]]:
    """Points along the outline, x and y in the CRS."""
    shares = [step / steps for step in range(steps)]
    edge = (
        [(s, 0.0) for s in shares]
        + [(1.0, s) for s in shares]
        + [(1 - s, 1.0) for s in shares]
        + [(0.0, 1 - s) for s in shares]
    )
    a, b, c, d, e, f = transform
    xs = [a * u * width + b * v * height + c for u, v in edge]
    ys = [d * u * width + e * v * height + f for u, v in edge]
    return xs, ys


class _Outline:
    """A raster's middle (first) and points along its edges, in its CRS and, once asked for, in degrees.

    Attributes:
        wkt: the CRS.
        xs: in its units.
        ys: in its units.
    """

    def __init__(self, wkt: str, six: Six, width: int, height: int, steps: int = 4) -> None:
        xs, ys = corners(six, width, height, steps) if steps else ([], [])
        a, b, c, d, e, f = six
        x, y = a * width / 2 + b * height / 2 + c, d * width / 2 + e * height / 2 + f
        self.xs, self.ys = [x, *xs], [y, *ys]
        self._beside = ([x + a, x + b], [y + d, y + e])
        self.wkt = wkt

    @cached_property
    def _degrees(self) -> tuple[list[float], list[float]]:
        # Both at once: the way to PROJ takes longer than the points.
        return to_lonlat(self.wkt, self.xs + self._beside[0], self.ys + self._beside[1])

    @property
    def lonlat(self) -> tuple[list[float], list[float]]:
        """Of the middle and the edges."""
        return self._degrees[0][:-2], self._degrees[1][:-2]

    @property
    def pixel(self) -> tuple[list[float], list[float]]:
        """Of the middle, and of the middle moved by a column and by a row."""
        lons, lats = self._degrees
        return [lons[0], *lons[-2:]], [lats[0], *lats[-2:]]


def georeference(dataset: DatasetReader) -> tuple[Grid | None, list[Finding]]:
    """The grid as stored (south-up stays south-up here) and what is wrong with it; no grid where it is fatal."""
    name = Path(dataset.name).name
    six: Six = tuple(dataset.transform)[:6]  # pyright: ignore[reportAssignmentType]
    if not dataset.crs:
        return None, [_without_crs(dataset, name, six)]
    wkt = dataset.crs.wkt
    facts = crs_facts(wkt)
    if facts.fatal is not None:
        return None, [Finding("reject", facts.fatal[0], f"{name}: {facts.fatal[1]}")]
    a, b, _, d, e, _ = six
    if six == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0):
        return None, [Finding("reject", "no_transform", f"{name} has a CRS but no place in it (identity transform)")]
    if not all(map(math.isfinite, six)) or a * e - b * d == 0:
        return None, [Finding("reject", "no_transform", f"{name}: the transform {six} cannot be inverted")]
    outline = _Outline(wkt, six, dataset.width, dataset.height)
    problem = _off_earth(outline, six, facts)
    if problem:
        return None, [Finding("reject", "off_earth", f"{name}: {problem}")]
    grid = Grid(wkt, six, dataset.width, dataset.height, _resolution(outline, six, facts))
    return grid, [*_orientation(name, six), *_projection(name, grid, facts, outline)]


def _without_crs(dataset: DatasetReader, name: str, six: Six) -> Finding:
    identity = six == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if dataset.gcps[0]:
        detail = f"{name} is placed by {len(dataset.gcps[0])} control points only; warp it to a grid first"
        return Finding("reject", "gcp_only", detail)
    if dataset.rpcs is not None:
        return Finding("reject", "rpc_only", f"{name} has raw sensor geometry (RPC) only; orthorectify it first")
    if identity:
        return Finding("reject", "no_georeference", f"{name} has neither a CRS nor a transform")
    return Finding("reject", "no_crs", f"{name} has a transform but no CRS")


def _off_earth(outline: _Outline, six: Six, facts: CrsFacts) -> str:
    """Why the raster cannot lie where it says, or nothing."""
    xs, ys = outline.xs, outline.ys
    if facts.geographic:
        if max(map(abs, ys)) > 90.5 or min(xs) < -360 or max(xs) > 540:
            return f"x {min(xs):.6g} to {max(xs):.6g}, y {min(ys):.6g} to {max(ys):.6g} are no degrees"
        return ""
    if max(map(abs, [*xs, *ys])) <= 360 and abs(six[0]) * facts.unit_m < 0.01:
        return f'coordinates look like degrees, but CRS "{facts.name}" is projected'
    lons, lats = outline.lonlat
    known = sum(math.isfinite(lon) and math.isfinite(lat) for lon, lat in zip(lons, lats, strict=True))
    if known <= len(lons) / 2 and not (known and "geostationary" in facts.method.lower()):
        return f'coordinates lie outside CRS "{facts.name}"'
    return ""


def _orientation(name: str, six: Six) -> list[Finding]:
    a, b, _, d, e, _ = six
    found: list[Finding] = []
    if abs(b) + abs(d) > 1e-9 * (abs(a) + abs(e)):
        found.append(Finding("warn", "rotated", f"{name} is rotated against its CRS; chips keep the rotation"))
    elif e > 0:
        found.append(Finding("warn", "south_up", f"{name} is stored south-up; it is flipped when read"))
    if a < 0 and not b:
        found.append(Finding("warn", "mirrored", f"{name} is stored east to west; it is flipped when read"))
    return found


def _projection(name: str, grid: Grid, facts: CrsFacts, outline: _Outline) -> list[Finding]:
    found: list[Finding] = []
    a, b, _, d, e, _ = grid.transform
    if facts.geographic:
        found.append(
            Finding("warn", "geographic_crs", f"{name} is in degrees; areas and sizes in px are not those of metres")
        )
    elif abs(facts.unit_m - 1) > 1e-9:
        found.append(Finding("warn", "crs_units", f'CRS "{facts.name}" counts in units of {facts.unit_m:.6g} m'))
    wide, high = math.hypot(a, d), math.hypot(b, e)
    if not facts.geographic and abs(wide / high - 1) > 0.01:
        found.append(Finding("warn", "oblong_pixels", f"{name}: pixels are {wide:.6g} x {high:.6g}"))
    lons, lats = outline.lonlat
    if "geostationary" in facts.method.lower():
        found.append(Finding("warn", "geostationary_crs", f"{name} is in satellite view: pixels have no fixed area"))
    elif not facts.geographic and math.isfinite(lons[0]):
        scale = _areal_scale(grid.crs_wkt, lons[0], lats[0])
        if scale is not None and abs(scale - 1) > AREA_TOLERANCE:
            detail = f'CRS "{facts.name}" shows areas {scale:.2f} times too large at latitude {lats[0]:.1f}'
            found.append(Finding("warn", "areas_distorted", detail))
    if math.isfinite(lons[0]) and _crosses(lons):
        found.append(Finding("warn", "antimeridian", f"{name} crosses the antimeridian: its bounds in degrees wrap"))
    return found


def _crosses(lons: Sequence[float]) -> bool:
    """Whether an outline crosses longitude 180; the first longitude is the centre's."""
    centre = (lons[0] + 180) % 360 - 180
    for lon in lons[1:]:
        if math.isfinite(lon):
            step = (lon - lons[0] + 180) % 360 - 180
            if abs(abs(step) - 180) > 1e-6 and abs(centre + step) > 180 + 1e-9:
                return True
    return False


@lru_cache(maxsize=256)
def _projection_of(wkt: str) -> pyproj.Proj | None:
    try:
        return pyproj.Proj(pyproj.CRS.from_wkt(wkt))
    except (CRSError, ProjError):
        return None


@lru_cache(maxsize=256)
def _areal_scale(wkt: str, lon: float, lat: float) -> float | None:
    projection = _projection_of(wkt)
    if projection is None:
        return None
    try:
        scale = float(projection.get_factors(lon, lat).areal_scale)
    except ProjError:
        return None
    return scale if math.isfinite(scale) and scale > 0 else None


_GEOD = pyproj.Geod(ellps="WGS84")


def resolution_m(wkt: str, six: Six, width: int, height: int) -> float:
    """Side of a square of the ground area of the middle pixel, m.

    The map's own metres where they are true within a few per cent (UTM, polar, equal-area), else geodesic ones.
    """
    return _resolution(_Outline(wkt, six, width, height, 0), six, crs_facts(wkt))


def _resolution(outline: _Outline, six: Six, facts: CrsFacts) -> float:
    a, b, _, d, e, _ = six
    on_map = math.sqrt(abs(a * e - b * d)) * facts.unit_m
    lons, lats = outline.pixel
    if not all(map(math.isfinite, [*lons, *lats])):
        return on_map
    if not facts.geographic:
        scale = _areal_scale(outline.wkt, lons[0], lats[0])
        if scale is None or abs(scale - 1) <= AREA_TOLERANCE:
            return on_map
    _, _, east = _GEOD.inv(lons[0], lats[0], lons[1], lats[1])
    _, _, south = _GEOD.inv(lons[0], lats[0], lons[2], lats[2])
    return math.sqrt(east * south)


def contradictions(dataset: DatasetReader, path: Path) -> list[Finding]:
    """Where the file's own georeference tags, or files beside it, disagree with the grid that is used."""
    found: list[Finding] = []
    tags = _geo_tags(path)
    scale, tie = tags.get(PIXEL_SCALE, ()), tags.get(TIE_POINTS, ())
    if MATRIX in tags and (scale or tie):
        detail = f"{path.name} has pixel scale or tie points and a matrix; the reader's choice is used"
        found.append(Finding("warn", "inconsistent_georeference", detail))
    if len(scale) > 1 and scale[1] < 0:
        detail = f"{path.name} states a negative pixel height (south-up); the reader takes it as north-up"
        found.append(Finding("warn", "south_up", detail))
    used: Six = tuple(dataset.transform)[:6]  # pyright: ignore[reportAssignmentType]
    if len(scale) > 1 and len(tie) == 6 and MATRIX not in tags:
        across, down = scale[0], abs(scale[1])
        stated: Six = (across, 0.0, tie[3] - tie[0] * across, 0.0, -down, tie[4] + tie[1] * down)
        if _apart(used, stated):
            detail = f"a file beside {path.name} moves it away from its own tags; the reader's choice is used"
            found.append(Finding("warn", "inconsistent_georeference", detail))
    world = _world_file(path)
    if world is not None and _apart(used, world[1]):
        detail = f"{world[0]} disagrees with the georeference of {path.name}, which is used"
        found.append(Finding("warn", "inconsistent_georeference", detail))
    return found


def _geo_tags(path: Path) -> dict[int, tuple[float, ...]]:
    """The transformation tags as stored, between which GDAL resolves contradictions silently; none for other files."""
    try:
        head = FileHead.of(path)
    except OSError:
        return {}
    stated = (tag for tag in (PIXEL_SCALE, TIE_POINTS, MATRIX) if tag in head.tags and head.tags[tag].form == "d")
    return {tag: head.values(tag) for tag in stated}


def _apart(one: Six, other: Six) -> bool:
    """Whether two transforms differ by more than the half pixel that point and area readings may."""
    size = abs(one[0]) + abs(one[1]) + abs(one[3]) + abs(one[4])
    linear = max(abs(abs(one[at]) - abs(other[at])) for at in (0, 1, 3, 4))
    return linear > 1e-3 * size or max(abs(one[2] - other[2]), abs(one[5] - other[5])) > 0.51 * size


def _world_file(path: Path) -> tuple[str, Six] | None:
    """Name and transform of a world file beside the raster (it gives the centre of the first pixel)."""
    for suffix in (".tfw", ".tifw", ".wld"):
        world = path.with_suffix(suffix)
        if world.exists():
            try:
                a, d, b, e, x, y = (float(word) for word in world.read_text().split()[:6])
            except (OSError, ValueError):
                return None
            return world.name, (a, b, x - (a + b) / 2, d, e, y - (d + e) / 2)
    return None


def fragment(dataset: DatasetReader) -> list[Finding]:
    """One pixel of known size may be a fragment; one whose size or sense is unknown is nothing."""
    if dataset.width * dataset.height > 1:
        return []
    facts = crs_facts(dataset.crs.wkt) if dataset.crs else None
    worthless = is_inverted(dataset) or facts is None or facts.geographic
    detail = f"{Path(dataset.name).name} is a single pixel"
    return [Finding("reject" if worthless else "warn", "too_small", detail)]


def is_inverted(dataset: DatasetReader) -> bool:
    """Whether the file says that 0 is white."""
    return dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"


def trusted_grid(dataset: DatasetReader, whole: bool = False) -> tuple[Grid, list[Finding]]:
    """The grid and its warnings.

    Args:
        dataset: the raster.
        whole: it is a scene of its own, for which a single pixel is too little.

    Raises:
        SceneRejected: the raster has no resolvable place on the Earth, or is `too_small`.
    """
    grid, found = georeference(dataset)
    found = [*found, *fragment(dataset)] if whole else found
    fatal = next((one for one in found if one.severity == "reject"), None)
    if grid is None or fatal is not None:
        fatal = fatal or found[0]
        raise SceneRejected(fatal.reason, fatal.detail)
    return grid, found
