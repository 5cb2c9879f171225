"""A scene on its primary grid: modalities, validity and instances, chip by chip."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.io import DatasetReader

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.scenes import Scene
from rtshpc.geo.align import Bound, Layer, absent, bind, odd_bands, upright, valid_in, values_of
from rtshpc.geo.chips import ChipBox
from rtshpc.geo.crs import trusted_grid
from rtshpc.geo.instances import InstanceMap, cut
from rtshpc.geo.labels import LabelReader
from rtshpc.geo.raster import Grid, Mask, Place, open_beside, open_raster, reading

WHOLE_BYTES = 256 << 20
"""Scenes up to this size are decoded once and cut in memory; larger ones are read chip by chip."""
_FEWEST_BLOCK = 1024
_FIRST_ROWS = 16
_COVERED = 0.9
"""A modality that is valid on less of the primary's ground is told."""
_ZEROS = 0.05
"""A share of undeclared zeros that is told."""
_FEWEST_BANDS = 3
"""Zero in so many bands at once is no measurement."""


@dataclass(frozen=True)
class ChipPixels:
    """Pixels of one rectangle.

    Attributes:
        pixels: modality -> (C, H, W) as stored (expressions: float32, physical units); 0 beyond the scene.
        valid: modality -> bool (H, W); modalities made of the same bands may share one array.
    """

    pixels: dict[str, NDArray[Any]]
    valid: dict[str, Mask]

    def chip(self, box: ChipBox) -> ChipPixels:
        """What lies in `box`, px of this rectangle; 0 and invalid beyond its lower and right edge."""
        masks: dict[int, Mask] = {}
        for mask in self.valid.values():
            if id(mask) not in masks:
                masks[id(mask)] = cut(mask, box)
        pixels = {name: cut(values, box) for name, values in self.pixels.items()}
        return ChipPixels(pixels, {name: masks[id(mask)] for name, mask in self.valid.items()})


