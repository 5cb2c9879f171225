from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rtshpc.core.errors import RunError
from rtshpc.geo.chips import ChipBox
from rtshpc.mapping.pieces import Piece, piece, read_pieces, write_pieces


def some(count: int = 30) -> list[Piece]:
    draw = np.random.default_rng(5)
    found = []
    for _ in range(count):
        mask = draw.random((20, 20)) < draw.choice([0.005, 0.5])
        one = piece(
            int(draw.integers(9)), ChipBox(int(draw.integers(99)), 7, 20), mask, draw.random(), int(draw.integers(3))
        )
        found += [one] if one else []
    return found


def facts(one: Piece) -> tuple[object, ...]:
    return one.chip, one.row, one.col, one.mask.tolist(), one.score, one.kind


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    pieces = some()
    write_pieces(tmp_path / "a", pieces)
    back = read_pieces(tmp_path / "a")
    assert sorted(map(facts, back)) == sorted(map(facts, pieces))
    assert all(one.mask.dtype == np.bool_ for one in back)


def test_the_same_pieces_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    pieces = some()
    write_pieces(tmp_path / "a", pieces)
    write_pieces(tmp_path / "b", pieces[::-1])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_pieces_are_a_file_too(tmp_path: Path) -> None:
    write_pieces(tmp_path / "a", [])
    assert read_pieces(tmp_path / "a") == []


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]])
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, harm) -> None:
    path = tmp_path / "a"
    write_pieces(path, some())
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(RunError, match="is not a whole file of pieces"):
        read_pieces(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing: cannot be read"):
        read_pieces(tmp_path / "nothing")


def test_a_piece_is_tight_and_placed_on_the_scenes_grid() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2, 3] = mask[4, 6] = 255
    one = piece(4, ChipBox(100, 50, 8), mask, 0.5, 1)
    assert one is not None and (one.row, one.col, one.mask.shape) == (102, 53, (3, 4))
    assert one.mask.sum() == 2 and piece(4, ChipBox(0, 0, 8), mask * 0, 0.5, 1) is None
