"""Overview maps as SVG: what was mapped, what was not, and every slump, over pictures of the scenes. No network, no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import shapely

from rtshpc.core.mapping.ground import Ground
from rtshpc.geo.crs import LONLAT, transformer
from rtshpc.mapping import features as table
from rtshpc.mapping.attributes import equal_area, moved
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import MAPPED, Outcome, outline_of
from rtshpc.report.overview.quicklook import picture_size

WIDE, HIGH = 1000.0, 900.0
"""Units of a drawing."""
_MARGIN = 0.04
_DOT = 3.0
"""Slumps that would be smaller are drawn as dots of this radius, units."""


@dataclass(frozen=True)
class Drawing:
    """A map of the page; `svg` is our own markup."""

    name: str
    title: str
    caption: str
    svg: str


class Sheet:
    """A plane map around some scenes (equal-area, metres) on a sheet of WIDE x `height` units."""

    def __init__(self, grounds: Sequence[Ground]) -> None:
        self._wkt = _local(grounds)
        self.outlines = [moved([outline_of(ground)], ground.crs_wkt, self._wkt)[0] for ground in grounds]
        west, south, east, north = shapely.total_bounds(self.outlines)
        wide, high = east - west, north - south
        self.unit_m = max(wide / WIDE, high / HIGH) / (1 - 2 * _MARGIN)
        self.height = high / self.unit_m + 2 * _MARGIN * WIDE
        self._west = (west + east) / 2 - WIDE / 2 * self.unit_m
        self._north = north + _MARGIN * WIDE * self.unit_m

    def shapes(self, features: Features) -> Any:
        """Outlines in units of the sheet, y down, without what is too small to see."""
        there = moved(features.geometry, features.crs_wkt, self._wkt)
        return shapely.transform(shapely.simplify(there, self.unit_m / 3), self._place)

    def _place(self, points: Any) -> Any:
        return np.column_stack([(points[:, 0] - self._west) / self.unit_m, (self._north - points[:, 1]) / self.unit_m])

    def outline(self, number: int) -> Any:
        """The outline of a scene."""
        return shapely.transform(self.outlines[number], self._place)

    def picture(self, ground: Ground) -> str:
        """The SVG transform that puts the picture of a scene where it lies."""
        a, b, c, d, e, f = ground.transform
        high, wide = picture_size(ground.height, ground.width)
        ends = [(0, 0), (ground.width, 0), (0, ground.height)]
        points = np.array([(a * col + b * row + c, d * col + e * row + f) for col, row in ends])
        there = transformer(ground.crs_wkt, self._wkt).transform(points[:, 0], points[:, 1])
        origin, right, down = self._place(np.column_stack(there))
        numbers = [*((right - origin) / wide), *((down - origin) / high), *origin]
        return f"matrix({' '.join(f'{value:.7g}' for value in numbers)})"

    def bar(self) -> str:
        """A bar of a round length, with it."""
        longest = WIDE * self.unit_m / 4
        step = 10.0 ** math.floor(math.log10(longest))
        length = next(step * times for times in (5, 2, 1) if step * times <= longest)
        text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
        x, y = 16, self.height - 14
        end = x + length / self.unit_m
        return f'<path class="bar" d="M{x} {y:.1f}H{end:.1f}"/><text class="bar" x="{x}" y="{y - 7:.1f}">{text}</text>'


def _local(grounds: Sequence[Ground]) -> str:
    """An equal-area projection around the middle of the scenes, wherever on the globe that is."""
    points = []
    for ground in grounds:
        a, b, c, d, e, f = ground.transform
        col, row = ground.width / 2, ground.height / 2
        points.append(transformer(ground.crs_wkt, LONLAT).transform(a * col + b * row + c, d * col + e * row + f))
    lon, lat = np.radians(np.array(points).T)
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    return equal_area(LONLAT, math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y))))


def pictures_svg(pictures: Mapping[str, bytes], grounds: Mapping[str, Ground]) -> tuple[str, dict[str, str]]:
    """Pictures of scenes once for all drawings: their definitions, and scene -> name to use them by."""
    names = {scene: f"look-{number}" for number, scene in enumerate(sorted(pictures))}
    found: list[str] = []
    for scene, name in names.items():
        high, wide = picture_size(grounds[scene].height, grounds[scene].width)
        data = base64.b64encode(pictures[scene]).decode("ascii")
        size = f'width="{wide}" height="{high}" preserveAspectRatio="none"'
        found.append(f'<image id="{name}" {size} href="data:image/webp;base64,{data}"/>')
    return f'<svg class="looks" width="0" height="0" aria-hidden="true"><defs>{"".join(found)}</defs></svg>', names


def draw(name: str, title: str, outcomes: Sequence[Outcome], slumps: Features, looks: Mapping[str, str]) -> Drawing:
    """A map of scenes that have a place.

    Args:
        name: of the drawing, unique on the page.
        title: for people.
        outcomes: scenes with a ground.
        slumps: instances, of these scenes alone.
        looks: scene -> name of its picture.
    """
    grounds = [outcome.ground for outcome in outcomes if outcome.ground is not None]
    sheet = Sheet(grounds)
    rows = slumps.rows_by(table.SCENE)
    back: list[str] = []
    lines: list[str] = []
    marks: list[str] = []
    for number, (outcome, ground) in enumerate(zip(outcomes, grounds, strict=True)):
        if outcome.scene in looks:
            back.append(f'<use href="#{looks[outcome.scene]}" transform="{sheet.picture(ground)}"/>')
        own = slumps.take(rows.get(outcome.scene, np.zeros(0, np.int64)))
        told = (
            f"{outcome.scene}, {len(own)} slumps" if outcome.state == MAPPED else f"{outcome.scene}: {outcome.reason}"
        )
        words = f"<title>{escape(told)}</title>"
        lines.append(f'<path class="{outcome.state}" d="{_path(sheet.outline(number))}">{words}</path>')
        marks.append(_marks(sheet.shapes(own)))
    label = f'class="map" role="img" aria-labelledby="{name}-caption" viewBox="0 0 {WIDE:g} {sheet.height:.0f}"'
    svg = f"<svg {label}>{''.join(back)}{''.join(lines)}{''.join(marks)}{sheet.bar()}</svg>"
    mapped = sum(outcome.state == MAPPED for outcome in outcomes)
    dates = sorted({outcome.date for outcome in outcomes if outcome.date})
    span = f", {dates[0]} to {dates[-1]}" if len(dates) > 1 else f", {dates[0]}" if dates else ""
    left_out = f", {len(outcomes) - mapped} not mapped (dashed)" if mapped < len(outcomes) else ""
    of = "1 scene" if mapped == 1 else f"{mapped} scenes"
    caption = f"{len(slumps)} slump{'' if len(slumps) == 1 else 's'} in {of}{span}{left_out}. Equal-area map, north up in its middle."
    return Drawing(name, title, caption, svg)


def _marks(shapes: Any) -> str:
    if not len(shapes):
        return ""
    sides = shapely.bounds(shapes)
    small = np.maximum(sides[:, 2] - sides[:, 0], sides[:, 3] - sides[:, 1]) < 2 * _DOT
    middles = (sides[:, :2] + sides[:, 2:]) / 2
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_DOT:g}"/>' for x, y in middles[small])
    lines = "".join(_path(shape) for shape in shapes[~small])
    return f'<g class="slumps">{dots}' + (f'<path d="{lines}"/>' if lines else "") + "</g>"


def _path(shape: Any) -> str:
    """Rings of a polygon as path data, to a tenth of a unit."""
    rings = shapely.get_rings(shapely.get_parts(shape))
    texts = []
    for ring in rings:
        points = shapely.get_coordinates(ring)[:-1]
        texts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(texts)
