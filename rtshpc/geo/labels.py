"""A scene's labels, from whatever file holds them, on the primary grid."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.scenes import Scene
from rtshpc.geo.align import EXACT_PX, Layer, upright
from rtshpc.geo.instances import InstanceMap, burn, drop_small, from_raster, rasterise
from rtshpc.geo.raster import Grid, Mask, Place, find_bands, invalid, open_beside, read_window, windows
from rtshpc.geo.vector import read_polygons

_FEWEST_COVERED = 0.01
_HALF_PX = 0.5 + EXACT_PX


class LabelReader:
    """Opens the labels of one scene at once, so that a scene without them is refused before pixels are read."""

    def __init__(self, scene: Scene, data: DataConfig, place: Place, stack: ExitStack) -> None:
        """Open the label file.

        Args:
            scene: whose labels.
            data: the data set.
            place: of the image.
            stack: closes the file.

        Raises:
            SceneRejected: `missing_label`, or what `open_raster` says of a label raster.
        """
        self._scene, self._data, self._stack = scene, data, stack
        self._grid, *self._flips = upright(place.grid)
        self._stored: Grid | None = None
        self._raster: Any = None
        kind = data.labels.kind
        path = scene.image if kind == "band" else scene.label
        if not path or not Path(path).exists():
            raise SceneRejected("missing_label", f"{scene.id} has no label file" + (f" at {path}" if path else ""))
        if kind == "vector":
            return
        try:
            self._raster, self._stored = open_beside(path, place, data.max_pixels)
            stack.enter_context(self._raster)
        except SceneRejected as error:
            raise SceneRejected(f"label_{error.reason}", error.detail) from None

    def read(self) -> InstanceMap:
        """The instances on the primary grid, with notes on what was odd.

        Raises:
            SceneRejected: `label_unreadable`, `labels_elsewhere`, `label_grid`, ...
        """
        labels = self._from_polygons() if self._data.labels.kind == "vector" else self._from_raster()
        if self._scene.ignore_file and Path(self._scene.ignore_file).exists():
            config = self._data.labels
            found = read_polygons(
                self._scene.ignore_file,
                self._grid,
                ignore_property=config.ignore_property,
                ignore_when=config.ignore_when,
            )
            regions = found.ignore if config.ignore_property else found.labels
            if regions:
                # A region drawn over a label does not unmake the label.
                unknown = burn(regions, self._grid.transform, self._grid.height, self._grid.width) & (labels.ids == 0)
                labels = replace(labels, ignore=labels.ignore | unknown)
        return labels

    def _from_polygons(self) -> InstanceMap:
        config, grid = self._data.labels, self._grid
        found = read_polygons(
            self._scene.label,
            grid,
            self._data.classes,
            config.class_property,
            config.ignore_property,
            config.ignore_when,
        )
        name = Path(self._scene.label).name
        if found.swapped:
            detail = f"{name}: no polygon touches the image, but they would with x and y (lon and lat) exchanged"
            raise SceneRejected("labels_elsewhere", detail)
        # One inventory for all scenes may hold nothing here; a file of the scene's own may not.
        own = "{" in config.file or not config.file
        if own and found.total and not found.labels and not found.ignore:
            raise SceneRejected("labels_elsewhere", f"{name}: none of {found.total} polygons touches the image")
        shape = (grid.height, grid.width)
        ids, classes = rasterise(found.labels, found.classes, grid.transform, *shape)
        notes: list[str] = []
        if found.dropped:
            notes.append(f"label_shapes: {found.dropped} of {found.total + found.dropped} features are no polygons")
        lost = len(found.labels) - len(classes)
        if lost:
            why = "hold no pixel centre of their own (too small, or under others)"
            notes.append(f"small_polygons: {lost} of {len(found.labels)} polygons {why} and are left out")
        ignore = burn(found.ignore, grid.transform, *shape) & (ids == 0)
        if config.min_instance_px > 1:
            sizes = np.bincount(ids.ravel(), minlength=len(classes) + 1)[1:]
            classes = [kind for kind, size in zip(classes, sizes, strict=True) if size >= config.min_instance_px]
            ids = drop_small(ids, config.min_instance_px)
        return InstanceMap(ids, classes, ignore, tuple(notes))

    def _from_raster(self) -> InstanceMap:
        config = self._data.labels
        values, missing, notes = self._on_grid(self._band())
        stated = self._raster.nodata
        if stated is not None and stated > 0 and missing is not None and not (values[~missing] > 0).any():
            notes.append(f"label_nodata: nodata {stated:g} is the only value above 0: no slump is left")
        for value in config.ignore_values:
            missing = (values == value) if missing is None else missing | (values == value)
        kind = "instances" if config.kind == "instances" else "mask"
        labels = from_raster(values, kind, missing, config.min_instance_px)
        if missing is not None and missing.all():
            name = Path(self._scene.label).name
            raise SceneRejected("labels_elsewhere", f"{name} says nothing about the image's ground")
        return replace(labels, notes=(*notes, *labels.notes))

    def _band(self) -> int:
        """The band that holds the labels, 1-based.

        Raises:
            SceneRejected: `missing_band`, or `label_bands` where several bands differ and none is named.
        """
        config, raster = self._data.labels, self._raster
        if config.band:
            return find_bands(raster, [config.band], self._data.band_names if config.kind == "band" else ())[0]
        colours = enumerate(raster.colorinterp, 1)
        bands = [index for index, colour in colours if colour != ColorInterp.alpha or raster.count == 1]
        for window in windows(raster) if len(bands) > 1 else ():
            pixels = read_window(raster, bands, window)
            if not (pixels == pixels[:1]).all():
                name = Path(self._scene.label).name
                raise SceneRejected(
                    "label_bands", f"{name} has {len(bands)} bands that differ: name one in labels.band"
                )
        return bands[0]

    def _on_grid(self, band: int) -> tuple[NDArray[Any], Mask | None, list[str]]:
        """Label values on the primary grid and where there are none (None = nowhere)."""
        grid, name = self._grid, Path(self._scene.label or self._scene.image).name
        shape = (grid.height, grid.width)
        notes: list[str] = []
        if self._stored is None and not self._raster.crs:
            if (self._raster.height, self._raster.width) != shape:
                raise SceneRejected("label_grid", f"{name} has no CRS and another size than the image")
            if self._raster.transform.is_identity:
                notes.append(f"label_no_crs: {name} has no CRS; it is laid on the image pixel by pixel")
                return *self._by_index(band), notes
            notes.append(f"label_no_crs: {name} has no CRS; its transform is taken in that of the image")
        # Whole pixels are moved, never snapped away: beyond half a pixel the nearest one is another.
        snap = max(min(self._data.labels.max_shift_px, _HALF_PX), EXACT_PX)
        # Nodata 0 in labels means background: within the file's extent that is known.
        layer = Layer(self._raster, grid, self._stack, "nearest", snap, grid.crs_wkt, True, self._stored)
        stored, (missing,) = layer.read([band], 0, 0, *shape)
        if layer.shift is not None and layer.shift > EXACT_PX and not layer.warped:
            notes.append(f"label_shift: {name} lies {layer.shift:.2f} px off the image's grid; taken as the same grid")
        elif layer.warped:
            notes.append(f"label_grid: {name} is on another grid; aligned by coordinates (nearest)")
            covered = 1.0 if missing is None else 1 - float(missing.mean())
            if covered < _FEWEST_COVERED:
                raise SceneRejected("labels_elsewhere", f"{name} covers {covered:.1%} of the image")
            if covered < 0.99 and self._raster.nodata is None:
                notes.append(f"label_coverage: {name} covers {covered:.0%} of the image; the rest is unlabelled")
        return stored[0], missing, notes

    def _by_index(self, band: int) -> tuple[NDArray[Any], Mask | None]:
        """Label values of a file as large as the image and stored as it is, and where there are none (None = nowhere)."""
        values = read_window(self._raster, [band])[0]
        rows, cols = self._flips
        values = np.ascontiguousarray(values[:: -1 if rows else 1, :: -1 if cols else 1])
        return values, invalid(values, self._raster.nodata) if self._raster.nodata else None
