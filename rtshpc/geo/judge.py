"""Verdicts on rasters and on image + label pairs, without running anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.records import crc32
from rtshpc.core.scenes import Scene
from rtshpc.geo.crs import Finding, contradictions, fragment, georeference, is_inverted
from rtshpc.geo.raster import (
    FLOAT_LIMIT,
    MAX_PIXELS,
    band_names,
    has_mask,
    invalid,
    open_raster,
    read_error,
    read_window,
    reading,
    rejecting,
    scaling,
    swapped_colours,
    windows,
)
from rtshpc.geo.scene import open_scene
from rtshpc.geo.vector import VECTOR_SUFFIXES

READ_VALUES = 400_000_000
"""Rasters with more values (pixels x bands) are read in part: every n-th window and the last one."""
ALMOST_EMPTY, SPARSE = 0.01, 0.1
_ZERO_SHARE, _ZERO_FATAL = 0.05, 0.99
_LONGEST_TABLE = 1000
_FILL_SHARE, _NEVER_MEASURED = 0.05, 1e30
_FILLS = (-9999.0, -99999.0, -32768.0, -32767.0, 65535.0)
"""Values that one band alone may hold where nothing was measured."""
_RGB = ["red", "green", "blue"]


@dataclass(frozen=True)
class Verdict:
    """What a careful reader says: `accept`, `warn` (usable, but look) or `reject`."""

    path: str
    verdict: Literal["accept", "warn", "reject"]
    reasons: list[str]


@dataclass
class Content:
    """What a pass over the pixels saw; (C,) arrays are per band, of valid pixels.

    `shared` counts pixels at which all bands hold one value, for the extremes among those values.
    """

    low: Any
    high: Any
    valid: int = 0
    zero: int = 0
    seen: int = 0
    undeclared_nan: bool = False
    shared: Counter[float] = field(default_factory=Counter[float])
    complete: bool = True
    checksums: list[int] = field(default_factory=list[int])


def verdict(path: Path | str, findings: Sequence[Finding]) -> Verdict:
    """The worst finding decides; reasons are `word: detail`, fatal ones first."""
    ordered = sorted(findings, key=lambda finding: finding.severity)
    reasons = list(dict.fromkeys(f"{finding.reason}: {finding.detail}" for finding in ordered))
    worst = "reject" if any(one.severity == "reject" for one in findings) else "warn" if findings else "accept"
    return Verdict(str(path), worst, reasons)


def judge_raster(path: Path | str, max_pixels: int = MAX_PIXELS) -> Verdict:
    """Judge one raster as a training or mapping scene. Every block is read, up to READ_VALUES."""
    return verdict(path, raster_findings(path, max_pixels))


def raster_findings(path: Path | str, max_pixels: int = MAX_PIXELS, sample: bool = False) -> list[Finding]:
    """All that is odd about one raster.

    Args:
        path: the file.
        max_pixels: larger rasters are taken for size bombs.
        sample: the raster is the image of a labelled sample, from which all modalities are wanted.
    """
    path = Path(path)
    with reading():
        try:
            with rejecting(path.name), open_raster(path, max_pixels) as dataset:
                found = [*_place(dataset, path), *_bands(dataset, path, sample)]
                content = read_content(dataset)
                return [*found, *_content(dataset, path, content)]
        except SceneRejected as error:
            return [Finding("reject", error.reason, error.detail)]


def pixels_key(path: Path | str, max_pixels: int = MAX_PIXELS) -> tuple[Any, ...] | None:
    """What rasters of the same pixels in the same place share, however they are compressed; None for no raster."""
    path = Path(path)
    try:
        with reading(), rejecting(path.name), open_raster(path, max_pixels) as dataset:
            place = (str(dataset.crs), tuple(dataset.transform), dataset.shape, dataset.dtypes)
            return *place, *read_content(dataset).checksums
    except SceneRejected:
        return None


def read_content(dataset: DatasetReader) -> Content:
    """Decode the raster block-wise in bounded memory.

    Raises:
        SceneRejected: `unreadable`, when any block that is read is damaged.
    """
    count = dataset.count
    content = Content(np.full(count, np.inf), np.full(count, -np.inf), checksums=[0] * count)
    parts = list(windows(dataset))
    step = max(1, math.ceil(dataset.width * dataset.height * count / READ_VALUES))
    content.complete = step == 1
    chosen = parts[::step] if step == 1 or len(parts) % step == 1 else [*parts[::step], parts[-1]]
    masked = has_mask(dataset)
    for window in chosen:
        pixels = read_window(dataset, range(1, count + 1), window)
        outside = None
        if masked:
            try:
                outside = dataset.dataset_mask(window=window) == 0
            except (RasterioError, ValueError) as error:
                raise read_error(dataset.name, error) from None
        _tally(dataset, content, pixels, outside)
    return content


def _tally(dataset: DatasetReader, content: Content, pixels: Any, outside: Any) -> None:
    good_all = np.ones(pixels.shape[1:], np.bool_) if outside is None else ~outside
    colours = dataset.colorinterp
    for index, band in enumerate(pixels):
        content.checksums[index] = crc32(np.ascontiguousarray(band), content.checksums[index])
        nodata = dataset.nodatavals[index]
        bad = invalid(band, nodata)
        if bad is not None and band.dtype.kind == "f":
            declared = np.isnan(band) if nodata is not None and math.isnan(nodata) else band == nodata
            content.undeclared_nan |= bool((~np.isfinite(band) & ~declared).any())
        if colours[index] == ColorInterp.alpha and len(pixels) > 1:
            continue
        good = good_all if bad is None else ~bad & (True if outside is None else ~outside)
        if good.any():
            values = band if good.all() else band[good]
            content.low[index] = min(content.low[index], float(values.min()))
            content.high[index] = max(content.high[index], float(values.max()))
        if bad is not None:
            good_all = good_all & ~bad
    measured = [band for band, colour in zip(pixels, colours, strict=True) if colour != ColorInterp.alpha]
    same = good_all & np.logical_and.reduce([band == measured[0] for band in measured]) if measured else good_all
    values = measured[0][same] if measured else np.zeros(0)
    for value in {float(values.min()), float(values.max())} if values.size else ():
        content.shared[value] += int(np.count_nonzero(values == value))
    content.seen += good_all.size
    content.valid += int(good_all.sum())
    content.zero += int((~pixels.any(axis=0) & good_all).sum())


def _place(dataset: DatasetReader, path: Path) -> list[Finding]:
    """Georeference, and the two cases in which a bare array is told rather than refused."""
    _, found = georeference(dataset)
    if found and found[0].reason == "no_georeference":
        bare = found[0].detail
        if dataset.subdatasets:
            found = [Finding("warn", "no_georeference", f"{bare}; as a container it is judged image by image")]
        elif min(dataset.shape) == 1 and 1 < max(dataset.shape) <= _LONGEST_TABLE:
            found = [Finding("warn", "no_georeference", f"{bare}: a bare table of values, no scene")]
    found += contradictions(dataset, path)
    if dataset.rpcs is not None and dataset.crs:
        found.append(Finding("warn", "rpc", f"{path.name} also has raw sensor geometry (RPC); its grid is used"))
    return found


def _bands(dataset: DatasetReader, path: Path, sample: bool) -> list[Finding]:
    """What the header says of the bands."""
    found: list[Finding] = []
    colours = list(dataset.colorinterp)
    name = path.name
    if dataset.subdatasets:
        detail = f"{name} holds {len(dataset.subdatasets)} images; only the first is read"
        found.append(Finding("warn", "several_images", detail))
    if ColorInterp.alpha in colours:
        detail = f"{name}: band {colours.index(ColorInterp.alpha) + 1} is alpha: a validity mask, not a measurement"
        found.append(Finding("warn", "alpha_band", detail))
    # GDAL sees a table of two colours in every raster of one bit.
    one_bit = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS") == "1"
    if ColorInterp.palette in colours and not one_bit:
        found.append(Finding("warn", "palette", f"{name}: pixel values are colour numbers, not measurements"))
    order = swapped_colours(dataset, range(1, dataset.count + 1))
    if order:
        found.append(Finding("reject" if ColorInterp.alpha in colours else "warn", "band_order", order))
    if dataset.dtypes[0] in ("int8", "int64", "uint64"):
        detail = f"{name} is {dataset.dtypes[0]}; many readers map it to another type"
        found.append(Finding("warn", "pixel_type", detail))
    if is_inverted(dataset):
        found.append(Finding("warn", "min_is_white", f"{name} is stored inverted (MinIsWhite)"))
    found += fragment(dataset)
    for index in range(1, dataset.count + 1):
        scale, offset = scaling(dataset, index)
        if not _round(scale) or dataset.scales[index - 1] == 0:
            none = "0, read as none" if dataset.scales[index - 1] == 0 else f"{scale:.10g}"
            found.append(Finding("warn", "odd_scale", f"{name}: band {index} has scale {none}, offset {offset:.10g}"))
            break
    found += _nodata(dataset, name)
    named = [
        colour.name if not text else text.lower() for text, colour in zip(dataset.descriptions, colours, strict=True)
    ]
    measured = [one for one, colour in zip(named, colours, strict=True) if colour != ColorInterp.alpha]
    if sorted(measured) == sorted(_RGB) and (sample or all(dataset.descriptions)):
        found.append(Finding("warn", "only_rgb", f"{name} has no band beyond red, green, blue: for RGB-only runs"))
    return found


def _round(scale: float) -> bool:
    """Whether a scale has at most four significant digits, as scales that people choose have."""
    return math.isfinite(scale) and scale != 0 and abs(float(f"{scale:.3e}") - scale) <= 1e-9 * abs(scale)


def _nodata(dataset: DatasetReader, name: str) -> list[Finding]:
    nodata, dtype = dataset.nodata, np.dtype(dataset.dtypes[0])
    if nodata is None or (math.isnan(nodata) and dtype.kind == "f"):
        return []
    if dtype.kind == "f":
        # Other readers compare for equality, which rounding and arithmetic break.
        odd = abs(nodata) >= FLOAT_LIMIT
        return [Finding("warn", "odd_nodata", f"{name}: nodata is {nodata:g}, the limit of numbers")] if odd else []
    limits = np.iinfo(dtype)
    if math.isfinite(nodata) and limits.min <= nodata <= limits.max and nodata == int(nodata):
        return []
    return [Finding("warn", "nodata_unreachable", f"{name}: nodata {nodata:g} cannot occur in {dtype}")]


def _content(dataset: DatasetReader, path: Path, content: Content) -> list[Finding]:
    """What the pixels themselves say."""
    name = path.name
    share = content.valid / max(content.seen, 1)
    if content.valid == 0:
        return [Finding("reject", "all_nodata", f"{name}: no pixel is valid")]
    found: list[Finding] = []
    if not content.complete:
        found.append(Finding("warn", "read_in_part", f"{name} is large: {content.seen} pixels were read"))
    if share < ALMOST_EMPTY:
        found.append(Finding("reject", "almost_empty", f"{name}: {share:.2%} of the pixels are valid"))
    elif share < SPARSE:
        found.append(Finding("warn", "sparse", f"{name}: {share:.1%} of the pixels are valid"))
    found += _zeros(dataset, name, content)
    if content.undeclared_nan:
        found.append(Finding("warn", "undeclared_nan", f"{name} has NaN or infinity not declared as nodata; masked"))
    measured = [i for i, colour in enumerate(dataset.colorinterp) if colour != ColorInterp.alpha or dataset.count == 1]
    constant = all(content.low[i] == content.high[i] for i in measured)
    if constant and content.valid > 1 and content.zero < content.valid:
        found.append(Finding("warn", "constant", f"{name}: every band holds one value"))
    found += _fills(name, content, measured) if not constant else []
    repeats = [i + 1 for i in measured if content.checksums.index(content.checksums[i]) < i]
    if repeats and not constant:
        found.append(Finding("warn", "repeated_bands", f"{name}: bands {', '.join(map(str, repeats))} repeat others"))
    return [*found, *_range(dataset, name, content, measured)]


def _fills(name: str, content: Content, measured: list[int]) -> list[Finding]:
    """Values that stand for missing though nobody says so: they would enter the statistics."""
    low, high = content.low[measured], content.high[measured]
    if (low < -_NEVER_MEASURED).any() or (high > _NEVER_MEASURED).any():
        detail = f"{name} holds values from {low.min():g} to {high.max():g}"
        return [Finding("warn", "undeclared_fill", f"{detail}: nothing measured is so large")]
    for value, count in content.shared.items():
        extreme = value != 0 and ((low == value).all() or (high == value).all())
        if extreme and count >= _FILL_SHARE * content.seen and (len(measured) > 1 or value in _FILLS):
            detail = f"{name}: {count / content.seen:.1%} of the pixels are {value:g} in all bands"
            return [Finding("warn", "undeclared_fill", f"{detail}; if it means missing, declare it as nodata")]
    return []


def _zeros(dataset: DatasetReader, name: str, content: Content) -> list[Finding]:
    """Zero in all bands without declared nodata mostly means missing, in Sentinel-2 always."""
    if dataset.nodata is not None or has_mask(dataset):
        return []
    share = content.zero / content.seen
    if share == 1:
        return [Finding("reject", "all_nodata", f"{name} holds nothing but zeros")]
    if dataset.count < 3 or share < _ZERO_SHARE:
        return []
    detail = f"{name}: {share:.1%} of the pixels are 0 in all {dataset.count} bands, and no nodata is declared"
    return [Finding("reject" if share >= _ZERO_FATAL else "warn", "undeclared_missing", detail)]


def _range(dataset: DatasetReader, name: str, content: Content, measured: list[int]) -> list[Finding]:
    """Values that cannot be what the band's name says."""
    found: list[Finding] = []
    names = [one.lower() for one in band_names(dataset)]
    spectral = {"ndvi", "nir", "ndwi", "swir"} & set(names)
    if dataset.dtypes[0] == "uint8":
        stretched = all(content.low[i] <= 1 and content.high[i] == 255 for i in measured) and len(measured) > 2
        if spectral & {"ndvi", "ndwi"} or (spectral and stretched):
            detail = f"{name}: 8-bit bands {', '.join(names)} are a picture, not reflectance or an index"
            found.append(Finding("warn", "stretched", detail))
        return found
    for i in measured:
        if names[i] in ("ndvi", "ndwi") and math.isfinite(content.low[i]):
            scale, offset = scaling(dataset, i + 1)
            ends = content.low[i] * scale + offset, content.high[i] * scale + offset
            if min(ends) < -1.5 or max(ends) > 1.5:
                detail = f"{name}: {names[i]} runs from {min(ends):g} to {max(ends):g}; its scale is not declared"
                found.append(Finding("warn", "range", detail))
    return found


