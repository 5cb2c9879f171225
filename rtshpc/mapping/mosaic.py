"""Pieces of chips become one set of instances, by geometry alone.

A chip decides the px of its core (`layout.py`): what it saw elsewhere only serves to recognise. Two pieces whose decided
parts are near are compared in the window that both chips saw, and are one instance where they share more than half of
what either saw there. Masks without overlap in one chip can therefore never be joined by way of one piece of another.
With a detector that sees every instance as it is the two are equal in the window or have no px in common, so that the
result is exact: connected px of an instance lie in equal or in neighbouring cores, and a chip sees at least one px
beyond its own core. Scenes on one lattice follow the same rule, each with its own layout; where neither scene sees
ground of the other (they only abut), the px along the common edge stand for what the other would have seen.

A px that two instances claim (masks of one chip that overlap, scenes that disagree) goes to the one with the higher score.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtshpc.mapping.layout import Layout
from rtshpc.mapping.pieces import Mask, Piece, boxes_of, tight

Box = tuple[int, int, int, int]
"""Top, left, bottom, right; px, half open."""
Boxes = NDArray[np.int64]
Ground = Callable[[int, int, int, int], Mask]
"""Top, left, bottom, right in the scene's px -> bool (h, w), where the scene has data."""


@dataclass(frozen=True, eq=False, slots=True)
class PlacedScene:
    """What the chips of one scene saw.

    Attributes:
        name: the scene's, unique in its group.
        row: of the scene's px (0, 0) on the group's lattice.
        col: of the scene's px (0, 0) on the group's lattice.
        layout: how it was cut.
        pieces: of its chips, in any order.
        ground: where it has data; only asked where two scenes disagree. None = everywhere.
    """

    name: str
    row: int
    col: int
    layout: Layout
    pieces: Sequence[Piece]
    ground: Ground | None = None


@dataclass(frozen=True, eq=False, slots=True)
class MapInstance:
    """One slump of the map.

    Attributes:
        row: of `mask[0, 0]` on the lattice, px.
        col: of `mask[0, 0]` on the lattice, px.
        mask: bool (h, w), tight.
        score: the highest of its pieces.
        kind: index into `data.classes`, of most of its px.
        scene: the one whose chips decided most of its px.
        pieces: how many chips decided a part of it.
    """

    row: int
    col: int
    mask: Mask
    score: float
    kind: int
    scene: str
    pieces: int


def merge(scenes: Sequence[PlacedScene]) -> list[MapInstance]:
    """One set of instances without a common px, sorted by place and content; the order of scenes and pieces is nothing.

    Instances must be connected (8 neighbours); time grows as the number of pieces, memory as their px.
    """
    views = _Views.of(sorted(scenes, key=lambda scene: (scene.name, scene.row, scene.col)))
    if not views.own:
        return []
    joined, rivals = _compare(views, _pairs(views))
    group = np.array(connected(len(views.own), joined), np.int64)
    instances = _assemble(views, group)
    claimed = {(int(group[a]), int(group[b])) for a, b in rivals if group[a] != group[b]}
    _settle(instances, claimed)
    return _sorted(list(instances.values()))


def _sorted(instances: list[MapInstance]) -> list[MapInstance]:
    """By place, and by content where two begin at one place, which is rare."""
    places = {(one.row << 40) + one.col: one for one in instances}
    if len(places) == len(instances):
        return [one for _, one in sorted(places.items(), key=itemgetter(0))]
    return sorted(instances, key=_content)


def _content(one: MapInstance) -> tuple[Any, ...]:
    return one.row, one.col, one.mask.shape, one.mask.tobytes(), -one.score, one.kind, one.scene, one.pieces


