"""Generated scenes: georeferenced tundra with relief, plants, water, slumps and what is taken for slumps.

A pixel is a function of (config, site, index, row, column), so a scene of any size is written block by block
in bounded memory and comes out the same to the byte. Reflectances are physical enough that NDVI is computed
from red and NIR: a bare dry patch looks like a slump in RGB but its NIR is high, a pond has a slump's NDVI but
is dark in RGB.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.windows import Window

from rtshpc.core.config import GeneratedConfig
from rtshpc.core.records import replacing
from rtshpc.data.shapes import Ground, Shape, draw_outline, place_beside

BANDS = ("red", "green", "blue", "ndvi", "nir")
SCALE = 1e-4
NODATA = -32768
BLOCK_PX = 512
_CACHE_BYTES = 256 << 20
"""Of GDAL while it writes: when blocks are flushed, and so their order in the file, is no matter of the machine."""

KNOWN_SITES = {"banks": (10, 400_000, 7_990_000), "peel": (8, 480_000, 7_460_000), "yamal": (42, 420_000, 7_780_000)}
"""Site -> UTM zone (north), easting and northing of its corner; other names are put somewhere in the Arctic."""

# Reflectance of red, green, blue, NIR. Tundra lies between dry and lush.
DRY = (0.080, 0.080, 0.052, 0.22)
LUSH = (0.050, 0.076, 0.040, 0.34)
WATER = (0.030, 0.045, 0.050, 0.020)
KINDS = {
    "slump": (0.165, 0.130, 0.100, 0.175),
    "confuser": (0.165, 0.130, 0.100, 0.360),
    "pond": (0.046, 0.060, 0.054, 0.056),
}
NOISE = 0.05
"""Deviation of the pixel noise, share of the reflectance."""
WATER_LEVEL = 0.83
"""Ground whose lowland noise is above this is water."""

Field = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SceneDraw:
    """All of a scene that is drawn before its pixels.

    Attributes:
        size: side, px.
        contrast: visibility of shapes.
        wedge: px along the top and left edge without data; 0 = none.
        slumps: in the order of their ids 1..n.
        others: confusers and ponds.
        fields: name -> octaves (cell in px, weight, lattice of values in 0..1).
        key: seed of the pixel noise.
    """

    size: int
    contrast: float
    wedge: float
    slumps: list[Shape]
    others: list[Shape]
    fields: dict[str, list[tuple[int, float, Field]]]
    key: tuple[int, ...]

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Of the others, then of the slumps, (N, 4): x1 y1 x2 y2. A large scene asks for them in every block."""
        return np.array([shape.bounds for shape in (*self.others, *self.slumps)], dtype=np.int64).reshape(-1, 4)


