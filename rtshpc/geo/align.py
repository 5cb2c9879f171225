"""Rasters on any grid, read on the primary grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from rtshpc.core.errors import SceneRejected
from rtshpc.geo.crs import Six
from rtshpc.geo.raster import Grid, Mask, has_mask, invalid, read_error, read_window

EXACT_PX = 0.01
"""Grids that differ by less are the same: writers round their transforms."""


def upright(grid: Grid) -> tuple[Grid, bool, bool]:
    """The grid with north up and east right, and whether rows and columns must be flipped to get there."""
    a, b, c, d, e, f = grid.transform
    if b or d:
        return grid, False, False
    rows, cols = e > 0, a < 0
    if rows:
        e, f = -e, f + e * grid.height
    if cols:
        a, c = -a, c + a * grid.width
    return Grid(grid.crs_wkt, (a, b, c, d, e, f), grid.width, grid.height, grid.resolution_m), rows, cols


def shift_px(one: Grid, other: Grid) -> float | None:
    """How far `other` lies from `one`, px (the larger of columns and rows); None where they differ in more."""
    if (one.width, one.height) != (other.width, other.height):
        return None
    a, b, c, d, e, f = one.transform
    g, h, i, j, k, m = other.transform
    size = math.hypot(a, d) + math.hypot(b, e)
    # Over the whole raster the pixel vectors may drift by less than a hundredth of a pixel.
    drift = max(abs(a - g) + abs(d - j), abs(b - h) + abs(e - k)) * max(one.width, one.height)
    if drift > EXACT_PX * size or not same_crs(one.crs_wkt, other.crs_wkt):
        return None
    determinant = a * e - b * d
    x, y = i - c, m - f
    return max(abs(e * x - b * y), abs(a * y - d * x)) / abs(determinant)


def same_crs(one: str, other: str) -> bool:
    """Whether two WKTs mean the same CRS."""
    if one == other:
        return True
    from rasterio.crs import CRS

    return bool(CRS.from_wkt(one) == CRS.from_wkt(other))


class Layer:
    """One raster file read on the primary grid: directly, flipped, snapped or warped.

    Attributes:
        shift: px between the file's grid and the primary one where they only differ by a shift, else None.
        warped: whether pixels are resampled.
    """

    def __init__(
        self,
        dataset: DatasetReader,
        grid: Grid,
        stack: ExitStack,
        resampling: str = "nearest",
        snap_px: float = EXACT_PX,
    ) -> None:
        """Bind `dataset` to `grid` (north up); a warping view is closed by `stack`.

        Raises:
            SceneRejected: `no_crs`, or `cannot_align` when no transformation between the two is known.
        """
        self._source = dataset
        self.path = Path(dataset.name)
        if not dataset.crs:
            raise SceneRejected("no_crs", f"{self.path.name} has no CRS and cannot be aligned")
        six: Six = tuple(dataset.transform)[:6]  # pyright: ignore[reportAssignmentType]
        # Only the place matters here; what a pixel measures was settled by the primary grid.
        stored = Grid(dataset.crs.to_wkt(), six, dataset.width, dataset.height, grid.resolution_m)
        turned, self._rows, self._cols = upright(stored)
        self.shift = shift_px(grid, turned)
        self.warped = self.shift is None or self.shift > max(snap_px, EXACT_PX)
        self._view: Any = dataset
        if self.warped:
            self._rows = self._cols = False
            self._view = stack.enter_context(self._warp(dataset, grid, resampling))
        self._masked = has_mask(self._view)
        self.height, self.width = grid.height, grid.width
        self.itemsize = max(np.dtype(dtype).itemsize for dtype in dataset.dtypes)

    def _warp(self, dataset: DatasetReader, grid: Grid, resampling: str) -> WarpedVRT:
        nodata: float | None = dataset.nodata
        if nodata is None and dataset.dtypes[0].startswith("float"):
            nodata = math.nan
        alpha = nodata is None and ColorInterp.alpha not in dataset.colorinterp
        options: dict[str, Any] = {"add_alpha": True} if alpha else {"nodata": nodata, "src_nodata": nodata}
        if ColorInterp.alpha in dataset.colorinterp:
            options = {}
        try:
            return WarpedVRT(
                dataset,
                crs=grid.crs_wkt,
                transform=Affine(*grid.transform),
                width=grid.width,
                height=grid.height,
                resampling=Resampling[resampling],
                **options,
            )
        except (RasterioError, ValueError) as error:
            raise SceneRejected(
                "cannot_align", f"{self.path.name} cannot be warped to the primary grid: {error}"
            ) from None

    def read(
        self, indexes: Sequence[int], row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[Any], list[Mask | None]]:
        """Bands (C, height, width) as stored, and per band where it is invalid (None = nowhere).

        Raises:
            SceneRejected: `unreadable`.
        """
        top = self.height - row - height if self._rows else row
        left = self.width - col - width if self._cols else col
        whole = (height, width) == (self.height, self.width)
        window = None if whole else Window(left, top, width, height)  # pyright: ignore[reportCallIssue]
        pixels = read_window(self._view, indexes, window)
        outside: Mask | None = None
        if self._masked:
            try:
                outside = self._view.read_masks(1, window=window) == 0
            except (RasterioError, ValueError) as error:
                raise read_error(self.path, error) from None
            outside = outside if outside.any() else None
        pixels, outside = self._turn(pixels), None if outside is None else self._turn(outside)
        bad = [invalid(band, self._view.nodatavals[index - 1]) for band, index in zip(pixels, indexes, strict=True)]
        if outside is not None:
            bad = [outside if mask is None else mask | outside for mask in bad]
        return pixels, bad

    def _turn(self, array: NDArray[Any]) -> NDArray[Any]:
        if self._rows:
            array = array[..., ::-1, :]
        if self._cols:
            array = array[..., ::-1]
        return np.ascontiguousarray(array) if self._rows or self._cols else array
