"""Masks -> polygons that follow the px edges exactly: holes stay holes, every polygon is valid, areas are numbers of px.

Many masks are drawn under each other on one canvas, so that each step is one array operation for all of them. A corner
of an outline has one horizontal and one vertical edge; along a line, sorted corners are the two ends of an edge by turns. px that
touch by a corner alone are parted there, which makes each part of a mask (4 neighbours) one polygon with a connected
inside; a ring that comes to a corner twice is taken apart there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from rtshpc.mapping.pieces import Mask, Placed, boxes_of

_CANVAS_PX = 1 << 18
"""px of one canvas: small enough for a processor's cache, large enough for numpy's cost of a call not to matter."""

Ints = NDArray[np.int64]


def outlines(instances: Sequence[Placed], transform: Sequence[float]) -> list[Any]:
    """The outline of each instance: a shapely polygon, or a multipolygon where px touch by corners only or not at all.

    Args:
        instances: masks on a lattice; each holds a px.
        transform: of the lattice, (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f; any CRS.
    """
    found: list[Any] = [None] * len(instances)
    boxes = boxes_of(instances)
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    for batch in _batches(sides):
        shapes = _draw([instances[index].mask for index in batch], corners[batch], sides[batch], transform)
        for index, shape in zip(batch, shapes, strict=True):
            found[index] = shape
    return found


def _batches(sides: Ints) -> Iterator[list[int]]:
    """Indices of masks of nearly equal width that fill one canvas, or of one mask that is larger; `sides` are (n, 2)."""
    batch: list[int] = []
    rows = 0
    order = np.argsort(sides[:, 1], kind="stable")
    for index, (height, width) in zip(order.tolist(), sides[order].tolist(), strict=True):
        if batch and (rows + height + 1) * (width + 2) > _CANVAS_PX:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += height + 1
    if batch:
        yield batch


def _draw(masks: Sequence[Mask], corner: Ints, sides: Ints, transform: Sequence[float]) -> list[Any]:
    """The outlines of the masks of one canvas; `corner` (n, 2) are their places on the lattice, `sides` (n, 2) their shapes."""
    heights, widths = sides.T
    first = np.concatenate([[1], 1 + np.cumsum(heights + 1)])
    drawn = np.zeros((int(first[-1]), int(widths.max()) + 2), np.bool_)
    for top, bottom, right, mask in zip(
        first.tolist(), (first[:-1] + heights).tolist(), (widths + 1).tolist(), masks, strict=False
    ):
        drawn[top:bottom, 1:right] = mask
    canvas = drawn.view(np.uint8)
    rows, cols, sizes = _rings(canvas)
    ends = np.cumsum(sizes)
    begins = ends - sizes
    following = np.arange(1, len(rows) + 1)
    following[ends - 1] = begins
    twice = np.add.reduceat(cols * rows[following] - cols[following] * rows, begins)
    owner = np.searchsorted(first, rows[begins], side="right") - 1
    inside = _right_hand(rows, cols, begins, following)
    polygon_of = _polygon_of(canvas, first, owner, twice > 0, inside)

    shift = corner - np.column_stack([first[:-1], np.ones_like(heights)])
    place = np.repeat(owner, sizes)
    y, x = rows + shift[place, 0], cols + shift[place, 1]
    a, b, c, d, e, f = transform[:6]
    points = np.column_stack([a * x + b * y + c, d * x + e * y + f])
    rings: Any = shapely.linearrings(points, indices=np.repeat(np.arange(len(sizes)), sizes))
    order = np.lexsort((twice < 0, polygon_of))
    polygons: Any = shapely.polygons(rings[order], indices=polygon_of[order])
    parts = np.bincount(owner[twice > 0], minlength=len(masks))
    ends = np.cumsum(parts)
    return [
        polygons[end - 1] if count == 1 else shapely.multipolygons(polygons[end - count : end])
        for end, count in zip(ends.tolist(), parts.tolist(), strict=True)
    ]


def _rings(canvas: NDArray[np.uint8]) -> tuple[Ints, Ints, Ints]:
    """Row and column of each corner, ring by ring and in order along it, ground to the right; and the rings' lengths.

    A ring has no corner twice. A corner is named after the px below and to the right of it.
    """
    corners, twofold = _corners(canvas)
    rows = corners // canvas.shape[1]  # much faster than divmod
    cols = corners - rows * canvas.shape[1]
    rows += 1
    cols += 1
    # Along a row, corners 2k and 2k + 1 are the ends of edge k; it runs to the right where the ground lies below it.
    edges = np.arange(0, len(corners), 2)
    right = canvas[rows[edges], cols[edges]] == 1
    start, end = edges + ~right, edges + right
    follows = _vertical(canvas, rows, cols, twofold)[end] // 2
    order, sizes = _cycles(follows)
    sequence = np.column_stack([start[order], end[order]]).ravel()
    lengths = sizes * 2
    if twofold.any():
        sequence, lengths = _taken_apart(sequence, lengths, corners, twofold)
    return rows[sequence], cols[sequence], lengths


def _corners(canvas: NDArray[np.uint8]) -> tuple[Ints, NDArray[np.bool_]]:
    """Places of corners in reading order (of the px above and to the left), those where two px touch by a corner twice.

    Rows follow one another in one long line: a canvas has nothing in its first and last column, thus no corner at a row's end.
    """
    width, line = canvas.shape[1], canvas.ravel()
    across = line[:-width] ^ line[width:]
    left, right = across[:-1], across[1:]
    both = left & right
    both &= line[: -width - 1] ^ line[1:-width]
    places = np.flatnonzero(((left ^ right) | both).view(np.bool_))
    twofold = both[places] == 1
    if not twofold.any():
        return places, twofold
    return np.repeat(places, 1 + twofold), np.repeat(twofold, 1 + twofold)


def _vertical(canvas: NDArray[np.uint8], rows: Ints, cols: Ints, twofold: NDArray[np.bool_]) -> Ints:
    """For each corner the other end of its vertical edge.

    Of a corner that is there twice, the first ends the edge from the left. Where the px above right and below left touch, it is
    the second that ends the edge from above.
    """
    turned = np.arange(len(rows))
    first = np.flatnonzero(twofold)[::2]
    swapped = first[canvas[rows[first] - 1, cols[first]] == 1]
    turned[swapped], turned[swapped + 1] = swapped + 1, swapped
    narrow = cols.astype(np.uint16) if canvas.shape[1] <= 1 << 16 else cols  # numpy sorts these in linear time
    down = turned[np.argsort(narrow, kind="stable")]
    mates = np.empty_like(down)
    mates[down[::2]], mates[down[1::2]] = down[1::2], down[::2]
    return mates


def _cycles(follows: Ints) -> tuple[Ints, Ints]:
    """The cycles of a permutation, one after the other, each from its lowest; and their lengths.

    Each round looks twice as far along the cycles as the one before.
    """
    every = np.arange(len(follows))
    lowest, ahead = every, follows
    while True:
        lower = np.minimum(lowest, lowest[ahead])
        if np.array_equal(lower, lowest):
            break
        lowest, ahead = lower, ahead[ahead]
    last = follows == lowest
    ahead = np.where(last, every, follows)
    left = (~last).astype(np.int64)
    while (further := left[ahead]).any():
        left += further
        ahead = ahead[ahead]
    first = np.flatnonzero(lowest == every)
    sizes = left[first] + 1
    end = np.empty_like(every)
    end[first] = np.cumsum(sizes)
    order = np.empty_like(every)
    order[end[lowest] - 1 - left] = every
    return order, sizes


def _taken_apart(sequence: Ints, lengths: Ints, corners: Ints, twofold: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Rings that come to no corner twice, of rings that may."""
    begins = np.cumsum(lengths) - lengths
    suspect = np.logical_or.reduceat(twofold[sequence], begins).tolist()
    places = corners.tolist()
    rings: list[list[int]] = []
    for begin, length, apart in zip(begins.tolist(), lengths.tolist(), suspect, strict=True):
        ring = sequence[begin : begin + length].tolist()
        rings += _simple(ring, places) if apart else [ring]
    return np.concatenate([np.array(ring) for ring in rings]), np.array([len(ring) for ring in rings])


def _simple(ring: list[int], places: list[int]) -> list[list[int]]:
    """A ring in loops: each time it comes back to a corner, what lies between is a loop of its own."""
    found: list[list[int]] = []
    path: list[int] = []
    seen: dict[int, int] = {}
    for corner in ring:
        place = places[corner]
        if place not in seen:
            seen[place] = len(path)
            path.append(corner)
            continue
        back = seen[place]
        found.append(path[back:])
        for left in path[back + 1 :]:
            del seen[places[left]]
        del path[back + 1 :]
    return [path, *found]


def _right_hand(rows: Ints, cols: Ints, begins: Ints, following: Ints) -> tuple[Ints, Ints]:
    """Row and column of a px of the ground at the first edge of each ring, which lies to the right of it."""
    row, col = rows[begins], cols[begins]
    down, across = np.sign(rows[following[begins]] - row), np.sign(cols[following[begins]] - col)
    return row - ((across < 0) | (down < 0)), col - ((across < 0) | (down > 0))


def _polygon_of(
    canvas: NDArray[np.uint8], first: Ints, owner: Ints, shell: NDArray[np.bool_], inside: tuple[Ints, Ints]
) -> Ints:
    """The number of the polygon that each ring belongs to; shells are numbered by mask and place.

    Only masks with several shells and a hole need a look: a ring's ground lies in the same part of the mask as its shell's.
    """
    count = len(first) - 1
    shells = np.flatnonzero(shell)
    shells = shells[np.argsort(owner[shells], kind="stable")]
    numbers = np.full(len(owner), -1)
    numbers[shells] = np.arange(len(shells))
    only = np.zeros(count, np.int64)
    only[owner[shells]] = numbers[shells]
    holes = np.flatnonzero(~shell)
    numbers[holes] = only[owner[holes]]
    several = np.bincount(owner[shells], minlength=count) > 1
    rings: dict[int, list[int]] = defaultdict(list)
    for ring in np.flatnonzero(several[owner] & (np.bincount(owner[holes], minlength=count) > 0)[owner]).tolist():
        rings[int(owner[ring])].append(ring)
    for mask, found in rings.items():
        top = int(first[mask])
        part = canvas[top : int(first[mask + 1])]
        labels = cv2.connectedComponents(part, connectivity=4, ltype=cv2.CV_32S)[1]
        label = dict(zip(found, labels[inside[0][found] - top, inside[1][found]].tolist(), strict=True))
        polygon = {label[ring]: numbers[ring] for ring in found if shell[ring]}
        for ring in found:
            numbers[ring] = polygon[label[ring]]
    return numbers
