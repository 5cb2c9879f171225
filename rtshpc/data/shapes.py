"""Outlines with the statistics of real thaw slumps, and where they lie in a generated scene.

The constants were taken from 14,294 mapped slumps (Yang et al. 2025, Sci. Data 12:18, through ARTS): area
5/25/50/75/95 % 604 / 2,031 / 4,878 / 12,358 / 49,758 m2, elongation median 1.73 and 95 % 3.43, solidity
median 0.90 and 5 % 0.67.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

LN_AREA_M2 = (8.54, 1.35)
"""Mean and deviation of the natural logarithm of the area in m2."""
ELONGATION_MEDIAN, ELONGATION_SPREAD = 1.60, 0.40
"""Of the ellipse under the outline; lobes add to it, the outlines' own median is 1.73."""
ROUGHNESS_MEDIAN, ROUGHNESS_SPREAD = 0.25, 0.58
"""Size of the lobes relative to the radius; chosen so that solidity has the real median and 5 % quantile."""
VERTICES = 72
GAP_PX = 3.0
"""Least distance between shapes that do not touch."""

Outline = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """One outline in a scene.

    Attributes:
        outline: (V, 2) float64, x and y in scene pixels.
        kind: `slump`, `confuser` (a slump in RGB alone), `pond` (near to a slump in NDVI alone).
        texture: random number in 0..1 that varies the colour.
        slope: direction in which the floor darkens, radians.
    """

    outline: Outline
    kind: str
    texture: float
    slope: float

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x1 y1 x2 y2 in whole pixels, right and lower edge outside."""
        low, high = (
            np.floor(self.outline.min(axis=0)).astype(int) - 1,
            np.ceil(self.outline.max(axis=0)).astype(int) + 2,
        )
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])

    def mask(self) -> npt.NDArray[np.bool_]:
        """The shape's pixels within `bounds`, (h, w) bool."""
        x1, y1, x2, y2 = self.bounds
        canvas = np.zeros((y2 - y1, x2 - x1), dtype=np.uint8)
        # Fixed-point vertices (1/256 px) make the fill the same on every machine.
        points = np.round((self.outline - (x1, y1)) * 256).astype(np.int32)
        cv2.fillPoly(canvas, [points.reshape(-1, 1, 2)], 1, lineType=cv2.LINE_8, shift=8)
        return canvas.astype(bool)


def draw_outline(random: np.random.Generator, resolution_m: float, area_px: tuple[float, float]) -> Outline:
    """An outline about (0, 0), px, with a real slump's area (within `area_px`), elongation and solidity."""
    area = _draw_area(random, resolution_m, area_px)
    angle = np.arange(VERTICES) * (2 * np.pi / VERTICES)
    elongation = max(1.03, ELONGATION_MEDIAN * float(np.exp(ELONGATION_SPREAD * random.standard_normal())))
    roughness = min(0.75, ROUGHNESS_MEDIAN * float(np.exp(ROUGHNESS_SPREAD * random.standard_normal())))
    orders = np.arange(2, 7)
    strength = roughness * random.standard_normal(len(orders)) / np.sqrt(orders)
    phase = random.uniform(0, 2 * np.pi, len(orders))
    lobes = (strength[:, None] * np.cos(orders[:, None] * angle + phase[:, None])).sum(axis=0)
    radius = np.maximum(1 + lobes, 0.3)
    x, y = radius * np.cos(angle) * np.sqrt(elongation), radius * np.sin(angle) / np.sqrt(elongation)
    turn = random.uniform(0, np.pi)
    outline = np.stack((x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)), axis=1)
    outline -= (outline.min(axis=0) + outline.max(axis=0)) / 2
    return outline * np.sqrt(area / polygon_area(outline))


def _draw_area(random: np.random.Generator, resolution_m: float, area_px: tuple[float, float]) -> float:
    """Area in px from the real distribution, drawn again while outside `area_px`, clamped after 1,000 draws."""
    mean, spread = LN_AREA_M2
    areas = np.exp(mean + spread * random.standard_normal(1000)) / resolution_m**2
    fitting = areas[(areas >= area_px[0]) & (areas <= area_px[1])]
    return float(fitting[0]) if len(fitting) else float(np.clip(areas[0], *area_px))