@dataclass
class OpenScene:
    """What `open_scene` gives.

    Attributes:
        scene: the scene.
        grid: the primary grid, north up.
        warnings: what was odd but usable; labels add theirs when they are read.
        scaling: modality -> (scale, offset): physical = pixel * scale + offset.
        missing: modalities that are not required and that this scene lacks.
    """

    scene: Scene
    grid: Grid
    warnings: list[str]
    scaling: dict[str, tuple[float, float]]
    missing: frozenset[str]
    _data: DataConfig
    _bound: list[Bound]
    _image: Layer | None
    _labels: LabelReader | None
    _wanted: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    _whole: ChipPixels | None = None
    _instances: InstanceMap | None = None
    _zeros: int = 0

    def read(self, chip: ChipBox) -> ChipPixels:
        """Pixels and validity of a chip; what lies beyond the scene is 0 and invalid.

        Arrays may be views of the whole scene: copy before writing in them.

        Raises:
            SceneRejected: `unreadable`.
        """
        if self._whole is not None:
            return self._whole.chip(chip)
        height = min(chip.size, self.grid.height - chip.row)
        width = min(chip.size, self.grid.width - chip.col)
        part = self.part(chip.row, chip.col, height, width)
        return part if height == width == chip.size else part.chip(ChipBox(0, 0, chip.size))

    def instances(self) -> InstanceMap:
        """The whole scene's instances on the primary grid; read once.

        Raises:
            SceneRejected: the labels cannot be read or aligned, lie elsewhere, or lie on missing pixels.
        """
        if self._instances is None:
            if self._labels is None:
                shape = (self.grid.height, self.grid.width)
                self._instances = InstanceMap(np.zeros(shape, np.int32), [], np.zeros(shape, np.bool_))
            else:
                self._instances = self._labels.read()
                self.warnings += [note for note in self._instances.notes if note not in self.warnings]
                self._check_labels_seen(self._instances)
        return self._instances

    def decoded_bytes(self, height: int, width: int) -> int | None:
        """What GDAL's cache must hold to decode no block twice while a rectangle moves down; None where nobody knows."""
        layers = {id(bound.layer): bound.layer for bound in self._bound if bound.layer is not None}
        parts = [layer.decoded_bytes(height, width) for layer in layers.values()]
        return None if None in parts else sum(part for part in parts if part is not None)

    def valid_fraction(self) -> float:
        """Share of the scene where the primary modality is valid (exact for scenes held whole)."""
        if self._whole is not None:
            return float(self._whole.valid[self._data.primary].mean())
        pixels = self.grid.height * self.grid.width
        return sum(int(part.valid[self._data.primary].sum()) for _, part in self._blocks()) / pixels

    def _prepare(self, whole_bytes: int) -> None:
        """Decode small scenes at once; refuse scenes without enough valid ground or without a modality."""
        for bound in self._bound:
            if bound.layer is not None:
                wanted = self._wanted.setdefault(id(bound.layer), [])
                wanted += [index for index in bound.indexes if index not in wanted]
        for wanted in self._wanted.values():
            wanted.sort()
        items = {id(one.layer): one.layer.itemsize for one in self._bound if one.layer is not None}
        item_bytes = sum(len(wanted) * items[layer] for layer, wanted in self._wanted.items())
        if self.grid.height * self.grid.width * item_bytes <= whole_bytes:
            self._whole = self.part(0, 0, self.grid.height, self.grid.width)
        seen, valid = self._survey()
        name, primary = Path(self.scene.image).name, self._data.primary
        if self._zeros >= _ZEROS * seen:
            self.warnings.append(
                f"undeclared_missing: {name}: {self._zeros / seen:.1%} is 0 in all bands that are read"
            )
        if valid[primary] == 0:
            raise SceneRejected("all_nodata", f"{name}: no pixel of {primary} is valid, or all are an undeclared 0")
        share = valid[primary] / (self.grid.height * self.grid.width)
        if share < self._data.min_valid_fraction:
            raise SceneRejected("almost_empty", f"{name}: {share:.2%} of {primary} is valid")
        for at, bound in enumerate(self._bound):
            covered = valid[bound.name] / valid[primary]
            if bound.layer is None or covered >= _COVERED:
                continue
            if covered == 0:
                self._leave_out(at, f"{bound.name} has no valid pixel where {primary} has")
            else:
                detail = f"{bound.name} is valid on {covered:.0%} of the ground of {primary}"
                self.warnings.append(f"sparse_modality: {self.scene.id}: {detail}")

    def _survey(self) -> tuple[int, dict[str, int]]:
        """Pixels looked at, and in how many each modality and the primary one are valid.

        A large scene is read in scattered blocks, no more of them than it takes to know that it can be used.
        """
        pixels = self.grid.height * self.grid.width
        first = next(bound for bound in self._bound if bound.name == self._data.primary)
        declared = first.layer is None or not first.layer.undeclared or self._data.missing_value is not None
        seen, valid, something = 0, dict.fromkeys(self._data.modalities, 0), declared or first.physical
        parts = [self._whole] if self._whole is not None else (part for _, part in self._blocks(scattered=True))
        for part in parts:
            good = part.valid[first.name]
            seen += good.size
            for name, mask in part.valid.items():
                valid[name] += int(np.count_nonzero(mask if mask is good else mask & good))
            something = something or _anything(part.pixels[first.name], good)
            known = something and all(valid[bound.name] for bound in self._bound if bound.layer is not None)
            if known and valid[first.name] >= self._data.min_valid_fraction * pixels:
                break
        return seen, valid if something else dict.fromkeys(valid, 0)

    def _leave_out(self, at: int, why: str) -> None:
        """Go on without a modality.

        Raises:
            SceneRejected: `missing_modality`, where it is required.
        """
        bound = self._bound[at]
        if bound.config.required:
            raise SceneRejected("missing_modality", f"{self.scene.id}: {why}")
        self.warnings.append(f"missing_modality: {self.scene.id}: {why}; it is left out")
        self._bound[at] = Bound(bound.name, bound.config, None, (), ((1.0, 0.0),), None)
        self.missing |= {bound.name}
        self.scaling[bound.name] = (1.0, 0.0)
        if self._whole is not None:
            empty = absent(bound.config, self.grid.height, self.grid.width)
            self._whole.pixels[bound.name], self._whole.valid[bound.name] = empty

    def _blocks(self, scattered: bool = False) -> Iterator[tuple[tuple[int, int], ChipPixels]]:
        size = _FEWEST_BLOCK
        starts = [(row, col) for row in range(0, self.grid.height, size) for col in range(0, self.grid.width, size)]
        if scattered:
            random.Random(0).shuffle(starts)
        for row, col in starts:
            height, width = min(size, self.grid.height - row), min(size, self.grid.width - col)
            yield (row, col), self.part(row, col, height, width)

    def _check_labels_seen(self, labels: InstanceMap) -> None:
        """Labels on pixels that hold nothing mean that one of the two is wrong."""
        primary = self._data.primary
        if self._whole is not None and self._whole.valid[primary].all():
            return
        total = int(np.count_nonzero(labels.ids))
        if total == 0:
            return
        if self._whole is not None:
            unseen = int(np.count_nonzero(labels.ids[~self._whole.valid[primary]]))
        else:
            unseen = 0
            for row in range(0, self.grid.height, _FEWEST_BLOCK):
                for col in range(0, self.grid.width, _FEWEST_BLOCK):
                    ids = labels.ids[row : row + _FEWEST_BLOCK, col : col + _FEWEST_BLOCK]
                    if ids.any():
                        valid = self.part(row, col, *ids.shape).valid[primary]
                        unseen += int(np.count_nonzero(ids[~valid]))
        if unseen > total / 2:
            name = Path(self.scene.image).name
            raise SceneRejected("labels_on_missing", f"{name}: {unseen} of {total} labelled px lie on missing pixels")
        if unseen:
            self.warnings.append(f"labels_on_missing: {unseen} of {total} labelled px lie on missing pixels")

    def part(self, row: int, col: int, height: int, width: int) -> ChipPixels:
        """A rectangle of the scene: one `read` a file, then views of it for each modality.

        Raises:
            SceneRejected: `unreadable`.
        """
        layers: dict[int, tuple[NDArray[Any], list[Mask | None]]] = {}
        for bound in self._bound:
            if bound.layer is not None and id(bound.layer) not in layers:
                stored = bound.layer.read(self._wanted[id(bound.layer)], row, col, height, width)
                layers[id(bound.layer)] = self._with_missing(bound.layer, stored)
        result = ChipPixels({}, {})
        shared: dict[tuple[int, tuple[int, ...]], Mask] = {}
        everywhere = np.ones((height, width), np.bool_)
        everywhere.flags.writeable = False
        for bound in self._bound:
            if bound.layer is None:
                result.pixels[bound.name], result.valid[bound.name] = absent(bound.config, height, width)
                continue
            pixels, bad = layers[id(bound.layer)]
            at = [self._wanted[id(bound.layer)].index(index) for index in bound.indexes]
            key = (id(bound.layer), tuple(sorted(at)))
            if key not in shared:
                shared[key] = valid_in([bad[index] for index in set(at)], everywhere)
            values, valid = values_of(bound, pixels, at, shared[key])
            result.pixels[bound.name], result.valid[bound.name] = values, valid
        return result

    def _with_missing(self, layer: Layer, stored: tuple[NDArray[Any], list[Mask | None]]) -> Any:
        """Add undeclared missing pixels of the image: all bands that are read hold `missing_value`.

        Where neither the config nor the file says what is missing, it is 0 in three bands or more.
        """
        value = self._data.missing_value
        pixels, bad = stored
        implied = value is None and layer.undeclared and len(pixels) >= _FEWEST_BANDS
        if layer is not self._image or (value is None and not implied):
            return stored
        nothing = 0 if implied else value
        if pixels[0].min() > nothing or pixels[0].max() < nothing:
            return stored
        empty = pixels[0] == nothing
        for band in pixels[1:]:
            # Where a band is nowhere empty together with those before it, no other needs a look.
            if not empty.any():
                return stored
            empty &= band == nothing
        if not empty.any():
            return stored
        self._zeros += int(np.count_nonzero(empty)) if implied else 0
        return pixels, [empty if mask is None else mask | empty for mask in bad]


