"""With a detector that sees every instance as it is, the map is the truth, however the ground was cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from mapping_making import NEAR, facts_of, landscape, merged, px, same, scene, seen, truth

from rtshpc.geo.instances import label_instances
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.mosaic import PlacedScene, merge
from rtshpc.mapping.pieces import read_pieces, write_pieces

seeds = st.integers(0, 2**32)


@st.composite
def cuts(draw: st.DrawFn, largest: int = 24) -> tuple[int, int]:
    """Side and overlap of chips, the least overlap often."""
    size = draw(st.integers(3, largest))
    return size, draw(st.one_of(st.just(2), st.integers(2, size - 1)))


@st.composite
def grounds(draw: st.DrawFn) -> tuple[int, int]:
    """Side and overlap of scenes."""
    size = draw(st.integers(12, 32))
    return size, draw(st.one_of(st.just(2), st.integers(2, size // 2)))


def layouts(*drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a check on 100 random layouts, in full on 500."""

    def of(check: Callable[..., None]) -> Callable[..., None]:
        def run(count: int) -> None:
            settings(max_examples=count, deadline=None)(given(*drawn)(check))()

        run.__name__ = check.__name__
        return pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.full)])(run)

    return of


@layouts(seeds, st.integers(1, 48), st.integers(1, 48), cuts())
def test_the_map_is_the_truth_for_any_chip_size_and_overlap(
    seed: int, height: int, width: int, cut: tuple[int, int]
) -> None:
    ids = landscape(seed, height, width)
    assert merged(merge([scene(ids, *cut, seed=seed)])) == truth(ids)


@layouts(seeds, st.integers(20, 36), st.integers(20, 36), cuts(16), st.integers(1, 50), st.integers(1, 7))
def test_the_map_is_the_same_for_any_block_size_number_of_tasks_and_order(
    seed: int, height: int, width: int, cut: tuple[int, int], block: int, tasks: int
) -> None:
    ids = landscape(seed, height, width)
    whole = scene(ids, *cut)
    layout = whole.layout
    draw = np.random.default_rng(seed)
    blocks = layout.blocks(block)
    draw.shuffle(blocks)
    done = []
    for task in range(tasks):
        chips = {chip for mine in blocks[task::tasks] for chip in mine}
        done.append([piece for piece in whole.pieces if piece.chip in chips])
    draw.shuffle(done)
    again = PlacedScene("a", 0, 0, layout, [piece for part in done for piece in part])
    assert same(merge([again]), merge([whole]))
    assert merged(merge([again])) == truth(ids)


@layouts(seeds, st.integers(16, 34), st.integers(16, 34), grounds(), st.lists(cuts(10), min_size=1, max_size=4))
def test_the_map_of_several_scenes_on_one_lattice_is_the_truth(
    seed: int, height: int, width: int, ground: tuple[int, int], chips: list[tuple[int, int]]
) -> None:
    ids = landscape(seed, height, width)
    scenes = []
    for number, box in enumerate(Layout(height, width, *ground).boxes()):
        part = ids[box.row : box.row + box.size, box.col : box.col + box.size]
        scenes.append(
            scene(part, *chips[number % len(chips)], f"s{number}", box.row - 7, box.col + 1000, seed + number)
        )
    found = merge(scenes)
    expected = {frozenset((row - 7, col + 1000) for row, col in px): facts for px, facts in truth(ids).items()}
    assert merged(found) == expected
    np.random.default_rng(seed).shuffle(scenes)  # type: ignore[arg-type]
    assert same(merge(scenes), found)


@layouts(seeds, st.data())
def test_scenes_that_overlap_in_any_way_fuse_nothing_and_cut_nothing_that_one_of_them_saw(
    seed: int, data: st.DataObject
) -> None:
    side = 34
    ids = landscape(seed, side, side)
    places = []
    for _ in range(data.draw(st.integers(2, 4))):
        top, left = data.draw(st.integers(0, side - 4)), data.draw(st.integers(0, side - 4))
        places.append((top, left, data.draw(st.integers(top + 4, side)), data.draw(st.integers(left + 4, side))))
    assume(not any(abut(one, other) for one in places for other in places))
    scenes = [
        scene(ids[t:b, left:r], *data.draw(cuts(16)), f"s{number}", t, left)
        for number, (t, left, b, r) in enumerate(places)
    ]
    where = np.zeros_like(ids)
    covered = np.zeros(ids.shape, np.bool_)
    for number, one in enumerate(merge(scenes), 1):
        held = tuple(np.array(sorted(px(one))).T)
        assert len(set(ids[held].tolist())) == 1 and not where[held].any()
        where[held] = number
    for t, left, b, r in places:
        covered[t:b, left:r] = True
        for down, right in NEAR:
            one, other = shifted(t, b, down), shifted(left, r, right)
            here, there = np.s_[one[0], other[0]], np.s_[one[1], other[1]]
            together = (ids[here] == ids[there]) & (ids[here] > 0)
            assert (where[here] == where[there])[together].all()
    assert np.array_equal(where > 0, covered & (ids > 0))


