"""Masks -> instances: ours against OpenCV, pycocotools and rasterio ways, in CPU milliseconds a mask of one run.

    python benchmarks/instances.py [--json] [--masks 64] [--repeats 5]

All sides take the same generated 512 px masks of 4 to 8 slumps, some with holes, and must find the same 8-connected
components with their holes. `ours` is what preprocess calls: checks of the values, components, unknown ground, small
ones dropped. `components` is OpenCV's bare labelling, the limit of an id raster; `with stats` adds its boxes and areas;
`one by one` encodes every component as COCO RLE; `shapes` makes a polygon of each with rasterio. `outlines` fills outer
contours again, which is fast and loses holes: the share of pixels that it invents is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from common import conclude, options
from pycocotools import mask as coder
from rasterio.features import shapes

from rtshpc.core.config import GeneratedConfig
from rtshpc.data.synthetic import draw, draw_block
from rtshpc.geo.instances import from_raster

SIZE = 512
MIN_PX = 4
TARGETS = {"with stats / ours": 4.0, "one by one / ours": 4.0, "shapes / ours": 8.0}
"""Least time of a way that also gives whole instances, over ours."""

Mask = npt.NDArray[np.uint8]


def ours(mask: Mask) -> int:
    """Instances of the stage preprocess."""
    return from_raster(mask, "mask", None, MIN_PX).count


def components(mask: Mask) -> int:
    """OpenCV's labels."""
    return cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)[0] - 1


def with_stats(mask: Mask) -> int:
    """Labels, boxes and areas."""
    return cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)[0] - 1


def one_by_one(mask: Mask) -> int:
    """Labels, then a full mask and an RLE for each."""
    count, ids = cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)
    return len([coder.encode(np.asfortranarray(ids == number, dtype=np.uint8)) for number in range(1, count)])


def polygons(mask: Mask) -> int:
    """A polygon each."""
    return sum(1 for _ in shapes(mask, mask=mask.view(np.bool_), connectivity=8))


def outlines(mask: Mask) -> int:
    """Outer contours, filled."""
    found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(np.zeros(mask.shape, np.uint8), found, -1, 1, cv2.FILLED)
    return len(found)


SIDES: dict[str, Callable[[Mask], int]] = {
    "ours": ours,
    "components": components,
    "with stats": with_stats,
    "one by one": one_by_one,
    "shapes": polygons,
    "outlines": outlines,
}


def make_masks(count: int) -> list[Mask]:
    """Generated masks, every second with holes."""
    config = GeneratedConfig(size_px=SIZE, slumps_per_scene=(4, 8), nodata_fraction=0)
    made: list[Mask] = []
    for number in range(count):
        ids = draw_block(draw(config, "banks", number), 0, 0, SIZE, SIZE)[1]
        mask = (ids > 0).astype(np.uint8)
        if number % 2:
            core = cv2.erode(mask, np.ones((5, 5), np.uint8))
            mask[cv2.dilate(core[::7, ::7].repeat(7, 0).repeat(7, 1)[:SIZE, :SIZE] & core, np.ones((2, 2))) > 0] = 0
        labels, ids, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        small = np.array([False] + [stats[label, cv2.CC_STAT_AREA] < MIN_PX for label in range(1, labels)])
        made.append(np.where(small[ids], 0, mask).astype(np.uint8))
    return made


def invented(masks: Sequence[Mask]) -> float:
    """Share of pixels that refilled outer contours add."""
    added = 0
    for mask in masks:
        found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), found, -1, 1, cv2.FILLED)
        added += int(filled.sum()) - int(mask.sum())
    return added / max(sum(int(mask.sum()) for mask in masks), 1)


def disagreements(masks: Sequence[Mask]) -> dict[str, int]:
    """Masks on which a side finds another number of instances than OpenCV's labelling does."""
    return {
        name: sum(side(mask) != components(mask) for mask in masks)
        for name, side in SIDES.items()
        if name != "components"
    }


def milliseconds(side: Callable[[Mask], int], masks: Sequence[Mask]) -> float:
    """CPU time of a mask."""
    start = time.process_time()
    for mask in masks:
        side(mask)
    return (time.process_time() - start) / len(masks) * 1e3


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed or ours is not exact."""
    given = options(__doc__, masks=64, repeats=5).parse_args(arguments)
    cv2.setNumThreads(1)
    masks = make_masks(given.masks)
    wrong = disagreements(masks)
    rounds = [{name: milliseconds(side, masks) for name, side in SIDES.items()} for _ in range(given.repeats)]
    times = {name: min(row[name] for row in rounds) for name in SIDES}
    ratios = {name: times[name.removesuffix(" / ours")] / times["ours"] for name in TARGETS}
    report: dict[str, Any] = {
        "benchmark": "instances",
        "cpu_ms": times,
        "masks_in_disagreement": wrong,
        "pixels_invented_by_outlines": invented(masks),
        "ratios": ratios,
        "targets": TARGETS,
        "met": {"exact": wrong["ours"] == 0},
    }
    lines = [f"CPU milliseconds a mask of {SIZE} x {SIZE}, {given.masks} masks, least of {given.repeats}"]
    lines += [f"{name:12} {value:7.3f}   counts differ on {wrong.get(name, 0)}" for name, value in times.items()]
    lines.append(f"outlines invent {report['pixels_invented_by_outlines']:.1%} of the pixels")
    return conclude(report, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