def _anything(pixels: NDArray[Any], good: Mask) -> bool:
    """Whether any band holds a valid pixel other than 0; a look at the first rows mostly tells."""
    return any(
        bool(((band[rows] != 0) & good[rows]).any()) for rows in (slice(_FIRST_ROWS), slice(None)) for band in pixels
    )


@contextmanager
def open_scene(
    scene: Scene, data: DataConfig, with_labels: bool = True, whole_bytes: int = WHOLE_BYTES, cache_bytes: int = 0
) -> Iterator[OpenScene]:
    """Open a scene's files, put them on the primary grid and refuse what cannot be used.

    Args:
        scene: which scene.
        data: the data set it belongs to.
        with_labels: open the labels too (off for mapping).
        whole_bytes: scenes whose wanted bands take less are decoded in one read.
        cache_bytes: GDAL's cache of decoded blocks; 0 = as much as reading chips row by row needs.

    Raises:
        SceneRejected: with a stable reason: see `raster.open_raster`, `crs.georeference`, `missing_band`,
            `missing_modality`, `all_nodata`, `almost_empty`, `missing_label`.
    """
    with ExitStack() as stack:
        stack.enter_context(reading_scenes(data, cache_bytes))
        opened = _open(scene, data, with_labels, stack)
        opened._prepare(whole_bytes)  # pyright: ignore[reportPrivateUsage]
        yield opened