@dataclass(eq=False)
class _Views:
    """All pieces that hold a px of their own core; boxes are (n, 4) on the lattice: top, left, bottom, right.

    Attributes:
        scenes: of the group.
        grounds: (scenes, 4) what each scene covers.
        pieces: as seen.
        box: of their masks.
        own: the parts in the cores.
        own_box: of these.
        chip_box: what the piece's chip saw.
        near: the part of `box` in the core and in the cores around it.
        scene: index of each piece's scene.
        chip: index of each piece's chip in its scene.
    """

    scenes: list[PlacedScene]
    grounds: Boxes
    pieces: list[Piece]
    box: Boxes
    own: list[Mask]
    own_box: Boxes
    chip_box: Boxes
    near: Boxes
    scene: NDArray[np.int64]
    chip: NDArray[np.int64]

    @classmethod
    def of(cls, scenes: list[PlacedScene]) -> _Views:
        grounds = np.array([_ground(scene) for scene in scenes], np.int64).reshape(-1, 4)
        pieces = [piece for scene in scenes for piece in scene.pieces]
        ends = np.cumsum([0, *(len(scene.pieces) for scene in scenes)])
        scene = np.repeat(np.arange(len(scenes)), np.diff(ends))
        chip = np.array([piece.chip for piece in pieces], np.int64)
        shift = grounds[scene, :2]
        place = np.hstack([shift, shift])
        box = boxes_of(pieces) + place
        core, around, seen = np.empty_like(box), np.empty_like(box), np.empty_like(box)
        for number, placed in enumerate(scenes):
            mine = slice(ends[number], ends[number + 1])
            core[mine], around[mine], seen[mine] = _cuts(placed.layout, chip[mine])
        seen = _common(seen + place, grounds[scene])
        own, own_box = _owned(pieces, box, _common(box, core + place))
        kept = np.array([mask is not None for mask in own], np.bool_)
        return cls(
            scenes=scenes,
            grounds=grounds,
            pieces=[piece for piece, mask in zip(pieces, own, strict=True) if mask is not None],
            box=box[kept],
            own=[mask for mask in own if mask is not None],
            own_box=own_box[kept],
            chip_box=seen[kept],
            near=_common(box, around + place)[kept],
            scene=scene[kept],
            chip=chip[kept],
        )


def _ground(scene: PlacedScene) -> Box:
    return scene.row, scene.col, scene.row + scene.layout.height, scene.col + scene.layout.width


def _cuts(layout: Layout, chips: NDArray[np.int64]) -> tuple[Boxes, Boxes, Boxes]:
    """For each of `chips`: its core, the core with those around it, and the chip; (n, 4) in the scene's px."""
    bounds: list[list[NDArray[np.int64]]] = [[], [], []]
    for place, first, seam in zip(
        divmod(chips, len(layout.cols)), (layout.rows, layout.cols), (layout.row_seams, layout.col_seams), strict=True
    ):
        seams, starts, last = np.array(seam), np.array(first), len(seam) - 1
        bounds[0] += [seams[place], seams[place + 1]]
        bounds[1] += [seams[np.maximum(place - 1, 0)], seams[np.minimum(place + 2, last)]]
        bounds[2] += [starts[place], starts[place] + layout.size]
    core, around, seen = (np.column_stack(sides)[:, [0, 2, 1, 3]] for sides in bounds)
    return core, around, seen


def _common(one: Boxes, other: Boxes) -> Boxes:
    """The common part of boxes; without one, bottom <= top or right <= left."""
    return np.concatenate([np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])], axis=-1)


def _empty(boxes: Boxes) -> Any:
    return (boxes[..., 2:] <= boxes[..., :2]).any(axis=-1)


def _owned(pieces: list[Piece], box: Boxes, inside: Boxes) -> tuple[list[Mask | None], Boxes]:
    """The px of each piece in its core, tight, None without any; and the boxes of these."""
    own: list[Mask | None] = [piece.mask for piece in pieces]
    own_box = box.copy()
    cut = np.flatnonzero((inside != box).any(axis=1))
    within = inside[cut] - np.tile(box[cut, :2], 2)
    for index, (top, left, bottom, right), (row, col) in zip(
        cut.tolist(), within.tolist(), inside[cut, :2].tolist(), strict=True
    ):
        found = None if bottom <= top or right <= left else tight(pieces[index].mask[top:bottom, left:right])
        own[index] = found and found[2]
        if found is not None:
            own_box[index] = _box(row + found[0], col + found[1], found[2])
    return own, own_box


def _box(row: int, col: int, mask: Mask) -> Box:
    return row, col, row + mask.shape[0], col + mask.shape[1]


