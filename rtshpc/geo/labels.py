"""A scene's labels, from whatever file holds them, on the primary grid."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.scenes import Scene
from rtshpc.geo.align import EXACT_PX, Layer
from rtshpc.geo.instances import InstanceMap, burn, drop_small, from_raster, rasterise
from rtshpc.geo.raster import Grid, find_band, open_raster
from rtshpc.geo.vector import read_polygons

_FEWEST_COVERED = 0.01


class LabelReader:
    """Opens the labels of one scene at once, so that a scene without them is refused before pixels are read."""

    def __init__(self, scene: Scene, data: DataConfig, grid: Grid, stack: ExitStack) -> None:
        """Open the label file.

        Raises:
            SceneRejected: `missing_label`, or what `open_raster` says of a label raster.
        """
        self._scene, self._data, self._grid = scene, data, grid
        self._stack = stack
        self._raster: Any = None
        kind = data.labels.kind
        path = scene.image if kind == "band" else scene.label
        if not path or not Path(path).exists():
            raise SceneRejected("missing_label", f"{scene.id} has no label file" + (f" at {path}" if path else ""))
        if kind == "vector":
            return
        try:
            self._raster = stack.enter_context(open_raster(path, data.max_pixels))
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
        notes: tuple[str, ...] = ()
        lost = len(found.labels) - len(classes)
        if lost:
            notes = (f"small_polygons: {lost} of {len(found.labels)} polygons hold no pixel centre and are left out",)
        ignore = burn(found.ignore, grid.transform, *shape) & (ids == 0)
        if config.min_instance_px > 1:
            sizes = np.bincount(ids.ravel(), minlength=len(classes) + 1)[1:]
            classes = [kind for kind, size in zip(classes, sizes, strict=True) if size >= config.min_instance_px]
            ids = drop_small(ids, config.min_instance_px)
        return InstanceMap(ids, classes, ignore, notes)

    def _from_raster(self) -> InstanceMap:
        config = self._data.labels
        band = find_band(self._raster, config.band, self._data.band_names) if config.kind == "band" else 1
        values, missing, notes = self._on_grid(band)
        for value in config.ignore_values:
            missing = missing | (values == value)
        kind = "instances" if config.kind == "instances" else "mask"
        labels = from_raster(values, kind, missing, config.min_instance_px)
        if missing.all():
            name = Path(self._scene.label).name
            raise SceneRejected("labels_elsewhere", f"{name} says nothing about the image's ground")
        return replace(labels, notes=(*notes, *labels.notes))

    def _on_grid(self, band: int) -> tuple[NDArray[Any], NDArray[np.bool_], list[str]]:
        """Label values on the primary grid and where there are none."""
        grid, name = self._grid, Path(self._scene.label or self._scene.image).name
        shape = (grid.height, grid.width)
        if not self._raster.crs:
            if (self._raster.height, self._raster.width) != shape:
                raise SceneRejected("label_grid", f"{name} has no CRS and another size than the image")
            values = self._raster.read(band)
            nodata = self._raster.nodata
            missing = np.zeros(shape, np.bool_) if nodata is None else values == nodata
            return values, missing, [f"label_no_crs: {name} has no CRS; it is laid on the image pixel by pixel"]
        layer = Layer(self._raster, grid, self._stack, "nearest", max(self._data.labels.max_shift_px, EXACT_PX))
        stored, bad = layer.read([band], 0, 0, *shape)
        missing = np.zeros(shape, np.bool_) if bad[0] is None else bad[0]
        notes: list[str] = []
        if layer.shift is not None and EXACT_PX < layer.shift <= self._data.labels.max_shift_px:
            notes.append(f"label_shift: {name} lies {layer.shift:.2f} px off the image's grid; taken as the same grid")
        elif layer.warped:
            notes.append(f"label_grid: {name} is on another grid; aligned by coordinates (nearest)")
            covered = 1 - float(missing.mean())
            if covered < _FEWEST_COVERED:
                raise SceneRejected("labels_elsewhere", f"{name} covers {covered:.1%} of the image")
            if covered < 0.99 and self._raster.nodata is None:
                notes.append(f"label_coverage: {name} covers {covered:.0%} of the image; the rest is unlabelled")
        return stored[0], missing, notes