def reading_scenes(data: DataConfig, cache_bytes: int = 0) -> AbstractContextManager[Any]:
    """GDAL's settings while scenes are open; who opens many enters them once.

    By default the cache holds a row of blocks of a wide scene, to read it row by row, not the share of the memory that
    GDAL takes.
    """
    return reading(GDAL_CACHEMAX=cache_bytes or max(64 << 20, 100_000 * data.chip.size_px * 2))


def scene_grid(scene: Scene, data: DataConfig) -> Grid:
    """The primary grid of a scene, north up, from the header of its file alone.

    Raises:
        SceneRejected: as `open_scene`, as far as that file's header tells.
    """
    with ExitStack() as stack:
        stack.enter_context(reading())
        return upright(trusted_grid(_primary(scene, data, stack)[1], whole=True)[0])[0]


def _primary(scene: Scene, data: DataConfig, stack: ExitStack) -> tuple[str, DatasetReader]:
    """Name and data set of the file of the primary modality."""
    first = data.modalities[data.primary]
    primary = scene.files.get(data.primary, "") if first.file else scene.image
    if not scene.image:
        raise SceneRejected("missing_file", f"{scene.id}: the index gives no image, or no name for it")
    if not primary:
        raise SceneRejected("missing_modality", f"{scene.id} has no file for the primary modality {data.primary}")
    return primary, stack.enter_context(open_raster(primary, data.max_pixels))


def _open(scene: Scene, data: DataConfig, with_labels: bool, stack: ExitStack) -> OpenScene:
    primary, dataset = _primary(scene, data, stack)
    stored, findings = trusted_grid(dataset, whole=True)
    place = Place(primary, stored)
    grid, *_ = upright(stored)
    layers = {primary: (dataset, Layer(dataset, grid, stack, stored=stored))}
    bound: list[Bound] = []
    warnings = [f"{finding.reason}: {finding.detail}" for finding in findings]
    for name, modality in data.modalities.items():
        path = scene.files.get(name, "") if modality.file else scene.image
        try:
            if not path:
                raise SceneRejected("missing_modality", f"{scene.id} has no file for modality {name}")
            if path not in layers:
                other, known = open_beside(path, place, data.max_pixels)
                stack.enter_context(other)
                if known is None:
                    trusted_grid(other)
                layers[path] = (other, Layer(other, grid, stack, modality.resampling, stored=known))
            bound.append(bind(name, modality, data, *layers[path]))
            warnings += odd_bands(*layers[path], bound[-1])
        except SceneRejected as error:
            if modality.required or name == data.primary:
                raise
            warnings.append(f"{error.reason}: modality {name} is left out: {error.detail}")
            bound.append(Bound(name, modality, None, (), ((1.0, 0.0),), None))
    image = layers[scene.image][1] if scene.image in layers else None
    labels = LabelReader(scene, data, place, stack) if with_labels and data.labels.kind != "none" else None
    units = {one.name: (1.0, 0.0) if one.physical else one.scales[0] for one in bound}
    missing = frozenset(one.name for one in bound if one.layer is None)
    return OpenScene(scene, grid, warnings, units, missing, data, bound, image, labels)