def _cut(mask: Mask, row: int, col: int, box: Sequence[int]) -> Mask:
    """The view of a mask placed at (row, col) that lies in `box`, which must meet it."""
    top, left, bottom, right = box
    return mask[max(top - row, 0) : max(bottom - row, 0), max(left - col, 0) : max(right - col, 0)]


def _pairs(views: _Views) -> Boxes:
    """(k, 2) pieces to compare: what one saw near its core meets or touches what the other decides."""
    own = _shapes(views.own_box)
    near, reaching = own.copy(), (views.near != views.own_box).any(axis=1)
    near[reaching] = _shapes(views.near[reaching])
    pairs = shapely.STRtree(own).query(near)
    pairs = np.sort(pairs[:, pairs[0] != pairs[1]], axis=0).astype(np.int64)
    keys = np.unique(pairs[0] * len(views.own) + pairs[1])
    return np.column_stack(np.divmod(keys, len(views.own)))


def _shapes(boxes: Boxes) -> Any:
    return shapely.box(boxes[:, 1], boxes[:, 0], boxes[:, 3], boxes[:, 2])


def _compare(views: _Views, pairs: Boxes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs that are one instance, and pairs that are not but may claim the same px."""
    a, b = pairs[:, 0], pairs[:, 1]
    windows = _common(views.chip_box[a], views.chip_box[b])
    meet = ~_empty(_common(_common(views.box[a], views.box[b]), windows))
    strangers = views.scene[a] != views.scene[b]
    rivals_possible = strangers | (views.chip[a] == views.chip[b])
    joined: list[tuple[int, int]] = []
    rivals: list[tuple[int, int]] = []
    for at in np.flatnonzero(meet).tolist():
        one, other = pairs[at].tolist()
        window = windows[at].tolist()
        shared, seen = _shared(views, one, other, window)
        if not shared:
            continue
        if 2 * shared <= seen and strangers[at]:
            shared, seen = _shared_ground(views, one, other, window)
        if 2 * shared > seen:
            joined.append((one, other))
        elif rivals_possible[at]:
            rivals.append((one, other))
    abut = strangers & _empty(_common(views.grounds[views.scene[a]], views.grounds[views.scene[b]]))
    joined += [(one, other) for one, other in pairs[abut].tolist() if _continues(views, one, other)]
    return joined, rivals


def _shared(views: _Views, one: int, other: int, window: Sequence[int]) -> tuple[int, int]:
    """How many px of `window` both pieces hold, and how many either."""
    first, second = views.pieces[one].mask, views.pieces[other].mask
    (top, left, bottom, right), (row, col, low, far) = views.box[one].tolist(), views.box[other].tolist()
    both = max(top, row, window[0]), max(left, col, window[1]), min(bottom, low, window[2]), min(right, far, window[3])
    shared = int(np.count_nonzero(_cut(first, top, left, both) & _cut(second, row, col, both)))
    if not shared:
        return 0, 0
    held = np.count_nonzero(_cut(first, top, left, window)) + np.count_nonzero(_cut(second, row, col, window))
    return shared, int(held) - shared


def _shared_ground(views: _Views, one: int, other: int, window: Sequence[int]) -> tuple[int, int]:
    """`_shared` on the ground where both pieces' scenes have data."""
    held = [_padded(views, index, window) for index in (one, other)]
    for index in (one, other):
        scene = views.scenes[views.scene[index]]
        if scene.ground is not None:
            top, left, bottom, right = window
            ground = scene.ground(top - scene.row, left - scene.col, bottom - scene.row, right - scene.col)
            held = [mask & ground for mask in held]
    return int(np.count_nonzero(held[0] & held[1])), int(np.count_nonzero(held[0] | held[1]))


def _padded(views: _Views, index: int, window: Sequence[int]) -> Mask:
    """What a piece holds of `window`, (h, w) of the window."""
    top, left, bottom, right = window
    row, col = views.box[index, :2].tolist()
    canvas = np.zeros((bottom - top, right - left), np.bool_)
    part = _cut(views.pieces[index].mask, row, col, window)
    at = max(row - top, 0), max(col - left, 0)
    canvas[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]] = part
    return canvas


