"""Merging instances over the seams of a scene: ours against SAHI's post-processing and against shapely's unary_union.

    python benchmarks/merge.py [--json] [--instances 20000] [--side 20000] [--chip 512] [--overlap 64] [--rounds 3]

All sides take the same masks: true instances, every third of which touches another, clipped to each chip, in random order and
without identities, as an ideal detector gives them. All end with polygons; those of SAHI and shapely are made of the masks
first, by our outlines, which is the fastest way here and keeps every px. A true instance is found when a result shares at
least 0.95 of what either covers; results beyond the true number are duplicates and fragments; crossers are instances that lie in several
cores. CPU seconds of this process: the first run of each side, which gets its memory from the system, and the least of all
its runs, which the ratios compare. The sides run by turns, `--rounds` times; ours, which takes a tenth of the others, four
times a round. SAHI's are absent where it is not installed (`pip install --no-deps sahi`: it wants another build of OpenCV).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import shapely
from common import conclude, options
from numpy.typing import NDArray

from rtshpc.mapping.layout import Layout
from rtshpc.mapping.mosaic import PlacedScene, merge
from rtshpc.mapping.outlines import outlines
from rtshpc.mapping.pieces import Piece, tight

IMAGE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""px as coordinates."""
FOUND = 0.95
RUNS = 4
"""Of ours in a round."""
SECONDS, NMM = "one second / ours", "sahi nmm / ours"
SAHI = {"sahi nmm": "NMM", "sahi greedy": "GreedyNMM", "sahi nms": "NMS"}
TARGETS = {SECONDS: 1.0, NMM: 10.0}


@dataclass(frozen=True)
class Slump:
    """A true instance: its mask from (row, col) of the scene."""

    row: int
    col: int
    mask: NDArray[np.bool_]