def polygon_area(outline: Outline) -> float:
    """Area of a simple polygon (V, 2)."""
    x, y = outline[:, 0], outline[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


class Ground:
    """Places shapes in a scene so that none overlap by their enclosing circles, in constant time a shape."""

    def __init__(self, size_px: int, wedge: float) -> None:
        """`wedge`: px along the top and left edge that a nodata corner takes; 0 = none."""
        self._size = size_px
        self._wedge = wedge
        self._cell = 64.0
        self._taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}

    def place(self, random: np.random.Generator, outline: Outline, tries: int = 60) -> Outline | None:
        """The outline at a free place wholly inside the scene; None where none was found."""
        reach = radius_of(outline)
        half = np.abs(outline).max(axis=0) + 2
        room = self._size - 2 * half
        if (room <= 0).any():
            return None
        for _ in range(tries):
            centre = half + random.random(2) * room
            if self.is_free(centre, reach):
                self.take(centre, reach)
                return outline + centre
        return None

    def is_free(
        self, centre: npt.NDArray[np.float64], reach: float, but: npt.NDArray[np.float64] | None = None
    ) -> bool:
        """Whether a circle is inside the scene's data and clear of all others (except the one about `but`)."""
        x, y = float(centre[0]), float(centre[1])
        if self._wedge and (self._wedge - x - y) / np.sqrt(2) > -(reach + 1):
            return False
        for ox, oy, taken in self._near(x, y, reach):
            same = but is not None and abs(ox - but[0]) + abs(oy - but[1]) < 1e-6
            if not same and (ox - x) ** 2 + (oy - y) ** 2 < (reach + taken + GAP_PX) ** 2:
                return False
        return True

    def take(self, centre: npt.NDArray[np.float64], reach: float) -> None:
        """Mark a circle as used."""
        entry = (float(centre[0]), float(centre[1]), reach)
        for key in self._keys(entry[0], entry[1], reach + GAP_PX):
            self._taken.setdefault(key, []).append(entry)

    def _near(self, x: float, y: float, reach: float) -> set[tuple[float, float, float]]:
        return {entry for key in self._keys(x, y, reach + GAP_PX) for entry in self._taken.get(key, ())}

    def _keys(self, x: float, y: float, reach: float) -> Iterable[tuple[int, int]]:
        rows = range(int((y - reach) // self._cell), int((y + reach) // self._cell) + 1)
        columns = range(int((x - reach) // self._cell), int((x + reach) // self._cell) + 1)
        return ((row, column) for row in rows for column in columns)


def radius_of(outline: Outline) -> float:
    """Radius of the circle about (0, 0) that holds the outline."""
    return float(np.sqrt(np.square(outline).sum(axis=1).max()))


def place_beside(
    random: np.random.Generator, ground: Ground, neighbour: Outline, outline: Outline, size_px: int
) -> Outline | None:
    """Push `outline` towards `neighbour` until their pixels touch without overlapping; None where it does not fit."""
    centre = (neighbour.min(axis=0) + neighbour.max(axis=0)) / 2
    reach, angle = radius_of(outline), random.uniform(0, 2 * np.pi)
    way = np.array((np.cos(angle), np.sin(angle)))
    far = radius_of(neighbour - centre) + reach + 1
    fixed = Shape(neighbour, "slump", 0.0, 0.0)
    last: Outline | None = None
    for distance in np.arange(far, 0, -1.0):
        moved = outline + centre + way * distance
        if overlap(fixed, Shape(moved, "slump", 0.0, 0.0), grow=0):
            break
        last = moved
    if last is None or not overlap(fixed, Shape(last, "slump", 0.0, 0.0), grow=1):
        return None
    place = (last.min(axis=0) + last.max(axis=0)) / 2
    inside = (last.min(axis=0) >= 2).all() and (last.max(axis=0) <= size_px - 2).all()
    if not inside or not ground.is_free(place, reach, but=centre):
        return None
    ground.take(place, reach)
    return last


def overlap(a: Shape, b: Shape, grow: int) -> bool:
    """Whether the pixels of two shapes meet, those of `a` grown by `grow` px (8-connected)."""
    ax1, ay1, ax2, ay2 = a.bounds
    bx1, by1, bx2, by2 = b.bounds
    x1, y1, x2, y2 = min(ax1, bx1) - 2, min(ay1, by1) - 2, max(ax2, bx2) + 2, max(ay2, by2) + 2
    canvas = np.zeros((2, y2 - y1, x2 - x1), dtype=np.uint8)
    canvas[0, ay1 - y1 : ay2 - y1, ax1 - x1 : ax2 - x1] = a.mask()
    canvas[1, by1 - y1 : by2 - y1, bx1 - x1 : bx2 - x1] = b.mask()
    if grow:
        canvas[0] = cv2.dilate(canvas[0], np.ones((3, 3), np.uint8), iterations=grow)
    return bool((canvas[0] & canvas[1]).any())
