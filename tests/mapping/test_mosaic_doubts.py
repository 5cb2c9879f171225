"""What the map says where chips or scenes do not agree: real detectors, scenes with collars, scenes that only abut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mapping_making import landscape, merged, px, same, scene, seen, truth

from rtshpc.mapping import mosaic
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.mosaic import MapInstance, PlacedScene, merge
from rtshpc.mapping.pieces import Piece, piece

LAYOUT = Layout(10, 18, 10, 2)
"""Two chips: columns 0 to 9 and 8 to 17, the seam of their cores before column 9."""


def box(chip: int, rows: tuple[int, int], cols: tuple[int, int], score: float = 0.5, kind: int = 0) -> Piece:
    """A rectangle, half open, in the scene's px."""
    return Piece(chip, rows[0], cols[0], np.ones((rows[1] - rows[0], cols[1] - cols[0]), np.bool_), score, kind)


def rectangle(rows: tuple[int, int], cols: tuple[int, int]) -> frozenset[tuple[int, int]]:
    return frozenset((row, col) for row in range(*rows) for col in range(*cols))


def mapped(*pieces: Piece, layout: Layout = LAYOUT) -> list[MapInstance]:
    return merge([PlacedScene("a", 0, 0, layout, pieces)])


def guesses(layout: Layout, seed: int) -> list[Piece]:
    """What a very bad detector says: noise that overlaps, of equal scores now and then."""
    draw = np.random.default_rng(seed)
    found = []
    for chip, place in enumerate(layout.boxes()):
        for _ in range(int(draw.integers(0, 5))):
            mask = np.zeros((layout.size, layout.size), np.bool_)
            top, left = draw.integers(0, layout.size, 2)
            mask[top : top + 7, left : left + 7] = draw.random(mask[top : top + 7, left : left + 7].shape) < 0.8
            mask[max(layout.height - place.row, 0) :] = mask[:, max(layout.width - place.col, 0) :] = False
            one = piece(chip, place, mask, float(draw.integers(1, 5)) / 4, int(draw.integers(2)))
            found += [one] if one else []
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(4, 12), st.integers(2, 3))
def test_whatever_chips_say_each_core_decides_its_pixels_and_no_pixel_is_in_two_instances(
    seed: int, size: int, overlap: int
) -> None:
    layout = Layout(27, 31, size, overlap)
    pieces = guesses(layout, seed)
    decided = np.zeros((27, 31), np.bool_)
    for one in pieces:
        top, left, bottom, right = layout.core(one.chip)
        said = np.zeros((27, 31), np.bool_)
        said[one.row : one.row + one.mask.shape[0], one.col : one.col + one.mask.shape[1]] = one.mask
        decided[top:bottom, left:right] |= said[top:bottom, left:right]
    found = mapped(*pieces, layout=layout)
    count = np.zeros((27, 31), np.int64)
    for one in found:
        count[tuple(np.array(sorted(px(one))).T)] += 1
        assert one.mask[0].any() and one.mask[-1].any() and one.mask[:, 0].any() and one.mask[:, -1].any()
    assert np.array_equal(count, decided)
    np.random.default_rng(seed).shuffle(pieces)  # type: ignore[arg-type]
    assert same(mapped(*pieces, layout=layout), found)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_scenes_that_disagree_in_any_order_give_the_same_map_without_a_pixel_in_two_instances(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scenes = []
    for number in range(4):
        layout = Layout(*draw.integers(8, 24, 2).tolist(), 8, 3)
        scenes.append(
            PlacedScene(f"s{number}", *draw.integers(0, 16, 2).tolist(), layout, guesses(layout, seed + number))
        )
    found = merge(scenes)
    count = np.zeros((48, 48), np.int64)
    for one in found:
        count[tuple(np.array(sorted(px(one))).T)] += 1
    assert count.max(initial=0) <= 1
    assert same(merge(scenes[::-1]), found)


def test_two_pieces_are_one_where_they_share_more_than_half_of_what_either_saw_in_their_window() -> None:
    joined = mapped(box(0, (2, 5), (5, 10)), box(1, (2, 4), (8, 14)))
    assert [px(one) for one in joined] == [rectangle((2, 5), (5, 9)) | rectangle((2, 4), (9, 14))]
    half = mapped(box(0, (2, 6), (5, 10)), box(1, (2, 4), (8, 14)))
    assert [px(one) for one in half] == [rectangle((2, 6), (5, 9)), rectangle((2, 4), (9, 14))]


def test_one_piece_that_covers_two_of_another_chip_does_not_fuse_them() -> None:
    found = mapped(box(0, (2, 4), (5, 10)), box(0, (4, 6), (5, 10)), box(1, (2, 6), (8, 14)))
    assert len(found) == 3


def test_what_only_a_chip_that_does_not_own_it_saw_is_not_in_the_map() -> None:
    assert mapped(box(0, (2, 4), (9, 10))) == []
    assert [px(one) for one in mapped(box(0, (2, 4), (7, 10)))] == [rectangle((2, 4), (7, 9))]


def test_a_duplicate_in_one_chip_is_no_second_instance() -> None:
    (found,) = mapped(box(0, (1, 8), (1, 8), 0.6, 1), box(0, (1, 8), (2, 8), 0.9, 1))
    assert px(found) == rectangle((1, 8), (1, 8)) and found.score == 0.9


def test_of_duplicates_with_holes_and_notches_every_pixel_counts() -> None:
    one, other = np.ones((2, 7, 7), np.bool_)
    one[3, 3] = other[0, 0] = False
    pieces = [Piece(0, 1, 1, mask, 0.5, 0) for mask in (one, other)]
    assert [px(found) for found in mapped(*pieces)] == [rectangle((1, 8), (1, 8))] == [px(mapped(*pieces[::-1])[0])]


@pytest.mark.parametrize("first", [0.9, 0.2])
def test_a_pixel_that_two_masks_of_a_chip_claim_goes_to_the_higher_score(first: float) -> None:
    found = mapped(box(0, (1, 4), (1, 5), first), box(0, (1, 4), (4, 8), 0.5))
    assert [px(one) for one in found] == [
        rectangle((1, 4), (1, 5 if first > 0.5 else 4)),
        rectangle((1, 4), (5 if first > 0.5 else 4, 8)),
    ]


def test_a_slump_cut_by_the_nodata_collar_of_one_scene_is_the_one_that_the_other_saw_whole() -> None:
    layout = Layout(20, 20, 20, 2)
    whole = PlacedScene("whole", 0, 0, layout, [box(0, (5, 9), (4, 16))])
    collar = np.ones((20, 20), np.bool_)
    collar[:, 8:] = False
    cut = [
        PlacedScene("collar", 2, 0, layout, [box(0, (3, 7), (4, 8), 0.9)], ground)
        for ground in (None, lambda top, left, bottom, right: collar[top:bottom, left:right])
    ]
    assert len(merge([whole, cut[0]])) == 2
    (found,) = merge([whole, cut[1]])
    assert px(found) == rectangle((5, 9), (4, 16)) and found.score == 0.9 and found.scene == "whole"


def test_what_only_one_of_two_scenes_saw_is_in_the_map() -> None:
    layout = Layout(20, 20, 20, 2)
    found = merge([PlacedScene("a", 0, 0, layout, []), PlacedScene("b", 3, 3, layout, [box(0, (4, 6), (4, 6))])])
    assert [px(one) for one in found] == [rectangle((7, 9), (7, 9))]


@pytest.mark.parametrize("seed", range(6))
def test_scenes_that_only_abut_join_what_goes_on_across_their_edge(seed: int) -> None:
    """Slumps are wide there and keep a px between them: contact along an edge says no more than that."""
    ids = np.zeros((30, 40), np.int64)
    draw = np.random.default_rng(seed)
    for number, row in enumerate(range(1, 28, 5), 1):
        ids[row : row + int(draw.integers(2, 5)), int(draw.integers(2, 16)) : int(draw.integers(22, 38))] = number
    parts = [scene(ids[:, :19], 8, 2, "a"), scene(ids[:, 19:], 11, 3, "b", 0, 19)]
    assert merged(merge(parts)) == truth(ids)
    turned = [scene(ids.T[:19], 8, 2, "a"), scene(ids.T[19:], 11, 3, "b", 19, 0)]
    assert merged(merge(turned)) == truth(ids.T)
    small = [scene(ids[:, :19], 64, 2, "a"), scene(ids[:, 19:], 48, 3, "b", 0, 19)]
    assert merged(merge(small)) == truth(ids)


def test_of_two_that_meet_at_the_edge_of_abutting_scenes_each_goes_on_as_itself() -> None:
    ids = np.zeros((12, 20), np.int64)
    ids[1:5, 3:17], ids[5:10, 3:10], ids[6:10, 10:17] = 1, 2, 2
    parts = [scene(ids[:, :10], 10, 2, "a"), scene(ids[:, 10:], 10, 2, "b", 0, 10)]
    assert merged(merge(parts)) == truth(ids)


def test_a_third_scene_that_saw_both_sides_of_an_edge_decides_there() -> None:
    ids = np.zeros((12, 20), np.int64)
    ids[2:6, 3:10], ids[2:6, 10:17] = 1, 2
    parts = [scene(ids[:, :10], 10, 2, "a"), scene(ids[:, 10:], 10, 2, "b", 0, 10)]
    assert len(merge(parts)) == 1
    assert merged(merge([*parts, scene(ids[:, 5:15], 10, 2, "c", 0, 5)])) == truth(ids)


def test_comparisons_grow_as_the_scene_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    shared = mosaic._shared
    monkeypatch.setattr(mosaic, "_shared", lambda *given: (calls.append(1), shared(*given))[1])
    counts = []
    for times in (1, 4):
        ids = np.kron(np.ones((times, times), np.int64), landscape(2, 40, 40))
        for number, (r, c) in enumerate(np.ndindex(times, times)):
            part = ids[r * 40 : r * 40 + 40, c * 40 : c * 40 + 40]
            part[part > 0] += 100 * number
        calls.clear()
        pieces = seen(ids, Layout(*ids.shape, 12, 4))
        mapped(*pieces, layout=Layout(*ids.shape, 12, 4))
        counts.append(len(calls) / len(pieces))
    assert counts[1] < 1.5 * counts[0] and counts[1] < 6