def make_slumps(count: int, side: int, seed: int = 0) -> list[Slump]:
    """`count` wavy blobs of 12 to about 100 px, each in a square of its own; every third square holds two that touch."""
    draw = np.random.default_rng(seed)
    across = int(np.ceil(np.sqrt(count)))
    step = side / across
    found: list[Slump] = []
    for place in draw.permutation(across * across).tolist():
        size = int(min(draw.lognormal(3.4, 0.35) + 6, step - 3))
        blob = _blob(draw, size)
        room = max(int(step) - size - 2, 1)
        row = int(place // across * step) + int(draw.integers(room))
        col = int(place % across * step) + int(draw.integers(room))
        middle = size // 2 if len(found) % 3 == 0 else size
        for part, left in ((blob[:, :middle], col), (blob[:, middle:], col + middle)):
            if (inside := tight(part)) is not None and len(found) < count:
                found.append(Slump(row + inside[0], left + inside[1], inside[2]))
    return found


def _blob(draw: np.random.Generator, size: int) -> NDArray[np.bool_]:
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle, waves = np.arctan2(y, x), draw.integers(2, 7)
    edge = 0.8 + 0.15 * np.sin(waves * angle + draw.uniform(0, 6.3)) + 0.05 * np.sin(11 * angle)
    return np.hypot(x, y) < edge


def see(slumps: Sequence[Slump], layout: Layout, seed: int = 1) -> list[Piece]:
    """Each instance clipped to each chip that meets it, in random order."""
    pieces: list[Piece] = []
    for one in slumps:
        height, width = one.mask.shape
        for row, top in _meeting(layout.rows, layout, one.row, height):
            for col, left in _meeting(layout.cols, layout, one.col, width):
                first, start = max(top - one.row, 0), max(left - one.col, 0)
                part = one.mask[first : top + layout.size - one.row, start : left + layout.size - one.col]
                if (inside := tight(part)) is not None:
                    place = one.row + first + inside[0], one.col + start + inside[1]
                    pieces.append(Piece(row * len(layout.cols) + col, *place, inside[2].copy(), 0.9, 0))
    np.random.default_rng(seed).shuffle(pieces)  # type: ignore[arg-type]
    return pieces


def _meeting(starts: Sequence[int], layout: Layout, first: int, length: int) -> Iterator[tuple[int, int]]:
    """Numbers and starts of the chips along a side that meet `length` px from `first`."""
    from_chip = max((first - layout.size) // (layout.size - layout.overlap), 0)
    for number in range(from_chip, len(starts)):
        if starts[number] >= first + length:
            return
        if starts[number] + layout.size > first:
            yield number, starts[number]


def ours(layout: Layout, pieces: Sequence[Piece]) -> list[Any]:
    """What the stage merge does."""
    return outlines(merge([PlacedScene("scene", 0, 0, layout, pieces)]), IMAGE)


def union(pieces: Sequence[Piece]) -> list[Any]:
    """Whatever touches is one."""
    return _parts(shapely.unary_union(outlines(pieces, IMAGE)))


def sahi(way: str, pieces: Sequence[Piece], side: int) -> list[Any]:
    """One of SAHI's ways, joining as its slicing does by default: the smaller one's share (IoS) is at least 0.5."""
    from sahi.postprocess import combine  # pyright: ignore[reportMissingImports]
    from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]

    predictions = [
        ObjectPrediction(
            bbox=list(polygon.bounds),
            category_id=0,
            segmentation=[shapely.get_coordinates(part.exterior)[:-1].ravel().tolist() for part in _parts(polygon)],
            score=piece.score,
            full_shape=[side, side],
        )
        for piece, polygon in zip(pieces, outlines(pieces, IMAGE), strict=True)
    ]
    chosen = getattr(combine, f"{way}Postprocess")
    return chosen(match_threshold=0.5, match_metric="IOS", class_agnostic=True)(predictions)


def sahi_polygons(predictions: Sequence[Any]) -> list[Any]:
    """What came out of it."""
    rings = [[shapely.Polygon(np.reshape(ring, (-1, 2))) for ring in one.mask.segmentation] for one in predictions]
    return [shapely.union_all(shapely.make_valid(parts)) for parts in rings]


def _parts(shape: Any) -> list[Any]:
    return list(shapely.get_parts(shape))


def judge(results: Sequence[Any], slumps: Sequence[Slump], layout: Layout) -> dict[str, Any]:
    """How many results there are, how many true instances are among them, and what share of the crossers."""
    true, given = np.array(outlines(slumps, IMAGE)), np.array(results)
    pairs = shapely.STRtree(given).query(true, predicate="intersects")
    shared = shapely.area(shapely.intersection(true[pairs[0]], given[pairs[1]]))
    either = shapely.area(true)[pairs[0]] + shapely.area(given)[pairs[1]] - shared
    found = np.zeros(len(slumps), np.bool_)
    found[pairs[0][shared >= FOUND * either]] = True
    crossers = np.array([_crosses(one, layout) for one in slumps])
    return {"results": len(results), "found": int(found.sum()), "crossers": float(found[crossers].mean())}


def _crosses(one: Slump, layout: Layout) -> bool:
    low, far = one.row + one.mask.shape[0] - 1, one.col + one.mask.shape[1] - 1
    return layout.owner(one.row, one.col) != layout.owner(low, far)


def seconds(sides: dict[str, Callable[[], list[Any]]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """CPU times of each side's runs, and what came out, by name: in each round the sides by turns, ours several times."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            for _ in range(RUNS if name == "ours" else 1):
                results.pop(name, None)
                gc.collect()
                gc.freeze()  # no side pays for looking through the true instances and what the others found
                start = time.process_time()
                results[name] = side()
                spent[name].append(time.process_time() - start)
    return spent, results


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed or ours misses an instance."""
    parser = options(__doc__, instances=20_000, side=20_000, chip=512, overlap=64, rounds=3)
    given = parser.parse_args(arguments)
    layout = Layout(given.side, given.side, given.chip, given.overlap)
    slumps = make_slumps(given.instances, given.side)
    pieces = see(slumps, layout)
    sides: dict[str, Callable[[], list[Any]]] = {
        "ours": lambda: ours(layout, pieces),
        "unary_union": lambda: union(pieces),
    }
    for name, way in SAHI.items() if find_spec("sahi") else ():
        sides[name] = lambda way=way: sahi(way, pieces, given.side)
    spent, results = seconds(sides, given.rounds)
    first = {name: runs[0] for name, runs in spent.items()}
    times = {name: min(runs) for name, runs in spent.items()}
    judged = {
        name: judge(sahi_polygons(found) if name in SAHI else found, slumps, layout) for name, found in results.items()
    }
    ratios = {SECONDS: 1 / times["ours"]} | {f"{name} / ours": times[name] / times["ours"] for name in times}
    del ratios["ours / ours"]
    right = judged["ours"]["found"] == judged["ours"]["results"] == len(slumps)
    report: dict[str, Any] = {
        "benchmark": "merge",
        "instances": len(slumps),
        "pieces": len(pieces),
        "cpu_seconds": times,
        "first_cpu_seconds": first,
        "judged": judged,
        "ratios": ratios,
        "targets": {name: least for name, least in TARGETS.items() if name in ratios},
        "met": {"every instance found": right},
    }
    lines = [
        f"{len(slumps)} instances in {len(pieces)} pieces, {given.side} px, chips of {given.chip} px by {given.overlap}"
    ]
    for name, spent in times.items():
        facts = judged[name]
        lines.append(
            f"{name:12} {spent:8.2f} s (first {first[name]:.2f} s)  {facts['results']:6} results  {facts['found']:6} found"
            f"  {facts['crossers']:6.1%} of the crossers"
        )
    if NMM not in ratios:
        lines.append("sahi         absent: it is not installed")
    return conclude(report, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
