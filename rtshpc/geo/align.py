"""Rasters on any grid, read on the primary grid, and the modalities that their bands make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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

from rtshpc.core.config import DataConfig, ModalityConfig
from rtshpc.core.config.modality import Expression
from rtshpc.core.errors import SceneRejected
from rtshpc.geo.crs import Six
from rtshpc.geo.raster import (
    Grid,
    Mask,
    find_bands,
    has_mask,
    invalid,
    read_error,
    read_window,
    scaling,
    swapped_colours,
)

EXACT_PX = 0.01
"""Grids that differ by less are the same: writers round their transforms."""


FUNCTIONS: Mapping[str, Any] = {
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "log": np.log,
    "exp": np.exp,
}


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
        undeclared: whether neither a nodata value nor a mask says which pixels are missing.
    """

    def __init__(
        self,
        dataset: DatasetReader,
        grid: Grid,
        stack: ExitStack,
        resampling: str = "nearest",
        snap_px: float = EXACT_PX,
        crs_wkt: str = "",
        zero_is_valid: bool = False,
        stored: Grid | None = None,
    ) -> None:
        """Bind `dataset` to `grid` (north up); a warping view is closed by `stack`.

        Args:
            dataset: the file.
            grid: the primary grid.
            stack: closes the view.
            resampling: kernel where pixels are warped.
            snap_px: grids shifted by up to this are taken as the same.
            crs_wkt: CRS of a file that states none.
            zero_is_valid: a nodata value of 0 is a value like any other, the background of labels.
            stored: where the file lies, if that is known without asking it.

        Raises:
            SceneRejected: `no_crs`, or `cannot_align` when no transformation between the two is known.
        """
        self._source = dataset
        self.path = Path(dataset.name)
        if stored is None:
            crs_wkt = dataset.crs.wkt if dataset.crs else crs_wkt
            if not crs_wkt:
                raise SceneRejected("no_crs", f"{self.path.name} has no CRS and cannot be aligned")
            six: Six = tuple(dataset.transform)[:6]  # pyright: ignore[reportAssignmentType]
            # Only the place matters here; what a pixel measures was settled by the primary grid.
            stored = Grid(crs_wkt, six, dataset.width, dataset.height, grid.resolution_m)
        turned, self._rows, self._cols = upright(stored)
        self.shift = shift_px(grid, turned)
        self.warped = self.shift is None or self.shift > max(snap_px, EXACT_PX)
        self._nodata = [None if zero_is_valid and value == 0 else value for value in dataset.nodatavals]
        self._view: Any = dataset
        if self.warped:
            self._rows = self._cols = False
            self._view = stack.enter_context(self._warp(dataset, grid, resampling, stored.crs_wkt))
            self._nodata = list(self._view.nodatavals)
        masked = has_mask(dataset)
        self._masked = has_mask(self._view) if self.warped else masked
        self.undeclared = dataset.nodata is None and not masked
        self.height, self.width = grid.height, grid.width
        self.itemsize = max(np.dtype(dtype).itemsize for dtype in dataset.dtypes)

    def _warp(self, dataset: DatasetReader, grid: Grid, resampling: str, crs_wkt: str) -> WarpedVRT:
        nodata: float | None = self._nodata[0]
        if nodata is None and dataset.dtypes[0].startswith("float"):
            nodata = math.nan
        alpha = nodata is None and ColorInterp.alpha not in dataset.colorinterp
        options: dict[str, Any] = {"nodata": nodata, "src_nodata": nodata} | ({"add_alpha": True} if alpha else {})
        if ColorInterp.alpha in dataset.colorinterp:
            options = {}
        try:
            return WarpedVRT(
                dataset,
                src_crs=crs_wkt,
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
        bad = [invalid(band, self._nodata[index - 1]) for band, index in zip(pixels, indexes, strict=True)]
        if outside is not None:
            bad = [outside if mask is None else mask | outside for mask in bad]
        return pixels, bad

    def decoded_bytes(self, height: int, width: int) -> int | None:
        """Bytes of the file's blocks under a rectangle, wherever it lies; None where they are not those of this file."""
        if self.warped or self._source.driver != "GTiff":
            return None
        rows, cols = self._source.block_shapes[0]
        down, across = -(-height // rows) + 1, min(-(-width // cols) + 1, -(-self.width // cols))
        return down * rows * across * cols * self.itemsize * (self._source.count + 1)  # one more for a mask

    def _turn(self, array: NDArray[Any]) -> NDArray[Any]:
        if self._rows:
            array = array[..., ::-1, :]
        if self._cols:
            array = array[..., ::-1]
        return np.ascontiguousarray(array) if self._rows or self._cols else array


@dataclass(frozen=True)
class Bound:
    """A modality bound to bands of a layer; `layer` None = the scene lacks it."""

    name: str
    config: ModalityConfig
    layer: Layer | None
    indexes: tuple[int, ...]
    scales: tuple[tuple[float, float], ...]
    expression: Expression | None

    @property
    def physical(self) -> bool:
        """Whether pixels are turned into float32 physical values when read."""
        return self.expression is not None or len(set(self.scales)) > 1


def absent(config: ModalityConfig, height: int, width: int) -> tuple[NDArray[Any], Mask]:
    """Pixels and validity of a modality that is not there."""
    return np.zeros((config.channels, height, width), np.uint8), np.zeros((height, width), np.bool_)


def valid_in(bad: list[Mask | None], everywhere: Mask) -> Mask:
    """Where none of the bands is invalid; `everywhere` itself where all are valid."""
    masks = [mask for mask in bad if mask is not None]
    if not masks:
        return everywhere
    joined = masks[0] if len(masks) == 1 else np.logical_or.reduce(masks)
    return ~joined


def values_of(bound: Bound, pixels: NDArray[Any], at: list[int], valid: Mask) -> tuple[NDArray[Any], Mask]:
    """A modality's pixels (C, H, W): a view of the stored bands where they lie in order, else a copy."""
    if bound.physical:
        with np.errstate(all="ignore"):
            bands = [
                pixels[index].astype(np.float32) * np.float32(scale) + np.float32(offset)
                for index, (scale, offset) in zip(at, bound.scales, strict=True)
            ]
            if bound.expression is None:
                values = np.stack(bands)
            else:
                named = dict(zip(bound.expression.names, bands, strict=True))
                values = np.asarray(bound.expression.evaluate(named, FUNCTIONS), np.float32)[None]
        finite = np.isfinite(values).all(axis=0)
        valid = valid if finite.all() else valid & finite
        scale, offset = 1.0, 0.0
    else:
        values = pixels[at[0] : at[-1] + 1] if at == list(range(at[0], at[0] + len(at))) else pixels[at]
        scale, offset = bound.scales[0]
    if bound.config.limits is not None:
        low, high = sorted((limit - offset) / scale for limit in bound.config.limits)
        # 0.3 / 1e-4 is a little less than 3000, which is meant.
        low, high = low - 1e-9 * abs(low), high + 1e-9 * abs(high)
        valid = valid & ((values >= low) & (values <= high)).all(axis=0)
    return values, valid


def bind(name: str, modality: ModalityConfig, data: DataConfig, dataset: Any, layer: Layer) -> Bound:
    """Find a modality's bands in the raster of a layer.

    Raises:
        SceneRejected: `missing_band` or `bad_scale`.
    """
    given = () if modality.file else data.band_names
    expression = Expression(modality.expression, f"modalities.{name}.expression") if modality.expression else None
    names = expression.names if expression else modality.bands
    indexes = find_bands(dataset, names, given)
    return Bound(name, modality, layer, indexes, tuple(scaling(dataset, index) for index in indexes), expression)


def odd_bands(dataset: Any, layer: Layer, bound: Bound) -> list[str]:
    """What is odd about the bands of a modality.

    Raises:
        SceneRejected: `band_order`: colours taken by number are not those that the numbers suggest.
    """
    found: list[str] = []
    numbers = bound.expression is None and all(band.isdigit() for band in bound.config.bands)
    order = swapped_colours(dataset, bound.indexes) if numbers else ""
    if order and ColorInterp.alpha in dataset.colorinterp:
        raise SceneRejected("band_order", order)
    if order:
        found.append(f"band_order: {order}")
    if any(dataset.scales[index - 1] == 0 for index in bound.indexes):
        found.append(f"odd_scale: {layer.path.name}: {bound.name} has scale 0, read as none")
    return found
