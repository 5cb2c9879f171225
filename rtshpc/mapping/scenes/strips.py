"""Pixels of the chips of a block, some rows of chips at a time, read in a thread while those before are worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.mapping.ground import Ground
from rtshpc.core.scenes import Scene
from rtshpc.geo.chips import ChipBox
from rtshpc.geo.raster import Grid, reading, rejecting
from rtshpc.geo.scene import ChipPixels, open_scene
from rtshpc.mapping.layout import Layout

CACHE_BYTES = 256 << 20
"""GDAL's cache holds at most so much: the rows of a file's blocks under a strip, so that each is decoded once. It is no
larger than that, for every page of it has to be made when a block of a scene begins."""

STRIP_PX = 2 << 20
"""A strip of several rows of chips holds at most so many px: neighbouring strips share an overlap, which is copied twice."""

AHEAD = 1
"""Strips that wait to be worked on."""

Item = TypeVar("Item")


@dataclass
class ReadFacts:
    """What is known of a scene once its chips were read.

    Attributes:
        scaling: modality -> (scale, offset): physical = pixel * scale + offset.
        missing: modalities that are not required and that it lacks.
        warnings: what was odd but usable.
    """

    scaling: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Strip:
    """Whole rows of the block's chips.

    Attributes:
        chips: indexes into `Layout.boxes()` and their boxes.
        row: of its first pixel in the scene, px.
        col: likewise.
        part: its pixels.
    """

    chips: list[tuple[int, ChipBox]]
    row: int
    col: int
    part: ChipPixels

    def chip(self, box: ChipBox) -> ChipPixels:
        """Pixels of one of its chips; views where it lies inside the scene."""
        return self.part.chip(ChipBox(box.row - self.row, box.col - self.col, box.size))


def strips(
    scene: Scene, ground: Ground, layout: Layout, chips: Sequence[int], data: DataConfig, facts: ReadFacts
) -> Generator[Strip, None, None]:
    """The pixels of `chips`, from the top; `facts` is filled in. Labels are not looked at.

    Args:
        scene: which scene.
        ground: the grid that `layout` cuts.
        layout: of the whole scene.
        chips: indexes into `layout.boxes()`, row by row.
        data: says how modalities are made.
        facts: scaling and missing modalities are known before the first strip, all warnings after the last.

    Raises:
        SceneRejected: by name and reason; `changed`, where the scene no longer lies on `ground`.
    """
    boxes = layout.boxes()
    with rejecting(scene.id), open_scene(scene, data, False, 0, CACHE_BYTES) as opened:
        _refuse_other_ground(scene, ground, opened.grid)
        facts.scaling, facts.missing = opened.scaling, sorted(opened.missing)
        parts = [(members, *_rectangle(members, boxes, ground)) for members in _in_strips(chips, layout)]
        needed = opened.decoded_bytes(max(height for *_, height, _ in parts), parts[0][-1])
        with reading(GDAL_CACHEMAX=CACHE_BYTES if needed is None else min(needed, CACHE_BYTES)):
            for members, row, col, height, width in parts:
                yield Strip([(chip, boxes[chip]) for chip in members], row, col, opened.part(row, col, height, width))
        facts.warnings = list(opened.warnings)


def _in_strips(chips: Sequence[int], layout: Layout) -> Iterator[list[int]]:
    """Chips of a block, row by row, in strips of whole rows."""
    rows = [list(row) for _, row in groupby(chips, lambda chip: chip // len(layout.cols))]
    step = layout.size - layout.overlap
    width = step * len(rows[0]) + layout.overlap
    most = max(1, (STRIP_PX // width - layout.overlap) // step)
    for first in range(0, len(rows), most):
        yield [chip for row in rows[first : first + most] for chip in row]


def _rectangle(chips: Sequence[int], boxes: Sequence[ChipBox], ground: Ground) -> tuple[int, int, int, int]:
    """Row, column, height and width of what chips cover of a scene, px."""
    first, last = boxes[chips[0]], boxes[chips[-1]]
    height = min(last.row + last.size, ground.height) - first.row
    return first.row, first.col, height, min(last.col + last.size, ground.width) - first.col


def _refuse_other_ground(scene: Scene, ground: Ground, grid: Grid) -> None:
    if (grid.height, grid.width, grid.transform) != (ground.height, ground.width, ground.transform):
        raise SceneRejected("changed", f"{scene.id}: its grid is no longer the one it was submitted with; map it again")


@contextmanager
def read_ahead(source: Generator[Item, None, None], ahead: int = AHEAD) -> Iterator[Iterator[Item]]:
    """The items of `source`, all of which runs in a thread; on leaving, the thread is over and `source` closed.

    Args:
        source: not begun.
        ahead: items that wait at most; one more is being made.
    """
    ready = queue.SimpleQueue[tuple[str, Item | BaseException | None]]()
    # A word for each item that may still come: a Queue with a bound of its own costs several times as much.
    room = queue.SimpleQueue[None]()
    left = threading.Event()
    for _ in range(ahead):
        room.put(None)

    def put(item: Item) -> bool:
        room.get()
        if not left.is_set():
            ready.put(("item", item))
        return not left.is_set()

    def work() -> None:
        try:
            with closing(source):
                if all(put(item) for item in source):
                    ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    def items() -> Iterator[Item]:
        while True:
            kind, value = ready.get()
            room.put(None)
            if isinstance(value, BaseException):
                raise value
            if kind == "end":
                return
            yield value  # pyright: ignore[reportReturnType]

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        left.set()
        room.put(None)
        thread.join()
