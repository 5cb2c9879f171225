"""Masks, id rasters and polygons become instances: one integer a slump on the primary grid.

Instances are 8-connected components with their holes; id rasters and polygons keep touching slumps apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import Affine

from rtshpc.geo.chips import ChipBox

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Kind = Literal["mask", "instances"]

_WIDEST_TABLE = 1 << 24
UNLABELLED = 255
"""In a 0/1 mask: unlabelled ground, declared as nodata or not."""


@dataclass(frozen=True)
class InstanceMap:
    """The instances of a scene or a chip.

    Attributes:
        ids: int32 (H, W), 0 = none, 1..n.
        classes: index into `data.classes` of instance 1..n.
        ignore: bool (H, W), ground where nothing is known: predictions there are not scored.
        notes: what was odd about the labels, for people.
    """

    ids: Ids
    classes: list[int]
    ignore: Mask
    notes: tuple[str, ...] = field(default=())

    @property
    def count(self) -> int:
        return len(self.classes)

    def crop(self, box: ChipBox, min_px: int = 1) -> InstanceMap:
        """The part in `box`, renumbered 1..n; beyond the scene there is nothing. See `crop`."""
        return crop(self, box, min_px)


def label_instances(mask: NDArray[Any]) -> Ids:
    """8-connected components of `mask` (H, W; non-zero = slump), int32 1..n; holes stay holes.

    They are numbered by their first pixels in reading order: labels of Wu, Otoo and Suzuki (2009), which scans by rows.
    """
    byte = (mask if mask.dtype == np.bool_ else mask != 0).view(np.uint8)
    ids = np.zeros(mask.shape, np.int32)
    filled = byte.any(axis=1)
    count = 0
    # Most ground holds nothing. No component crosses an empty row, so that each run of rows between can be labelled alone.
    for top, bottom in np.flatnonzero(np.diff(filled, prepend=False, append=False)).reshape(-1, 2).tolist():
        cols = np.flatnonzero(byte[top:bottom].any(axis=0))
        part = np.ascontiguousarray(byte[top:bottom, cols[0] : cols[-1] + 1])
        number, found = cv2.connectedComponentsWithAlgorithm(part, 8, cv2.CV_32S, cv2.CCL_WU)
        ids[top:bottom, cols[0] : cols[-1] + 1] = found if count == 0 else np.where(found > 0, found + count, 0)
        count += number - 1
    return ids


def from_ids(values: NDArray[Any]) -> Ids:
    """An id raster (H, W), positive = instance, as int32 1..n without gaps, in order of the ids.

    An id in several pieces stays one instance.
    """
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values) & (values > 0), values, 0)
        values = values.astype(np.int64) if values.max(initial=0) < 2**62 else values
    elif values.dtype.kind == "i":
        values = np.maximum(values, 0)
    highest = int(values.max(initial=0))
    if highest == 0:
        return np.zeros(values.shape, np.int32)
    if highest < _WIDEST_TABLE:
        present = np.bincount(values.ravel(), minlength=highest + 1) > 0
        present[0] = False
        return _table(present)[values]
    unique, inverse = np.unique(values, return_inverse=True)
    first = 0 if unique[0] == 0 else 1
    return (inverse.reshape(values.shape) + first).astype(np.int32)


def _table(present: Mask) -> Ids:
    """Old id -> new id without gaps; absent ids -> 0."""
    table = np.cumsum(present, dtype=np.int32)
    table[~present] = 0
    return table


def from_raster(values: NDArray[Any], kind: Kind, missing: Mask | None, min_px: int = 1) -> InstanceMap:
    """Instances of a label raster.

    kind `instances`: every positive value is one instance. kind `mask`: one positive value (1, 255, any)
    is a mask, whose components are the instances; several positive whole numbers are ids; a 0/1
    mask with 255 has unlabelled ground there.

    Args:
        values: (H, W) as stored.
        kind: what the raster holds.
        missing: bool (H, W), nodata and ignore values; None = nowhere.
        min_px: smaller instances are dropped.
    """
    notes: list[str] = []
    ignore = np.zeros(values.shape, np.bool_) if missing is None else missing
    if values.dtype.kind == "f":
        holes = ~np.isfinite(values)
        if holes.any():
            ignore = ignore | holes
    if ignore.any():
        values = np.where(ignore, np.zeros((), values.dtype), values)
    if kind == "mask" and _unlabelled(values):
        unlabelled = values == UNLABELLED
        ignore = ignore | unlabelled
        values = np.where(unlabelled, np.zeros((), values.dtype), values)
        notes.append("label_values: a 0/1 mask with undeclared 255, taken as unlabelled ground")
    slump = values > 0
    if kind == "instances":
        ids = from_ids(values)
    elif _one_value(values, slump):
        ids = label_instances(slump)
    elif values.dtype.kind == "f" and not bool((values == np.rint(values)).all()):
        notes.append("label_values: mask values are no whole numbers: everything above 0 is taken as a slump")
        ids = label_instances(slump)
    else:
        ids = from_ids(values)
        notes += _doubtful_ids(values, ids)
    ids = drop_small(ids, min_px)
    return InstanceMap(ids, [0] * int(ids.max(initial=0)), ignore, tuple(notes))


def _one_value(values: NDArray[Any], slump: Mask) -> bool:
    """Whether all values above 0, which are at `slump`, are one value."""
    highest = values.max(initial=0)
    return bool(highest <= 0) or np.array_equal(slump, values == highest)


def _unlabelled(values: NDArray[Any]) -> bool:
    """Whether a raster holds 255 and 1 and nothing else above 0."""
    if values.max(initial=0) != UNLABELLED:
        return False
    slump = values == 1
    return bool(slump.any() and ((values <= 0) | slump | (values == UNLABELLED)).all())


def _doubtful_ids(values: NDArray[Any], ids: Ids) -> list[str]:
    """What speaks against taking the values of a mask as ids: one of them in several places, or white (255) itself.

    Gaps alone do not: the part of an id raster that lies in a scene has them.
    """
    count, highest = int(ids.max(initial=0)), int(values.max(initial=0))
    inside = ids > 0
    parts = label_instances(inside)[inside].astype(np.int64) * (count + 1) + ids[inside]
    scattered = np.unique(parts).size > count
    if not scattered and (highest != UNLABELLED or count == highest):
        return []
    why = "some in several places" if scattered else "the highest is 255"
    return [f"label_values: a mask with {count} values above 0, {why}: taken as ids, one instance a value"]


def drop_small(ids: Ids, min_px: int) -> Ids:
    """`ids` without instances of fewer than `min_px` px, renumbered."""
    if min_px <= 1:
        return ids
    present = np.bincount(ids[ids > 0], minlength=1) >= min_px  # most ground is 0: a fifth of the time of counting all
    present[0] = False
    return ids if bool(present[1:].all()) else _table(present)[ids]


def rasterise(
    polygons: Sequence[Any], classes: Sequence[int], transform: Sequence[float], height: int, width: int
) -> tuple[Ids, list[int]]:
    """Polygons (shapely, in the grid's CRS) -> ids (H, W) and the class of each.

    A pixel belongs to the polygon that holds its centre; where polygons overlap the smaller one wins, so that
    none vanishes under another. A polygon without any pixel centre is left out.
    """
    order = sorted(range(len(polygons)), key=lambda index: -polygons[index].area)
    if not order:
        return np.zeros((height, width), np.int32), []
    burnt = rasterize(
        [(polygons[index], number) for number, index in enumerate(order, 1)],
        out_shape=(height, width),
        transform=Affine(*transform[:6]),
        fill=0,
        dtype="int32",
    ).astype(np.int32, copy=False)
    present = np.bincount(burnt.ravel(), minlength=len(order) + 1) > 0
    present[0] = False
    kept = [classes[order[number - 1]] for number in np.flatnonzero(present)]
    return _table(present)[burnt], kept


def burn(polygons: Sequence[Any], transform: Sequence[float], height: int, width: int) -> Mask:
    """Whether a polygon covers a pixel's centre, bool (H, W)."""
    if not polygons:
        return np.zeros((height, width), np.bool_)
    shapes = [(polygon, 1) for polygon in polygons]
    return rasterize(shapes, out_shape=(height, width), transform=Affine(*transform[:6]), fill=0, dtype="uint8") > 0


def crop(whole: InstanceMap, box: ChipBox, min_px: int = 1) -> InstanceMap:
    """The part of `whole` in `box` (size, size), renumbered 1..n in the old order.

    Pieces of fewer than `min_px` px, left by the cut, become ignore regions; beyond the scene there is nothing.
    """
    ids = cut(whole.ids, box)
    ignore = cut(whole.ignore, box)
    if min_px <= 1 and ids.shape == whole.ids.shape and box.row == box.col == 0:
        return whole
    if whole.count == 0 or not ids.any():
        return InstanceMap(np.zeros_like(ids), [], ignore, whole.notes)
    sizes = np.bincount(ids.ravel(), minlength=whole.count + 1)
    present = sizes >= max(min_px, 1)
    present[0] = False
    if min_px > 1:
        slivers = (sizes > 0) & ~present
        slivers[0] = False
        if slivers.any():
            ignore = ignore | slivers[ids]
    classes = [whole.classes[number - 1] for number in np.flatnonzero(present)]
    return InstanceMap(_table(present)[ids], classes, ignore, whole.notes)


def cut(array: NDArray[Any], box: ChipBox) -> NDArray[Any]:
    """`array` (..., H, W) in `box`, zeros beyond the edges; a view where the box lies inside."""
    height, width = array.shape[-2:]
    bottom, right = min(box.row + box.size, height), min(box.col + box.size, width)
    inside = array[..., box.row : bottom, box.col : right]
    if inside.shape[-2:] == (box.size, box.size):
        return inside
    padded = np.zeros((*array.shape[:-2], box.size, box.size), array.dtype)
    padded[..., : inside.shape[-2], : inside.shape[-1]] = inside
    return padded