def abut(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    apart = [max(one[axis], other[axis]) - min(one[axis + 2], other[axis + 2]) for axis in (0, 1)]
    return max(apart) == 0


def shifted(first: int, end: int, by: int) -> tuple[slice, slice]:
    """Two views of a side of which the second lies `by` px further."""
    return slice(first + max(-by, 0), end - max(by, 0)), slice(first + max(by, 0), end - max(-by, 0))


def test_a_task_may_pass_its_pieces_on_in_a_file(tmp_path: Path) -> None:
    ids = landscape(3, 50, 50)
    layout = Layout(50, 50, 12, 3)
    write_pieces(tmp_path / "a", seen(ids, layout))
    assert merged(merge([PlacedScene("a", 0, 0, layout, read_pieces(tmp_path / "a"))])) == truth(ids)


def test_nothing_seen_is_an_empty_map() -> None:
    assert merge([]) == [] and merge([PlacedScene("a", 0, 0, Layout(9, 9, 4, 2), [])]) == []


PICTURES = {
    "two that touch cross one overlap of two px": """
        aaaaaaaaaaaa
        bbbbbbbbbbbb
        .cccccccccc.""",
    "one grazes an overlap with a single px": """
        ....aaa.....
        .....aa.....
        ....bbbb....""",
    "two cross at the corner of four chips": """
        .a......b...
        ..a....b....
        ...a..b.....
        ....ab......
        ....ba......
        ...b..a.....
        ..b....a....
        .b......a...""",
    "a diagonal line through every corner": """
        a...........
        .a..........
        ..a.........
        ...a........
        ....a.......
        .....a......
        ......a.....
        .......a....
        ........a...
        .........a..""",
    "two combs are of many parts in one chip and one in another": """
        aaaaaaaaaaaa
        a.a.a.a.a.a.
        abababababab
        abababababab
        abababababab
        .b.b.b.b.b.b
        bbbbbbbbbbbb""",
    "a ring holds another, larger than chips": """
        aaaaaaaaaaaa
        a..........a
        a.bbbbbbbb.a
        a.b.cccc.b.a
        a.b.c..c.b.a
        a.b.cccc.b.a
        a.bbbbbbbb.a
        a..........a
        aaaaaaaaaaaa""",
    "a checkerboard is two": """
        abababababab
        babababababa
        abababababab
        babababababa""",
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_hard_pictures_come_out_whole_for_every_cut(picture: str) -> None:
    ids = np.array([[0 if sign == "." else ord(sign) - 96 for sign in line.strip()] for line in picture.split()])
    assert all(label_instances(ids == number).max() == 1 for number in range(1, ids.max() + 1))
    for size in range(3, 13):
        for overlap in range(2, size):
            assert merged(merge([scene(ids, size, overlap)])) == truth(ids), (size, overlap)


def test_an_instance_in_parts_that_neighbouring_chips_see_together_is_one() -> None:
    """As a mask head may draw it: no px of the one part touches the other, and a seam lies between them."""
    ids = np.zeros((10, 20), np.int64)
    ids[3:6, 5:8] = ids[3:6, 11:14] = 7
    part = scene(ids, 12, 4)
    assert part.layout.col_seams == [0, 10, 20] and len(part.pieces) == 2
    found = merge([part])
    assert merged(found) == truth(ids)


def test_the_score_is_the_highest_and_the_class_that_of_most_px() -> None:
    ids = np.zeros((8, 20), np.int64)
    ids[2:5, 2:18] = 1
    whole = scene(ids, 8, 2)
    cores = [whole.layout.core(piece.chip) for piece in whole.pieces]
    widest = max(range(len(cores)), key=lambda at: min(cores[at][3], 18) - max(cores[at][1], 2))
    pieces = [
        type(one)(one.chip, one.row, one.col, one.mask, 0.9 if at != widest else 0.3, 2 if at == widest else 4 + at)
        for at, one in enumerate(whole.pieces)
    ]
    (found,) = merge([PlacedScene("a", 0, 0, whole.layout, pieces)])
    assert found.score == 0.9 and found.kind == 2 and found.pieces == len(pieces) == 3
    assert facts_of(1) == (1 / 97, 1)