def place_of(config: GeneratedConfig, site: str, index: int) -> tuple[CRS, Affine]:
    """UTM zone and transform of a scene; scenes of a site never overlap."""
    mixed = zlib.crc32(site.encode())
    zone, east, north = KNOWN_SITES.get(
        site, (1 + mixed % 60, 300_000 + mixed % 97 * 1000, 7_300_000 + mixed % 701 * 1000)
    )
    step = config.size_px * config.resolution_m * 1.25
    columns = max(1, int(300_000 // step))
    east, north = east + index % columns * step, north - index // columns * step
    crs = CRS.from_epsg(32600 + zone)
    return crs, Affine(config.resolution_m, 0, round(east), 0, -config.resolution_m, round(north))


def draw_scene(config: GeneratedConfig, site: str, index: int, folder: Path) -> tuple[Path, Path]:
    """Write `<site>_<index>.tif` and `<site>_<index>_instances.tif` in `folder`, each atomically.

    The image has int16 bands red, green, blue, ndvi, nir with scale 1e-4 and nodata -32768; the other file
    has 0 for ground and 1..n for slumps. The image is renamed last: where it is, both are.

    Returns:
        Paths of the image and of the instances.
    """
    scene = draw(config, site, index)
    crs, transform = place_of(config, site, index)
    image, label = folder / f"{site}_{index:03d}.tif", folder / f"{site}_{index:03d}_instances.tif"
    side = min(BLOCK_PX, -(-config.size_px // 16) * 16)
    common: dict[str, Any] = {
        "driver": "GTiff",
        "width": config.size_px,
        "height": config.size_px,
        "crs": crs,
        "transform": transform,
        "tiled": True,
        "blockxsize": side,
        "blockysize": side,
        "compress": "deflate",
        "zlevel": 1,
        "bigtiff": "if_safer",
    }
    ids_type = "uint16" if len(scene.slumps) < 65535 else "uint32"
    settings = rasterio.Env(GDAL_NUM_THREADS="1", GDAL_CACHEMAX=_CACHE_BYTES)
    with replacing(image) as new_image, replacing(label) as new_label, settings:
        layers = rasterio.open(
            new_image, "w", count=5, dtype="int16", nodata=NODATA, interleave="band", predictor=2, **common
        )
        with layers, rasterio.open(new_label, "w", count=1, dtype=ids_type, **common) as ids:
            layers.descriptions, ids.descriptions = BANDS, ("instances",)
            layers.scales, layers.offsets = (SCALE,) * 5, (0.0,) * 5
            for row, col, height, width in blocks(config.size_px, side):
                pixels, numbers = draw_block(scene, row, col, height, width)
                layers.write(pixels, window=Window(col, row, width, height))
                ids.write(numbers.astype(ids_type), 1, window=Window(col, row, width, height))
    return image, label


def blocks(size: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, height, width) of the blocks of a square scene, in file order."""
    for row in range(0, size, side):
        for col in range(0, size, side):
            yield row, col, min(side, size - row), min(side, size - col)


def draw(config: GeneratedConfig, site: str, index: int) -> SceneDraw:
    """Place the shapes and draw the noise lattices of one scene."""
    key = (config.seed, zlib.crc32(site.encode()), index)
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    wedged = random.random() < config.nodata_fraction
    wedge = config.size_px * random.uniform(0.25, 0.6) if wedged else 0.0
    slumps, others = _place_shapes(config, random, Ground(config.size_px, wedge))
    octaves = {
        "relief": ((96, 0.6), (40, 0.3), (16, 0.1)),
        "plants": ((64, 0.5), (24, 0.3), (8, 0.2)),
        "lowland": ((128, 0.7), (48, 0.3)),
    }
    fields = {
        name: [(cell, weight, _lattice(random, config.size_px, cell)) for cell, weight in parts]
        for name, parts in octaves.items()
    }
    return SceneDraw(config.size_px, config.contrast, wedge, slumps, others, fields, key)


def _lattice(random: np.random.Generator, size: int, cell: int) -> Field:
    side = size // cell + 3
    return random.random((side, side))


def _place_shapes(
    config: GeneratedConfig, random: np.random.Generator, ground: Ground
) -> tuple[list[Shape], list[Shape]]:
    """Slumps first (some beside the one before), then what is confusable with them, on free ground."""
    largest = (config.size_px / 2) ** 2 / 4  # a slump takes no more than a part of a small scene
    area = (min(config.slump_px[0], largest), min(config.slump_px[1], largest))

    def shape(kind: str, beside: Shape | None = None) -> Shape | None:
        for _ in range(8):
            outline = draw_outline(random, config.resolution_m, area)
            if beside is not None:
                placed = place_beside(random, ground, beside.outline, outline, config.size_px)
            else:
                placed = ground.place(random, outline)
            if placed is not None:
                return Shape(placed, kind, float(random.random()), float(random.uniform(0, 2 * np.pi)))
        return None

    slumps: list[Shape] = []
    for _ in range(int(random.integers(config.slumps_per_scene[0], config.slumps_per_scene[1] + 1))):
        touching = random.random() < config.touching
        new = shape("slump", slumps[-1]) if touching and slumps else None
        new = new or shape("slump")
        if new is not None:
            slumps.append(new)
    kinds = ("confuser", "pond") * config.rgb_confusers
    return slumps, [other for other in map(shape, kinds) if other is not None]


def draw_block(
    scene: SceneDraw, row: int, col: int, height: int, width: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """Pixels (5, h, w) int16 and instance ids (h, w) of one block of a scene."""
    relief = _field(scene, "relief", row, col, height + 1, width + 1)
    plants = _field(scene, "plants", row, col, height, width)[None]
    lowland = _field(scene, "lowland", row, col, height, width)[None]
    bands = _column(DRY) * (1 - plants) + _column(LUSH) * plants
    water = np.clip((lowland - WATER_LEVEL) * 40, 0, 1)
    bands = bands * (1 - water) + _column(WATER) * water
    ids = np.zeros((height, width), dtype=np.int32)
    for number, shape, mask, box in _shapes_in(scene, row, col, height, width):
        rows, cols = slice(box[0], box[1]), slice(box[2], box[3])
        _paint(bands[:, rows, cols], shape, mask, scene.contrast, (row + box[0], col + box[2]))
        if number:
            ids[rows, cols][mask] = number
    # Light from the north-west: slopes brighten or darken all bands alike, so NDVI does not see them.
    light = 1 + 6.0 * ((relief[1:, 1:] - relief[:-1, 1:]) + (relief[1:, 1:] - relief[1:, :-1]))
    seed = np.random.SeedSequence((*scene.key, 1 + row, 1 + col))
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal((4, height, width))
    bands = np.clip(bands * np.clip(light, 0.6, 1.5) * (1 + NOISE * noise), 0.002, 1.0)
    ndvi = (bands[3] - bands[0]) / (bands[3] + bands[0])
    pixels = np.rint(np.stack((bands[0], bands[1], bands[2], ndvi, bands[3])) / SCALE).astype(np.int16)
    if scene.wedge:
        y, x = np.ogrid[row : row + height, col : col + width]
        pixels[:, (x + y + 1) < scene.wedge] = NODATA
    return pixels, ids


def _column(values: tuple[float, ...]) -> Field:
    return np.asarray(values, dtype=np.float64).reshape(-1, 1, 1)


def _field(scene: SceneDraw, name: str, row: int, col: int, height: int, width: int) -> Field:
    """Smooth noise in 0..1: octaves of a lattice, interpolated with a smooth step."""
    total = np.zeros((height, width))
    for cell, weight, lattice in scene.fields[name]:
        i, v = _steps(row, height, cell)
        j, u = _steps(col, width, cell)
        top, bottom = lattice[i], lattice[i + 1]
        across = (top * (1 - v[:, None]) + bottom * v[:, None]).T
        total += weight * (across[j] * (1 - u[:, None]) + across[j + 1] * u[:, None]).T
    return total


def _steps(start: int, count: int, cell: int) -> tuple[npt.NDArray[np.int64], Field]:
    position = np.arange(start, start + count) / cell
    whole = position.astype(np.int64)
    part = position - whole
    return whole, part * part * (3 - 2 * part)


def _shapes_in(
    scene: SceneDraw, row: int, col: int, height: int, width: int
) -> Iterator[tuple[int, Shape, npt.NDArray[np.bool_], tuple[int, int, int, int]]]:
    """Id (0 for others), shape, its mask within the block, and rows and columns of that part of the block."""
    shapes, first = [*scene.others, *scene.slumps], 1 - len(scene.others)
    low, high = scene.bounds[:, :2], scene.bounds[:, 2:]
    inside = ((low < (col + width, row + height)) & (high > (col, row))).all(axis=1)
    for at in map(int, np.flatnonzero(inside)):
        x1, y1, x2, y2 = map(int, scene.bounds[at])
        top, bottom = max(y1, row), min(y2, row + height)
        left, right = max(x1, col), min(x2, col + width)
        mask = shapes[at].mask()[top - y1 : bottom - y1, left - x1 : right - x1]
        yield max(at + first, 0), shapes[at], mask, (top - row, bottom - row, left - col, right - col)


def _paint(bands: Field, shape: Shape, mask: npt.NDArray[np.bool_], contrast: float, corner: tuple[int, int]) -> None:
    """Mix a shape's colour into its pixels: lighter under the headwall, darker towards the floor."""
    x1, y1, x2, y2 = shape.bounds
    y, x = np.nonzero(mask)
    across = (x + corner[1] - (x1 + x2) / 2) * np.cos(shape.slope) + (y + corner[0] - (y1 + y2) / 2) * np.sin(
        shape.slope
    )
    shade = (0.85 + 0.3 * shape.texture) * (1 + 0.15 * across / max(x2 - x1, y2 - y1))
    colour = _column(KINDS[shape.kind])[:, :, 0] * shade
    bands[:, y, x] += contrast * (colour - bands[:, y, x])
