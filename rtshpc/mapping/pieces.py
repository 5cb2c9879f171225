"""Instances as single chips saw them, and the file that carries them from the map tasks to the merge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from rtshpc.core.errors import RunError
from rtshpc.core.records import replacing
from rtshpc.geo.chips import ChipBox

Mask = NDArray[np.bool_]

_MAGIC = b"rtshpc pieces 1\n"
_HEAD = np.dtype(
    [
        ("chip", "<i8"),
        ("row", "<i8"),
        ("col", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("kind", "<i4"),
        ("score", "<f8"),
    ]
)
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """One instance as one chip saw it.

    Attributes:
        chip: index into `Layout.boxes()`.
        row: of `mask[0, 0]` in the scene's grid, px.
        col: of `mask[0, 0]` in the scene's grid, px.
        mask: bool (h, w), tight: its first and last row and column each hold a px; it may be of several parts.
        score: 0 to 1.
        kind: index into `data.classes`.
    """

    chip: int
    row: int
    col: int
    mask: Mask
    score: float
    kind: int


def piece(chip: int, box: ChipBox, mask: NDArray[Any], score: float, kind: int) -> Piece | None:
    """What chip number `chip`, cut at `box`, saw as `mask` (size, size; non-zero = slump); None for an empty mask."""
    found = tight(mask != 0)
    if found is None:
        return None
    row, col, cropped = found
    return Piece(chip, box.row + row, box.col + col, cropped.copy(), float(score), int(kind))


class Placed(Protocol):
    """A mask whose px (0, 0) is (row, col) of a lattice."""

    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int: ...
    @property
    def mask(self) -> Mask: ...


def boxes_of(placed: Sequence[Placed]) -> NDArray[np.int64]:
    """(n, 4) top, left, bottom, right of masks on their lattice, px, half open."""
    sides = (side for one in placed for side in (one.row, one.col, *one.mask.shape))
    boxes = np.fromiter(sides, np.int64, 4 * len(placed)).reshape(-1, 4)  # np.array of tuples takes four times as long
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def tight(mask: Mask) -> tuple[int, int, Mask] | None:
    """The first row, the first column and the view of `mask` that holds all its px; None where there is none."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8)) if mask.size else (0, 0, 0, 0)
    return (top, left, mask[top : top + height, left : left + width]) if width else None


def write_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Write `pieces` atomically, one bit a px, with a checksum; the same pieces in any order give the same bytes."""
    rows = [
        ((one.chip, one.row, one.col, *one.mask.shape, one.kind, one.score), np.packbits(one.mask).tobytes())
        for one in pieces
    ]
    rows.sort()
    heads = np.array([head for head, _ in rows], _HEAD)
    content = b"".join([_MAGIC, len(rows).to_bytes(8, "little"), heads.tobytes(), *(bits for _, bits in rows)])
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def read_pieces(path: Path) -> list[Piece]:
    """The pieces in `path`, sorted by chip, place and content.

    Raises:
        RunError: the file is absent, not whole, or not a file of pieces.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise RunError(f"{path}: is not a whole file of pieces; map the scene again")
    at = len(_MAGIC) + 8
    count = int.from_bytes(body[len(_MAGIC) : at], "little")
    heads = np.frombuffer(body, _HEAD, count, at)
    bits = np.frombuffer(body, np.uint8, offset=at + heads.nbytes)
    pieces: list[Piece] = []
    done = 0
    for chip, row, col, height, width, kind, score in heads.tolist():
        used = -(-height * width // 8)
        mask = np.unpackbits(bits[done : done + used], count=height * width).view(np.bool_).reshape(height, width)
        pieces.append(Piece(chip, row, col, mask, score, kind))
        done += used
    return pieces
