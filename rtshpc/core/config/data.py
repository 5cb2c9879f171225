"""Sections that say what the data are: scenes, modalities, labels, chips, splits, shards."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import model_validator

from rtshpc.core.config.checks import FILE_NAME, MODALITY_NAME, Names, ordered
from rtshpc.core.config.explain import show
from rtshpc.core.config.modality import Expression
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import ConfigError, unknown


class GeneratedConfig(Section):
    """Scenes drawn by `data.synthetic` instead of read from files."""

    sites: Names = doc("names of the generated sites, part of file names", ("banks", "peel", "yamal"), min_length=1)
    scenes_per_site: int = doc("scenes drawn for each site", 12, ge=1)
    size_px: int = doc("side of a scene, px", 256, ge=32, le=20_000)
    resolution_m: float = doc("ground size of a pixel, m", 4.0, gt=0)
    slumps_per_scene: tuple[int, int] = doc("fewest and most slumps in a scene, 0 or more", (1, 4))
    slump_px: tuple[float, float] = doc(
        "smallest and largest slump, px; real areas outside are drawn again", (100, 1500)
    )
    contrast: float = doc("visibility of slumps, 1 = clear", 1.0, gt=0, le=2)
    rgb_confusers: int = doc("bare patches a scene that look like slumps in RGB alone", 2, ge=0)
    touching: float = doc("chance that a slump touches another", 0.1, ge=0, le=1)
    nodata_fraction: float = doc("share of scenes with a nodata wedge", 0.1, ge=0, le=1)
    seed: int = doc("seed of every draw", 0, ge=0)

    @model_validator(mode="after")
    def _can_be_drawn(self) -> GeneratedConfig:
        for site in self.sites:
            if not re.fullmatch(FILE_NAME, site):
                raise ValueError(f'sites = "{site}" must match {FILE_NAME}: it is part of file names')
        ordered(*self.slumps_per_scene, "slumps_per_scene")
        ordered(*self.slump_px, "slump_px")
        if self.slumps_per_scene[0] < 0:
            raise ValueError(f"slumps_per_scene = {show(self.slumps_per_scene)} must be at least 0")
        if self.slump_px[0] <= 0:
            raise ValueError(f"slump_px = {show(self.slump_px)} must be more than 0")
        return self


class ColumnsConfig(Section):
    """Column of the index file for each fact of a scene; empty where the index has none."""

    scene: str = doc("unique name of the scene", "scene")
    image: str = doc("path of the GeoTIFF, relative to data.root", "image")
    label: str = doc("path of the label file, relative to data.root", "")
    site: str = doc("site", "site")
    date: str = doc("date of acquisition", "")
    split: str = doc("train, val or test, for split.rule: column", "")
    group: str = doc("scenes that overlap on the ground share this value", "")


class ScenesConfig(Section):
    """Where the scenes are: exactly one of `index`, `glob` and `generated`."""

    index: str = doc("CSV or GeoJSON that lists scenes, relative to data.root", "")
    glob: str = doc("pattern of GeoTIFFs, relative to data.root; the scene is named by its stem", "")
    generated: GeneratedConfig | None = doc("draw scenes instead of reading them", None)
    columns: ColumnsConfig = doc("columns of the index", ColumnsConfig())
    where: dict[str, str] = doc('keep only index rows with these column values; "*" = any but empty', {})
    site_pattern: str = doc("with glob: regular expression whose first group in the path is the site", "")

    @model_validator(mode="after")
    def _one_source(self) -> ScenesConfig:
        given = [name for name in ("index", "glob", "generated") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of index, glob, generated; found {', '.join(given) or 'none'}")
        return self


class ModalityConfig(Section):
    """A named input of the detector: bands of the scene, an expression over bands, or another raster."""

    bands: tuple[str, ...] = doc("band names (or 1-based numbers) in order", ())
    expression: str = doc("arithmetic over band names, e.g. `(nir - red) / (nir + red)`", "")
    file: str = doc("raster of its own per scene; {scene}, {site}, {stem} are filled; empty = the image", "")
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = doc("kernel when warped", "bilinear")
    valid_range: tuple[float | None, float | None] | None = doc(
        "values outside are nodata, in the modality's unit; null = an open end", None
    )
    required: bool = doc("a scene without it is rejected; else the modality is invalid there", True)
    unit: str = doc("unit of the values, for reports", "")

    @model_validator(mode="after")
    def _one_definition(self) -> ModalityConfig:
        if bool(self.bands) == bool(self.expression):
            raise ValueError("give either bands or expression")
        if self.expression:
            try:
                Expression(self.expression)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if self.limits is not None:
            ordered(*self.limits, "valid_range")
        return self

    @property
    def limits(self) -> tuple[float, float] | None:
        """`valid_range`, an open end as infinity."""
        if self.valid_range is None:
            return None
        low, high = self.valid_range
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def channels(self) -> int:
        """Number of layers of the modality."""
        return len(self.bands) if self.bands else 1


class LabelsConfig(Section):
    """Where the instances come from."""

    kind: Literal["band", "mask", "instances", "vector", "none"] = doc(
        "band of the image, 0/>0 mask, raster of ids 0..n, polygons, or none (mapping only)", "mask"
    )
    file: str = doc("label file; {scene}, {site}, {stem} are filled; empty = the index column", "")
    band: str = doc("name or number of the label band: of the image (kind band), or of a label file of several", "")
    ignore_values: tuple[int, ...] = doc("raster values that mean unlabelled ground (nodata always does)", ())
    class_property: str = doc("for vector: property with the class name; empty = the first class", "")
    ignore_property: str = doc("for vector: property that marks regions to ignore", "")
    ignore_when: tuple[str, ...] = doc("for vector: values of ignore_property that mean ignore", ())
    ignore_file: str = doc("for rasters: polygons whose matching features become ignore regions", "")
    max_shift_px: float = doc(
        "label grids off by up to this (at most half a pixel) are snapped, else moved or warped, px", 1.0, ge=0
    )
    min_instance_px: int = doc("smaller instances are dropped, px of the chip grid", 1, ge=1)


class ChipConfig(Section):
    """How a scene is cut."""

    size_px: int = doc("side of a chip, px of the primary grid", 256, ge=16)
    overlap_px: int = doc("shared by neighbouring chips, px", 32, ge=0)
    min_valid_fraction: float = doc("chips with less valid ground are left out", 0.1, ge=0, le=1)
    keep_empty: float = doc("share of chips without instances that is kept", 1.0, ge=0, le=1)
    enlarge: int = doc("chips are enlarged this many times for the detector", 1, ge=1, le=8)

    @model_validator(mode="after")
    def _overlap_fits(self) -> ChipConfig:
        if self.overlap_px >= self.size_px:
            raise ValueError(f"overlap_px = {self.overlap_px} must be less than size_px = {self.size_px}")
        return self


class SplitConfig(Section):
    """Which chips train, which pick the best epoch, which are scored. Overlapping scenes stay together."""

    rule: Literal["column", "site", "stratified"] = doc(
        "by index column, sites held out, or inside sites", "stratified"
    )
    test_sites: Names = doc("for rule site: sites of the test split", ())
    val_sites: Names = doc("for rule site: sites of the val split; empty = val_fraction of train", ())
    test_fraction: float = doc("for rule stratified: share of every site's scenes", 0.16, ge=0, lt=1)
    val_fraction: float = doc("share of the remaining scenes for validation", 0.1, ge=0, lt=1)
    allow_leakage: bool = doc("the paper's own rule: chips are split one by one, overlap or not", False)
    seed: int = doc("seed of the draw", 0, ge=0)

    @model_validator(mode="after")
    def _sites_named(self) -> SplitConfig:
        if self.rule == "site" and not self.test_sites:
            raise ValueError("rule = site needs test_sites")
        both = sorted(set(self.test_sites) & set(self.val_sites))
        if both:
            raise ValueError(f'val_sites = "{both[0]}" is in test_sites too')
        return self


class ShardConfig(Section):
    """How chips are stored. None of this changes a result, so none of it is hashed."""

    tasks: int = doc("independent array tasks of preprocess", 2, ge=1)
    target_mib: int = doc("a shard is closed at about this size, MiB", 2048, ge=1)
    compression: Literal["none", "lz4", "gzip"] = doc("none reads fastest; lz4 needs hdf5plugin to read", "none")


class DataConfig(Section):
    """A data set: what `configs/data/*.yaml` holds."""

    name: str = doc("name of the data set, for reports")
    root: str = doc("folder that paths are relative to; itself relative to the current folder", ".")
    scenes: ScenesConfig = doc("the scenes")
    band_names: Names = doc("names of the bands in file order; empty = the file's descriptions", ())
    modalities: dict[str, ModalityConfig] = doc("inputs of the detector by name", min_length=1)
    primary: str = doc("modality whose grid all others are warped to")
    classes: Names = doc("names of the classes", ("rts",), min_length=1)
    labels: LabelsConfig = doc("the instances", LabelsConfig())
    chip: ChipConfig = doc("how scenes are cut", ChipConfig())
    split: SplitConfig = doc("how chips are split", SplitConfig())
    shard: ShardConfig = doc("how chips are stored", ShardConfig())
    missing_value: float | None = doc("stored value that means missing though undeclared (0 in Sentinel-2)", None)
    min_valid_fraction: float = doc("scenes with less valid ground are rejected", 0.01, ge=0, le=1)
    max_pixels: int = doc("scenes with more pixels are rejected as size bombs", 2_000_000_000, ge=1)

    @model_validator(mode="after")
    def _primary_known(self) -> DataConfig:
        if self.primary not in self.modalities:
            raise ValueError(f"primary = {self.primary!r} is no modality. Known: {', '.join(sorted(self.modalities))}")
        for name in self.modalities:
            if not re.fullmatch(MODALITY_NAME, name):
                raise ValueError(f'modalities: the name "{name}" must match {MODALITY_NAME}')
        return self

    @model_validator(mode="after")
    def _sites_drawn(self) -> DataConfig:
        generated = self.scenes.generated
        if generated is not None and self.split.rule == "site":
            for key in ("test_sites", "val_sites"):
                for site in getattr(self.split, key):
                    if site not in generated.sites:
                        raise ValueError(unknown(f"split.{key}", site, generated.sites))
        return self