def judge_pair(image: Path | str, label: Path | str | None, kind: str = "", max_pixels: int = MAX_PIXELS) -> Verdict:
    """Judge an image with its label raster or polygons (None = there is none) as a training sample."""
    return verdict(
        image, [*raster_findings(image, max_pixels, sample=True), *label_findings(image, label, kind, max_pixels)]
    )


def label_findings(
    image: Path | str, label: Path | str | None, kind: str = "", max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """What is odd about the labels of an image; nothing where the image itself cannot be used.

    Args:
        image: the image.
        label: mask, id raster or polygons.
        kind: `mask`, `instances` or `vector`; empty = by the file's suffix.
        max_pixels: larger rasters are taken for size bombs.
    """
    image = Path(image)
    if label is None:
        return [Finding("warn", "missing_label", f"{image.name} has no labels: for mapping only")]
    label = Path(label)
    kind = kind or ("vector" if label.suffix.lower() in VECTOR_SUFFIXES else "mask")
    try:
        with rejecting(image.name), open_raster(image, max_pixels) as dataset:
            bands = [i for i, c in enumerate(dataset.colorinterp, 1) if c != ColorInterp.alpha] or [1]
    except SceneRejected:
        return []
    data = DataConfig.model_validate(
        {
            "name": "pair",
            "scenes": {"glob": image.name},
            "modalities": {"all": {"bands": [str(index) for index in bands]}},
            "primary": "all",
            "labels": {"kind": kind},
            "max_pixels": max_pixels,
            "min_valid_fraction": 0,
        }
    )
    return scene_findings(Scene(id=image.stem, image=str(image), label=str(label)), data)


def scene_findings(scene: Scene, data: DataConfig) -> list[Finding]:
    """What opening a scene and its labels says: warnings, or why it is rejected."""
    try:
        with rejecting(scene.id), open_scene(scene, data) as opened:
            opened.instances()
            return [Finding.note(text) for text in opened.warnings]
    except SceneRejected as error:
        return [Finding("reject", error.reason, error.detail)]
