"""Scenes of one date on one pixel lattice whose grounds meet: they are merged together, as if they were one scene."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rtshpc.core.mapping.ground import Ground, Seen
from rtshpc.geo.align import EXACT_PX, same_crs
from rtshpc.mapping.mosaic import connected

Box = tuple[float, float, float, float]


def grouped(seen: Sequence[Seen], dates: Sequence[str]) -> list[Seen]:
    """The same with group, row and column in place; groups are numbered in the order of their first scenes.

    Scenes that touch without sharing a pixel meet too. A scene without a ground is a group of its own.
    """
    meeting = ((one, two) for one, two in _near(seen, dates) if _meet(seen[one].ground, seen[two].ground))
    groups: dict[int, list[int]] = {}
    for number, first in enumerate(connected(len(seen), meeting)):
        groups.setdefault(first, []).append(number)
    found = list(seen)
    for group, members in enumerate(groups.values()):
        places = [_place(seen[members[0]].ground, seen[number].ground) for number in members]
        top, left = min(row for row, _ in places), min(col for _, col in places)
        for number, (row, col) in zip(members, places, strict=True):
            found[number] = seen[number].model_copy(update={"group": group, "row": row - top, "col": col - left})
    return found


def _near(seen: Sequence[Seen], dates: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of one date and CRS whose bounds meet, found from the south to the north without comparing all with all."""
    known: dict[str, int] = {}
    sets: dict[tuple[str, int], list[tuple[Box, int]]] = {}
    for number, (one, date) in enumerate(zip(seen, dates, strict=True)):
        if one.ground is None:
            continue
        wkt = one.ground.crs_wkt
        if wkt not in known:
            known[wkt] = next((crs for name, crs in known.items() if same_crs(name, wkt)), len(known))
        sets.setdefault((date, known[wkt]), []).append((_bounds(one.ground), number))
    for members in sets.values():
        reached: list[tuple[Box, int]] = []
        for box, number in sorted(members, key=lambda member: (member[0][1], member[1])):
            reached = [
                (other, at) for other, at in reached if other[3] >= box[1]
            ]  # the others end below all that follow
            for other, at in reached:
                if box[0] <= other[2] and other[0] <= box[2]:
                    yield at, number
            reached.append((box, number))


def _bounds(ground: Ground) -> Box:
    """Left, bottom, right, top of a scene and half a pixel around it, in its CRS."""
    a, b, c, d, e, f = ground.transform
    xs = [c, c + a * ground.width, c + b * ground.height, c + a * ground.width + b * ground.height]
    ys = [f, f + d * ground.width, f + e * ground.height, f + d * ground.width + e * ground.height]
    rim = (math.hypot(a, d) + math.hypot(b, e)) / 4
    return min(xs) - rim, min(ys) - rim, max(xs) + rim, max(ys) + rim


def _meet(one: Ground | None, two: Ground | None) -> bool:
    """Whether scenes of one CRS lie on one lattice (corners may be off by `EXACT_PX`, as writers round) and touch."""
    assert one is not None and two is not None
    a, b, _, d, e, _ = one.transform
    g, h, _, j, k, _ = two.transform
    row, col = _offset(one, two)
    # Pixels that differ a little drift apart over both scenes.
    reach = max(one.width, one.height, two.width, two.height)
    drift = max(abs(a - g) + abs(d - j), abs(b - h) + abs(e - k)) * reach
    if drift > EXACT_PX * (math.hypot(a, d) + math.hypot(b, e)):
        return False
    if max(abs(col - round(col)), abs(row - round(row))) > EXACT_PX:
        return False
    return -two.width <= round(col) <= one.width and -two.height <= round(row) <= one.height


def _offset(one: Ground, two: Ground) -> tuple[float, float]:
    """Row and column of the corner of `two` in the pixels of `one`."""
    a, b, c, d, e, f = one.transform
    x, y = two.transform[2] - c, two.transform[5] - f
    determinant = a * e - b * d
    return (a * y - d * x) / determinant, (e * x - b * y) / determinant


def _place(first: Ground | None, ground: Ground | None) -> tuple[int, int]:
    if first is None or ground is None:
        return 0, 0
    row, col = _offset(first, ground)
    return round(row), round(col)
