from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from geo_making import (
    BANDS,
    PLACE,
    SHARED,
    config,
    needs_shared,
    reflectance,
    scene_of,
    slumps,
    write_sample,
    write_tif,
)
from rasterio.transform import Affine

from rtshpc.core.errors import SceneRejected
from rtshpc.core.load import load_data
from rtshpc.core.scenes import list_scenes
from rtshpc.geo.chips import ChipBox, chip_boxes
from rtshpc.geo.instances import label_instances
from rtshpc.geo.raster import reading
from rtshpc.geo.scene import open_scene

WHOLE = ChipBox(0, 0, 64)


def rejected(folder: Path, **changes: Any) -> str:
    with (
        pytest.raises(SceneRejected) as error,
        open_scene(scene_of(folder), config(folder.parent, **changes)) as opened,
    ):
        opened.instances()
    return error.value.reason


def test_pixels_come_as_stored_with_their_scaling(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    with open_scene(scene_of(folder), config(tmp_path)) as opened:
        part = opened.read(WHOLE)
        assert opened.grid.transform == tuple(PLACE)[:6]
        assert opened.grid.resolution_m == 10.0
        assert opened.scaling == dict.fromkeys(("rgb", "ndvi", "nir"), (0.0001, 0.0))
        assert opened.warnings == []
        assert np.array_equal(opened.instances().ids, label_instances(slumps()))
    stored = reflectance()
    assert np.array_equal(part.pixels["rgb"], stored[:3])
    assert np.array_equal(part.pixels["nir"], stored[4:])
    assert part.pixels["rgb"].dtype == np.int16
    assert all(mask.all() for mask in part.valid.values())


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_chips_are_the_scene_however_it_is_read(tmp_path: Path, whole_bytes: int) -> None:
    pixels = reflectance(70, 45)
    pixels[:, 30:40, 7:20] = -32768
    pixels[4, 0, 0] = -32768
    folder = write_sample(tmp_path / "a", pixels, slumps(70, 45) * 0, compress="deflate", blockysize=16)
    data = config(tmp_path)
    with open_scene(scene_of(folder), data, whole_bytes=whole_bytes) as opened:
        for box in chip_boxes(45, 70, data.chip):
            part = opened.read(box)
            rows, cols = slice(box.row, box.row + 32), slice(box.col, box.col + 32)
            inside = pixels[:, rows, cols]
            height, width = inside.shape[1:]
            assert np.array_equal(part.pixels["rgb"][:, :height, :width], inside[:3])
            assert np.array_equal(part.valid["rgb"][:height, :width], (inside[:3] != -32768).all(axis=0))
            assert np.array_equal(part.valid["nir"][:height, :width], inside[4] != -32768)
            assert not part.valid["rgb"][height:].any()
        assert opened.valid_fraction() == (pixels[:3] != -32768).all(axis=0).mean()


def test_a_scene_smaller_than_a_chip_is_padded_as_invalid(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a", reflectance(20, 24), slumps(64, 64)[:20, :24])
    for whole_bytes in (0, 1 << 30):
        with open_scene(scene_of(folder), config(tmp_path), whole_bytes=whole_bytes) as opened:
            part = opened.read(ChipBox(0, 0, 32))
            assert part.pixels["rgb"].shape == (3, 32, 32)
            assert part.valid["rgb"].sum() == 20 * 24
            assert opened.instances().crop(ChipBox(0, 0, 32)).ids.shape == (32, 32)


def test_a_mask_file_beside_the_image_says_what_is_valid(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a", nodata=None)
    image, inside = Path(scene_of(folder).image), np.ones((64, 64), np.uint8) * 255
    inside[:, :9] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(image, "r+") as file:
        file.write_mask(inside)
    assert image.with_name(f"{image.name}.msk").exists()
    with open_scene(scene_of(folder), config(tmp_path)) as opened:
        assert np.array_equal(opened.read(WHOLE).valid["rgb"], inside > 0)


def test_modalities_of_the_same_bands_share_their_mask(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[:, :9] = -32768
    folder = write_sample(tmp_path / "a", pixels)
    modalities = {"rgb": {"bands": ["red", "green"]}, "swapped": {"bands": ["green", "red"]}}
    with open_scene(scene_of(folder), config(tmp_path, modalities=modalities)) as opened:
        part = opened.read(WHOLE)
    assert part.valid["rgb"] is part.valid["swapped"]
    assert np.array_equal(part.pixels["swapped"], part.pixels["rgb"][::-1])


def test_an_expression_is_computed_on_physical_values(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[0, 0, 0] = -32768
    pixels[[0, 4], 1, 1] = 0
    folder = write_sample(tmp_path / "a", pixels)
    modalities = {"rgb": {"bands": ["red", "green", "blue"]}, "ndvi": {"expression": "(NIR - red) / (NIR + red)"}}
    with open_scene(scene_of(folder), config(tmp_path, modalities=modalities)) as opened:
        part = opened.read(WHOLE)
        assert opened.scaling["ndvi"] == (1.0, 0.0)
    red, nir = pixels[0].astype(float), pixels[4].astype(float)
    with np.errstate(all="ignore"):
        wanted = (nir - red) / (nir + red)
    valid = part.valid["ndvi"]
    assert not valid[0, 0]
    assert not valid[1, 1]
    assert valid.sum() == 64 * 64 - 2
    assert part.pixels["ndvi"].dtype == np.float32
    assert np.allclose(part.pixels["ndvi"][0][valid], wanted[valid], atol=1e-5)


def test_bands_of_different_scales_become_physical(tmp_path: Path) -> None:
    import rasterio

    folder = write_sample(tmp_path / "a")
    with rasterio.open(folder / "image.tif", "r+") as file:
        file.scales, file.offsets = [1e-4, 2e-4, 1e-4, 1e-4, 1e-4], [0, 0.5, 0, 0, 0]
    with open_scene(scene_of(folder), config(tmp_path)) as opened:
        rgb = opened.read(WHOLE).pixels["rgb"]
        assert (rgb.dtype, opened.scaling["rgb"]) == (np.float32, (1.0, 0.0))
    assert np.allclose(rgb[1], reflectance()[1] * 2e-4 + 0.5)


def test_undeclared_zeros_are_missing_where_the_config_says_so(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[:, :, :3] = 0
    pixels[3, 10, 10] = 0
    folder = write_sample(tmp_path / "a", pixels, nodata=None)
    with open_scene(scene_of(folder), config(tmp_path, missing_value=0)) as opened:
        valid = opened.read(WHOLE).valid
    assert not valid["ndvi"][:, :3].any()
    assert valid["ndvi"][:, 3:].all(), "a lone zero of NDVI is a measurement"


def test_a_valid_range_is_in_the_modalitys_unit(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    modalities = {"rgb": {"bands": ["red"]}, "nir": {"bands": ["nir"], "valid_range": [0.2, 0.3]}}
    with open_scene(scene_of(folder), config(tmp_path, modalities=modalities)) as opened:
        valid = opened.read(WHOLE).valid["nir"]
    nir = reflectance()[4]
    assert np.array_equal(valid, (nir >= 2000) & (nir <= 3000))


def test_non_finite_pixels_are_invalid_undeclared(tmp_path: Path) -> None:
    pixels = reflectance().astype(np.float32)
    pixels[1, 3, 3], pixels[4, 5, 5] = np.nan, -np.inf
    folder = write_sample(tmp_path / "a", pixels, nodata=None)
    with open_scene(scene_of(folder), config(tmp_path)) as opened:
        valid = opened.read(WHOLE).valid
    assert (~valid["rgb"]).sum() == 1
    assert not valid["rgb"][3, 3]
    assert not valid["nir"][5, 5]


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_a_south_up_scene_is_the_same_ground(tmp_path: Path, whole_bytes: int) -> None:
    pixels = reflectance(70, 64)
    up = Affine(10, 0, 500_000, 0, 10, 7_600_000 - 700)
    folder = write_sample(tmp_path / "a", pixels[:, ::-1], slumps(70, 64), transform=up)
    with open_scene(scene_of(folder), config(tmp_path), whole_bytes=whole_bytes) as opened:
        assert opened.grid.transform == tuple(PLACE)[:6]
        assert np.array_equal(opened.read(ChipBox(38, 20, 32)).pixels["rgb"], pixels[:3, 38:70, 20:52])
        assert np.array_equal(opened.instances().ids, label_instances(slumps(70, 64)))
        assert opened.warnings[0].startswith("south_up")


def relief(folder: Path, **options: Any) -> Path:
    """Elevation that equals the easting, so that any alignment can be checked."""
    transform = options.pop("transform", Affine(25, 0, 499_000, 0, -25, 7_600_500))
    x = transform.c + transform.a * (np.arange(120) + 0.5)
    return write_tif(
        folder / "dem.tif", np.tile(x, (120, 1)).astype(np.float32), ["height"], transform=transform, **options
    )


DEM = {"rgb": {"bands": ["red", "green", "blue"]}, "dem": {"bands": ["height"], "file": "{scene}/dem.tif"}}


def with_dem(folder: Path, **changes: Any) -> Any:
    data = config(folder.parent, modalities=DEM)
    return open_scene(scene_of(folder, files={"dem": str(folder / "dem.tif")}, **changes), data)


def test_a_raster_on_another_grid_is_warped_to_the_primary_one(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    relief(folder)
    with with_dem(folder) as opened:
        part = opened.read(WHOLE)
    x = PLACE.c + 10 * (np.arange(64) + 0.5)
    assert part.valid["dem"].all()
    assert np.abs(part.pixels["dem"][0] - x).max() < 2.5


def test_a_raster_in_another_crs_lands_on_the_same_ground(tmp_path: Path) -> None:
    import rasterio
    from rasterio.warp import calculate_default_transform, reproject

    folder = write_sample(tmp_path / "a")
    path = relief(folder)
    with rasterio.open(path) as file:
        values, bounds = file.read(1), file.bounds
        transform, width, height = calculate_default_transform(file.crs, "EPSG:3413", 120, 120, *bounds)
        target = np.full((height, width), -9999, np.float32)
        reproject(
            values,
            target,
            src_transform=file.transform,
            src_crs=file.crs,
            dst_transform=transform,
            dst_crs="EPSG:3413",
            dst_nodata=-9999,
        )
    write_tif(path, target, ["height"], crs="EPSG:3413", transform=transform, nodata=-9999)
    with with_dem(folder) as opened:
        part = opened.read(WHOLE)
    x = PLACE.c + 10 * (np.arange(64) + 0.5)
    assert part.valid["dem"].all()
    assert np.abs(part.pixels["dem"][0] - x).max() < 26


def test_ground_without_the_other_raster_is_invalid_there_only(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    relief(folder, transform=Affine(10, 0, 500_320, 0, -10, 7_600_000))
    with with_dem(folder) as opened:
        part = opened.read(WHOLE)
    assert part.valid["rgb"].all()
    assert not part.valid["dem"][:, :31].any()
    assert part.valid["dem"][:, 33:].all()
    assert np.abs(part.pixels["dem"][0][:, 33:] - (PLACE.c + 10 * (np.arange(33, 64) + 0.5))).max() < 0.1


def test_an_optional_modality_may_be_absent_and_a_required_one_may_not(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    with pytest.raises(SceneRejected, match="missing_file"), with_dem(folder):
        pass
    modalities = {**DEM, "dem": {**DEM["dem"], "required": False}}
    with open_scene(scene_of(folder, files={"dem": ""}), config(tmp_path, modalities=modalities)) as opened:
        part = opened.read(WHOLE)
        assert opened.missing == {"dem"}
        assert opened.warnings[0].startswith("missing_modality")
    assert part.pixels["dem"].shape == (1, 64, 64)
    assert not part.valid["dem"].any()


def test_the_primary_modality_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    relief(folder)
    data = config(tmp_path, modalities=DEM, primary="dem")
    scene = scene_of(folder, files={"dem": str(folder / "dem.tif")}, label=str(folder / "mask.tif"))
    with open_scene(scene, data) as opened:
        assert (opened.grid.width, opened.grid.resolution_m) == (120, 25.0)
        part = opened.read(ChipBox(0, 0, 120))
        labels = opened.instances()
    assert part.valid["dem"].all()
    assert 0.02 < part.valid["rgb"].mean() < 0.06
    assert labels.count == 2
    assert labels.ignore.sum() > 0.9 * 120 * 120, "ground without labels is unlabelled"


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((5, 64, 64), -32768, np.int16), "all_nodata"),
        (reflectance()[:3], "missing_band"),
        (reflectance().astype(np.complex64), "complex"),
    ],
)
def test_an_unusable_scene_is_rejected_by_reason(tmp_path: Path, pixels: Any, reason: str) -> None:
    nodata = -32768 if pixels.dtype == np.int16 else None
    assert rejected(write_sample(tmp_path / "a", pixels, names=BANDS[: len(pixels)], nodata=nodata)) == reason


def test_too_little_valid_ground_is_rejected_in_large_scenes_too(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[:, 1:] = -32768
    folder = write_sample(tmp_path / "a", pixels)
    data = config(tmp_path, min_valid_fraction=0.1)
    for whole_bytes in (0, 1 << 30):
        with (
            pytest.raises(SceneRejected, match="almost_empty"),
            open_scene(scene_of(folder), data, whole_bytes=whole_bytes),
        ):
            pass


def test_a_scene_without_a_grid_or_labels_is_rejected(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a", crs=None)
    assert rejected(folder) == "no_crs"
    folder = write_sample(tmp_path / "b")
    (folder / "mask.tif").unlink()
    assert rejected(folder) == "missing_label"
    with open_scene(scene_of(folder), config(tmp_path), with_labels=False) as opened:
        assert opened.instances().count == 0


def test_bands_are_found_by_config_name_number_or_description(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a", names=())
    modalities = {"rgb": {"bands": ["3", "2", "1"]}}
    with open_scene(scene_of(folder), config(tmp_path, modalities=modalities)) as opened:
        assert np.array_equal(opened.read(WHOLE).pixels["rgb"], reflectance()[2::-1])
    names = ["blue", "green", "red", "ndvi", "nir"]
    with open_scene(scene_of(folder), config(tmp_path, band_names=names)) as opened:
        assert np.array_equal(opened.read(WHOLE).pixels["rgb"], reflectance()[2::-1])
    assert rejected(folder) == "missing_band"
    assert rejected(folder, band_names=[*names, "more"]) == "missing_band"
    assert rejected(write_sample(tmp_path / "b", names=["red", "red", "blue", "ndvi", "nir"])) == "missing_band"


def test_degrees_and_web_mercator_measure_true_metres(tmp_path: Path) -> None:
    degrees = Affine(1e-4, 0, -135, 0, -1e-4, 68.5)
    cases = ((degrees, "EPSG:4326", 6.76), (Affine(10, 0, -1.5e7, 0, -10, 1e7), "EPSG:3857", 3.96))
    for index, (transform, crs, wanted) in enumerate(cases):
        folder = write_sample(tmp_path / str(index), transform=transform, crs=crs)
        write_tif(folder / "mask.tif", slumps(), transform=transform, crs=crs)
        with open_scene(scene_of(folder), config(tmp_path)) as opened:
            assert abs(opened.grid.resolution_m - wanted) < 0.15


@needs_shared
def test_the_real_scenes_hold_the_instances_of_the_index() -> None:
    root = SHARED / "scenes" / "public"
    with (root / "index.csv").open(encoding="utf-8") as file:
        wanted = {row["sample_id"]: int(row["n_instances"] or 0) for row in csv.DictReader(file)}
    data = load_data(
        "sentinel2_rts_dem", [f"root={root}", "scenes.where={collection: A_s2_rts}", "modalities.relief.required=false"]
    )
    total = 0
    for scene in list_scenes(data, None):
        with open_scene(scene, data) as opened:
            found = opened.instances()
            part = opened.read(ChipBox(0, 0, 256))
            assert found.count == wanted[scene.id]
            assert part.pixels["relief"].shape == (2, 256, 256)
            assert part.valid["relief"].all() == (not opened.missing)
            total += found.count
    assert total == 263


def test_a_scale_that_only_the_georeference_tells_is_kept(tmp_path: Path) -> None:
    options = {"count": 1, "dtype": "int16", "crs": "EPSG:32608+5773", "transform": PLACE}
    for name in ("image", "dem"):  # with a vertical CRS the scale of the only band is written as the pixel's height
        with rasterio.open(tmp_path / f"{name}.tif", "w", "GTiff", 64, 64, **options) as file:
            file.scales = [0.1]
            file.write(reflectance()[:1])
    modalities = {"red": {"bands": ["1"]}, "dem": {"bands": ["1"], "file": "dem.tif"}}
    data = config(tmp_path, modalities=modalities, primary="red", labels={"kind": "none"})
    scene = scene_of(tmp_path, label="", files={"dem": str(tmp_path / "dem.tif")})
    with open_scene(scene, data) as opened:
        assert opened.scaling == {"red": (0.1, 0.0), "dem": (0.1, 0.0)}


def test_settings_that_are_in_force_are_not_entered_again() -> None:
    with reading(GDAL_CACHEMAX=1 << 26):
        assert not isinstance(reading(), rasterio.Env) and not isinstance(reading(GDAL_CACHEMAX=1 << 26), rasterio.Env)
        with reading(GDAL_CACHEMAX=1 << 27):
            assert rasterio.env.getenv()["GDAL_CACHEMAX"] == 1 << 27
        assert rasterio.env.getenv()["GDAL_CACHEMAX"] == 1 << 26
    assert isinstance(reading(), rasterio.Env)