def _continues(views: _Views, one: int, other: int) -> bool:
    """Whether pieces of two scenes that only abut go on in each other.

    The outermost px of either scene are repeated one px beyond its edge and compared with what the other saw there. Where a
    third scene saw both sides it alone decides.
    """
    between = _common(views.chip_box[one], views.chip_box[other])
    width = between[2:] - between[:2]
    if (width < 0).any():
        return False
    reach = (width == 0).astype(np.int64)
    window = between + np.concatenate([-reach, reach])
    if ((views.grounds[:, :2] <= window[:2]) & (views.grounds[:, 2:] >= window[2:])).all(axis=1).any():
        return False
    first, second = (_repeated(views, index, window) for index in (one, other))
    shared = int(np.count_nonzero(first & second))
    return 2 * shared > int(np.count_nonzero(first | second))


def _repeated(views: _Views, index: int, window: Boxes) -> Mask:
    """What a piece holds of `window`, the outermost px of its chip repeated beyond it."""
    inside = _common(window, views.chip_box[index])
    held = _padded(views, index, inside.tolist())
    before, after = (inside - window)[:2].tolist(), (window - inside)[2:].tolist()
    return np.pad(held, list(zip(before, after, strict=True)), mode="edge")


def connected(count: int, joined: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` things the lowest index it is joined with, however many joins lie between."""
    parent = list(range(count))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for a, b in joined:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return [find(index) for index in range(count)]


def _assemble(views: _Views, group: NDArray[np.int64]) -> dict[int, MapInstance]:
    """For each group of pieces, named by its lowest, the instance of their decided parts."""
    names = [views.scenes[number].name for number in views.scene.tolist()]
    alone = np.flatnonzero(np.bincount(group, minlength=len(group)) == 1)
    tops, lefts = views.own_box[alone, 0].tolist(), views.own_box[alone, 1].tolist()
    found = {
        index: MapInstance(row, col, views.own[index], piece.score, piece.kind, names[index], 1)
        for index, row, col in zip(alone.tolist(), tops, lefts, strict=True)
        for piece in (views.pieces[index],)
    }
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.flatnonzero(~np.isin(group, alone)).tolist():
        members[int(group[index])].append(index)
    return found | {first: _united(views, several, names) for first, several in members.items()}


def _united(views: _Views, members: list[int], names: list[str]) -> MapInstance:
    """One instance of several pieces."""
    boxes = views.own_box[members].tolist()
    top, left, bottom, right = (
        pick(side) for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    mask = np.zeros((bottom - top, right - left), np.bool_)
    for index, (row, col, low, far) in zip(members, boxes, strict=True):
        mask[row - top : low - top, col - left : far - left] |= views.own[index]
    parts, pieces = [views.own[index] for index in members], [views.pieces[index] for index in members]
    kind = _most([piece.kind for piece in pieces], parts)
    scene = _most([names[index] for index in members], parts)
    return MapInstance(top, left, mask, max(piece.score for piece in pieces), kind, scene, len(members))


def _most(values: Sequence[Any], masks: Sequence[Mask]) -> Any:
    """The value of most px, the lowest of several."""
    if len(set(values)) == 1:
        return values[0]
    held: Counter[Any] = Counter()
    for value, mask in zip(values, masks, strict=True):
        held[value] += int(np.count_nonzero(mask))
    return min(held, key=lambda value: (-held[value], value))


def _settle(instances: dict[int, MapInstance], rivals: Collection[tuple[int, int]]) -> None:
    """Give every px that two instances claim to the one with the higher score; what is left without px goes."""
    claims = {at: instances[at] for pair in rivals for at in pair}
    order = sorted(claims, key=lambda at: (-claims[at].score, _content(claims[at])))
    rank = {at: place for place, at in enumerate(order)}
    for pair in rivals:
        winner, loser = sorted(pair, key=lambda at: rank[at])
        if loser not in instances:
            continue
        strong, weak = claims[winner], instances[loser]
        mask = weak.mask.copy()
        part = _cut(mask, weak.row, weak.col, _box(strong.row, strong.col, strong.mask))
        part &= ~_cut(strong.mask, strong.row, strong.col, _box(weak.row, weak.col, weak.mask))
        found = tight(mask)
        if found is None:
            del instances[loser]
            continue
        row, col, left = found
        instances[loser] = replace(weak, row=weak.row + row, col=weak.col + col, mask=left)
