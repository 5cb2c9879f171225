"""Opening rasters safely, their grid, their bands and which of their pixels are valid."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import get_gdal_config, getenv, hasenv
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rtshpc.core.errors import RtshpcError, SceneRejected, guess
from rtshpc.core.scenes import VIRTUAL
from rtshpc.core.tiff import FileHead

Mask = NDArray[np.bool_]

MAX_PIXELS = 2_000_000_000
"""Rasters with more pixels are taken for size bombs unless the data config says otherwise."""
_MAX_BLOCK_BYTES = 1 << 30
_BOMB_BYTES = 1 << 26
_BOMB_RATIO = 20_000
FLOAT_LIMIT = 3.4028234e38
"""Nodata beyond is compared with tolerance, for writers round the limit of the type."""
_RGB = ["red", "green", "blue"]

_MAGIC = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip file", b"%PDF": "a PDF", b"\x89HDF": "an HDF5 file"}


_FAILURES = (
    *(RasterioError, CPLE_BaseError, shapely.errors.ShapelyError, OSError, RuntimeError),
    *(ValueError, TypeError, ArithmeticError, MemoryError),
)
"""What libraries raise on files that nobody foresaw; those of PROJ and pyogrio are RuntimeErrors."""


@contextmanager
def rejecting(name: str) -> Iterator[None]:
    """Turn whatever a library fails on while it reads `name` into a rejection: one file never stops the others.

    Raises:
        SceneRejected: `unreadable`, with what the library said.
    """
    try:
        yield
    except RtshpcError:
        raise
    except _FAILURES as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise SceneRejected("unreadable", f"{name}: {text[:300]}") from error


@dataclass(frozen=True)
class Grid:
    """Where pixels lie on the ground.

    Attributes:
        crs_wkt: coordinate reference system, WKT (never forced to an EPSG code).
        transform: (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f, of pixel corners.
        width: px.
        height: px.
        resolution_m: side of a square of a pixel's ground area, m.
    """

    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    width: int
    height: int
    resolution_m: float


@dataclass(frozen=True)
class Place:
    """Where an open raster lies.

    Attributes:
        path: the raster, or one of GDAL's virtual names.
        grid: its grid as stored, not yet turned north up.
    """

    path: str
    grid: Grid

    @cached_property
    def stated(self) -> tuple[Any, ...] | None:
        """`FileHead.stated_place` of the raster; None where it has none, or GDAL is told to look elsewhere."""
        told = any(get_gdal_config(option) for option in ("GDAL_GEOREF_SOURCES", "GDAL_PAM_PROXY_DIR"))
        return None if told or self.path.startswith(VIRTUAL) else FileHead.of(Path(self.path)).stated_place()


def reading(**options: Any) -> AbstractContextManager[Any]:
    """GDAL's settings while rasters are read: one thread, and files beside a raster are looked for by name.

    By default GDAL lists the whole folder at every opening, a third of the time that opening takes. Where the same
    settings are in force already, nothing is done: a task that reads many small scenes enters them once.
    """
    wanted = {"GDAL_NUM_THREADS": "1", "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE", **options}
    if hasenv() and wanted.items() <= getenv().items():
        return nullcontext()
    return rasterio.Env(**wanted)


def open_raster(path: Path | str, max_pixels: int = MAX_PIXELS) -> DatasetReader:
    """Open a raster after looking at its first bytes and at what it claims to hold. Reads no pixel.

    Raises:
        SceneRejected: `missing_file`, `empty_file`, `lfs_pointer`, `not_a_raster`, `missing_codec`,
            `unreadable`, `truncated`, `no_bands`, `size_bomb` or `complex`.
    """
    return _opened(str(path), _sniffed(path), max_pixels)


def open_beside(path: Path | str, place: Place, max_pixels: int = MAX_PIXELS) -> tuple[DatasetReader, Grid | None]:
    """Open a raster that perhaps lies where another does.

    One that states the same place has the other's grid, and neither CRS nor transform of its own: understanding them
    would take half the time of opening it.

    Returns:
        The raster, and its grid as stored where that is the other's.

    Raises:
        SceneRejected: as `open_raster`.
    """
    head = _sniffed(path)
    same = head is not None and place.stated is not None and head.stated_place() == place.stated
    options = {"GEOREF_SOURCES": "NONE"} if same else {}
    return _opened(str(path), head, max_pixels, **options), place.grid if same else None


def _sniffed(path: Path | str) -> FileHead | None:
    """The head of what may be a raster; a virtual one has none."""
    return None if str(path).startswith(VIRTUAL) else sniff(Path(path))


def _opened(name: str, head: FileHead | None, max_pixels: int, **options: str) -> DatasetReader:
    # rasterio.open makes an environment for each raster, for the keys of remote stores.
    opened = DatasetReader if hasenv() and head is not None else rasterio.open
    file = Path(name).name
    try:
        with warnings.catch_warnings():
            # A missing georeference is judged by georeference().
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = opened(name, **options)
    except (RasterioError, ValueError, MemoryError, OverflowError) as error:
        text = " ".join(str(error).split())
        reason = "missing_codec" if "codec" in text or "compress" in text.lower() else "unreadable"
        raise SceneRejected(reason, f"{file}: {text}") from None
    try:
        _guard(dataset, file, head, max_pixels)
    except SceneRejected:
        dataset.close()
        raise
    return dataset


def _head(path: Path) -> tuple[FileHead, bytes]:
    """The head of a file that is there, is not empty and is no stand-in for another, and its text in small letters."""
    try:
        # Opening a pipe waits for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SceneRejected("not_a_file", f"{path} is a folder, a pipe or a device, not a file")
        head = FileHead.of(path)
    except (OSError, ValueError) as error:
        raise SceneRejected("missing_file", f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not head.start:
        raise SceneRejected("empty_file", f"{path.name} has 0 bytes: a failed copy or download")
    if head.start.startswith(b"version https://git-lfs"):
        raise SceneRejected("lfs_pointer", f"{path.name} is a Git LFS pointer, not the data; run `git lfs pull`")
    start = head.start[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html")):
        page = head.start[:60].decode("latin-1").strip()
        raise SceneRejected("not_a_raster", f"{path.name} is a web page, perhaps a download's error page: {page!r}")
    return head, start


def sniff_text(path: Path) -> None:
    """Tell what a file that is no vector file really is.

    Raises:
        SceneRejected: `missing_file`, `empty_file`, `lfs_pointer` or `not_a_raster`.
    """
    _head(path)


def sniff(path: Path) -> FileHead:
    """The head of a file; tells what a file that is no raster really is.

    Raises:
        SceneRejected: `missing_file`, `empty_file`, `lfs_pointer` or `not_a_raster`.
    """
    head, start = _head(path)
    if start.startswith(b"<vrtdataset"):
        return head
    if start.startswith((b"<?xml", b"<", b"{", b"[")):
        raise SceneRejected("not_a_raster", f"{path.name} is text: {start[:60].decode('latin-1').strip()!r}")
    for magic, name in _MAGIC.items():
        if start.startswith(magic.lower()) and path.suffix.lower() in (".tif", ".tiff"):
            raise SceneRejected("not_a_raster", f"{path.name} is {name}")
    return head


def _guard(dataset: DatasetReader, name: str, head: FileHead | None, max_pixels: int) -> None:
    """Refuse what must not be allocated or cannot be true, from the header alone; a virtual file has no head."""
    if dataset.count == 0:
        raise SceneRejected("no_bands", f"{name} holds no bands ({len(dataset.subdatasets)} subdatasets)")
    types = set(dataset.dtypes)
    if any(dtype.startswith("complex") for dtype in types):
        raise SceneRejected("complex", f"{name} is {dataset.dtypes[0]}; a cast would drop the imaginary part")
    pixels = dataset.width * dataset.height
    claim = f"{name} claims {dataset.width} x {dataset.height} px"
    if pixels > max_pixels:
        raise SceneRejected("size_bomb", f"{claim}, more than max_pixels = {max_pixels}")
    item = max(map(_bytes, types))
    block_rows, block_cols = dataset.block_shapes[0]
    if block_rows * block_cols * item > _MAX_BLOCK_BYTES:
        raise SceneRejected("size_bomb", f"{claim} in blocks of {block_cols} x {block_rows} px")
    if dataset.driver != "GTiff" or head is None:
        return
    lost = head.cut_off()
    if lost:
        raise SceneRejected("truncated", f"{name}: {lost}")
    blocks = math.ceil(dataset.height / block_rows) * math.ceil(dataset.width / block_cols)
    # A TIFF lists an offset and a length for every block, sparse or not.
    if blocks > 65_536 and blocks * 4 > head.size:
        raise SceneRejected("size_bomb", f"{claim} in {blocks} blocks, but {head.size} bytes cannot even list them")
    claimed = pixels * item * dataset.count
    if claimed > _BOMB_BYTES and claimed > _BOMB_RATIO * head.size:
        raise SceneRejected("size_bomb", f"{claim}, {claimed / 2**30:.1f} GiB of pixels in {head.size} bytes")


def _bytes(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def read_error(path: Path | str, error: Exception) -> SceneRejected:
    """The rejection for pixels that cannot be decoded."""
    cause = error.__cause__ or error
    text = str(getattr(cause, "errmsg", cause))
    return SceneRejected("unreadable", f"{Path(path).name}: {' '.join(text.split())}")


def read_window(dataset: DatasetReader, indexes: Sequence[int], window: Window | None = None) -> NDArray[Any]:
    """Bands `indexes` (1-based) as stored, (C, h, w), in one call.

    Raises:
        SceneRejected: `unreadable`, when any block is damaged.
    """
    try:
        return dataset.read(list(indexes), window=window)
    except (RasterioError, ValueError, MemoryError) as error:
        raise read_error(dataset.name, error) from None


def windows(dataset: DatasetReader, rows: int = 1024, cols: int = 8192) -> Iterator[Window]:
    """Windows that cover the raster row by row, made of whole blocks and of bounded size."""
    block_rows, block_cols = dataset.block_shapes[0]
    step_rows = max(1, rows // block_rows) * block_rows
    step_cols = max(1, cols // block_cols) * block_cols
    for row in range(0, dataset.height, step_rows):
        for col in range(0, dataset.width, step_cols):
            yield Window(col, row, min(step_cols, dataset.width - col), min(step_rows, dataset.height - row))  # pyright: ignore[reportCallIssue]


def band_names(dataset: DatasetReader, given: Sequence[str] = ()) -> list[str]:
    """Name of each band: `given`, else the file's description, else its colour, else its number.

    Raises:
        SceneRejected: `missing_band`, when `given` has more names than the file has bands.
    """
    if len(given) > dataset.count:
        detail = f"{Path(dataset.name).name} has {dataset.count} bands, band_names lists {len(given)}"
        raise SceneRejected("missing_band", detail)
    names: list[str] = []
    for index, (description, colour) in enumerate(zip(dataset.descriptions, dataset.colorinterp, strict=True)):
        if index < len(given):
            names.append(given[index])
        elif description:
            names.append(description)
        elif colour in (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha):
            names.append(colour.name)
        else:
            names.append(str(index + 1))
    return names


def find_bands(dataset: DatasetReader, wanted: Sequence[str], given: Sequence[str] = ()) -> tuple[int, ...]:
    """1-based indexes of the bands called as in `wanted` (case does not matter), or of those numbers.

    Raises:
        SceneRejected: `missing_band`: there is none, there are two, or it is the alpha band.
    """
    names = [name.lower() for name in band_names(dataset, given)]
    colours = dataset.colorinterp
    return tuple(_find_band(dataset.name, band, names, colours) for band in wanted)


def _find_band(file: str, wanted: str, names: list[str], colours: Sequence[ColorInterp]) -> int:
    found = [index for index, name in enumerate(names, 1) if name == wanted.lower()]
    if not found and wanted.isdigit() and 1 <= int(wanted) <= len(names):
        found = [int(wanted)]
    if len(found) != 1:
        what = (
            f'has no band "{wanted}".{guess(wanted, names)}'
            if not found
            else f'has {len(found)} bands called "{wanted}"'
        )
        raise SceneRejected("missing_band", f"{Path(file).name} {what}")
    if colours[found[0] - 1] == ColorInterp.alpha:
        detail = f'{Path(file).name}: band "{wanted}" is an alpha band (validity), not a measurement'
        raise SceneRejected("missing_band", detail)
    return found[0]


def swapped_colours(dataset: DatasetReader, indexes: Sequence[int]) -> str:
    """What is wrong with taking the 1-based bands `indexes` by number: colours out of the order red, green, blue."""
    stored = [colour.name for colour in dataset.colorinterp]
    taken = [stored[index - 1] for index in indexes if stored[index - 1] in _RGB]
    if any(dataset.descriptions) or len(taken) < 2 or taken == [name for name in _RGB if name in taken]:
        return ""
    return f"{Path(dataset.name).name}: bands are stored as {', '.join(stored)}; taken by number, red is blue"


def scaling(dataset: DatasetReader, index: int) -> tuple[float, float]:
    """(scale, offset) of a band: physical = stored * scale + offset. Both default to (1, 0); a scale of 0 is none.

    Raises:
        SceneRejected: `bad_scale`, where one of them is no finite number.
    """
    scale, offset = float(dataset.scales[index - 1]), float(dataset.offsets[index - 1])
    if not math.isfinite(scale) or not math.isfinite(offset):
        detail = f"{Path(dataset.name).name}: band {index} has scale {scale:g}, offset {offset:g}"
        raise SceneRejected("bad_scale", detail)
    return scale or 1.0, offset


def has_mask(dataset: DatasetReader) -> bool:
    """Whether a mask or alpha band (not a nodata value) says which pixels are valid."""
    return any(MaskFlags.per_dataset in flags for flags in dataset.mask_flag_enums)


def invalid(band: NDArray[Any], nodata: float | None) -> Mask | None:
    """Where a band (H, W) as stored holds nothing: nodata, tested before scaling, or no finite number.

    Returns None where all is valid, the common case, so that callers need not hold or combine masks. A float
    nodata at the type's limit is compared with tolerance, for writers round it.
    """
    if band.dtype.kind == "f":
        bad = ~np.isfinite(band)
        if nodata is not None and math.isfinite(nodata):
            if abs(nodata) >= FLOAT_LIMIT:
                bad |= band >= FLOAT_LIMIT if nodata > 0 else band <= -FLOAT_LIMIT
            else:
                bad |= band == band.dtype.type(nodata)
        return bad if bad.any() else None
    if nodata is None or not math.isfinite(nodata) or nodata != int(nodata):
        return None
    limits = np.iinfo(band.dtype)
    if not limits.min <= nodata <= limits.max:
        return None
    bad = band == band.dtype.type(int(nodata))
    return bad if bad.any() else None
