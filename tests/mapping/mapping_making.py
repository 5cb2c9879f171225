"""Landscapes of slumps that touch, wind and hide, and a detector that sees them as they are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rtshpc.mapping.layout import Layout
from rtshpc.mapping.mosaic import MapInstance, PlacedScene
from rtshpc.mapping.pieces import Piece, piece

NEAR = [(row, col) for row in (-1, 0, 1) for col in (-1, 0, 1) if row or col]
Px = frozenset[tuple[int, int]]


def landscape(seed: int, height: int, width: int) -> np.ndarray:
    """Ids (H, W), 0 = none: 8-connected instances that grow from random px until they meet; some are blobs, some wind."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((height, width), np.int64)
    count = int(draw.integers(1, max(2, min(30, height * width // 12))))
    fronts: dict[int, list[tuple[int, int]]] = {}
    for number in range(1, count + 1):
        place = int(draw.integers(height)), int(draw.integers(width))
        if not ids[place]:
            ids[place] = number
            fronts[number] = [place]
    winds = {number: draw.random() < 0.4 for number in fronts}
    wanted = draw.uniform(0.1, 1.0) * height * width
    numbers = list(fronts)
    while numbers and np.count_nonzero(ids) < wanted:
        number = numbers[int(draw.integers(len(numbers)))]
        for _ in range(int(draw.integers(1, 12))):
            if not _grow(ids, number, fronts[number], winds[number], draw):
                numbers.remove(number)
                break
    return ids


def _grow(ids: np.ndarray, number: int, front: list[tuple[int, int]], winds: bool, draw: np.random.Generator) -> bool:
    while front:
        at = len(front) - 1 if winds else int(draw.integers(len(front)))
        row, col = front[at]
        free = [
            (row + down, col + right)
            for down, right in NEAR
            if 0 <= row + down < ids.shape[0] and 0 <= col + right < ids.shape[1] and not ids[row + down, col + right]
        ]
        if not free or (winds and len(free) < 3 and draw.random() < 0.5):
            front.pop(at)
            continue
        place = free[int(draw.integers(len(free)))]
        ids[place] = number
        front.append(place)
        return True
    return False


def facts_of(number: int) -> tuple[float, int]:
    """Score and class of an instance of a landscape."""
    return (number % 97) / 97, number % 3


def seen(ids: np.ndarray, layout: Layout, seed: int = 0) -> list[Piece]:
    """What an ideal detector says: every instance clipped to every chip, without identities, in random order."""
    found: list[Piece] = []
    for chip, box in enumerate(layout.boxes()):
        part = ids[box.row : box.row + box.size, box.col : box.col + box.size]
        for number in np.unique(part[part > 0]).tolist():
            one = piece(chip, box, part == number, *facts_of(number))
            assert one is not None
            found.append(one)
    np.random.default_rng(seed).shuffle(found)  # type: ignore[arg-type]
    return found


def scene(
    ids: np.ndarray, size: int, overlap: int, name: str = "a", row: int = 0, col: int = 0, seed: int = 0
) -> PlacedScene:
    """A scene of a landscape, `ids` being its part, as an ideal detector saw it."""
    layout = Layout(*ids.shape, size, overlap)
    return PlacedScene(name, row, col, layout, seen(ids, layout, seed))


def px(one: MapInstance) -> Px:
    rows, cols = np.nonzero(one.mask)
    return frozenset(zip((rows + one.row).tolist(), (cols + one.col).tolist(), strict=True))


def truth(ids: np.ndarray) -> dict[Px, tuple[float, int]]:
    """The px of every instance of a landscape, with score and class."""
    return {
        frozenset(zip(*(axis.tolist() for axis in np.nonzero(ids == number)), strict=True)): facts_of(number)
        for number in np.unique(ids[ids > 0]).tolist()
    }


def merged(instances: Iterable[MapInstance]) -> dict[Px, tuple[float, int]]:
    """The px of every instance of a map, with score and class; instances must be distinct."""
    listed = list(instances)
    result = {px(one): (one.score, one.kind) for one in listed}
    assert len(result) == len(listed)
    return result


def same(one: list[MapInstance], other: list[MapInstance]) -> bool:
    """Whether two maps are equal to the last byte, order included."""
    return [_bytes(item) for item in one] == [_bytes(item) for item in other]


def _bytes(one: MapInstance) -> tuple[object, ...]:
    return one.row, one.col, one.mask.shape, one.mask.tobytes(), one.score, one.kind, one.scene, one.pieces
