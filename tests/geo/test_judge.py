"""Each rule of `check` on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geo_making import BANDS, PLACE, reflectance, slumps, write_sample, write_tif
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from rtshpc.core.tiff import FileHead
from rtshpc.geo.judge import Verdict, judge_pair, judge_raster


def words(verdict: Verdict) -> set[str]:
    return {reason.split(":")[0] for reason in verdict.reasons}


def gray(value: int = 0) -> np.ndarray:
    return np.arange(400, dtype=np.uint8).reshape(20, 20) + np.uint8(value)


def test_a_plain_scene_is_accepted(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "a.tif", reflectance(), BANDS, scale=1e-4, nodata=-32768)
    assert judge_raster(path) == Verdict(str(path), "accept", [])


def stand_in(path: Path, content: bytes) -> Verdict:
    path.write_bytes(content)
    return judge_raster(path)


@pytest.mark.parametrize(
    ("content", "word", "hint"),
    [
        (b"", "empty_file", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs_pointer", "git lfs pull"),
        (b"\n <!DOCTYPE HTML><html>403</html>", "not_a_raster", "web page"),
        (b'{"error": "expired"}', "not_a_raster", "text"),
        (b"PK\x03\x04rest", "not_a_raster", "zip"),
        (b"nothing at all", "unreadable", ""),
        (b"II*\x00\xff\xff\xff\x7f", "unreadable", ""),
    ],
)
def test_a_stand_in_is_rejected_by_what_it_is(tmp_path: Path, content: bytes, word: str, hint: str) -> None:
    verdict = stand_in(tmp_path / "a.tif", content)
    assert verdict.verdict == "reject"
    assert words(verdict) == {word}
    assert hint in verdict.reasons[0]


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    assert words(judge_raster(tmp_path / "none.tif")) == {"missing_file"}


def test_a_file_cut_anywhere_is_rejected(tmp_path: Path) -> None:
    whole = write_tif(tmp_path / "a.tif", reflectance(), BANDS, nodata=-32768, compress="deflate").read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        assert stand_in(tmp_path / "b.tif", whole[: int(len(whole) * share)]).verdict == "reject"


def test_one_damaged_block_is_enough(tmp_path: Path) -> None:
    pixels = reflectance(256, 256)
    path = write_tif(tmp_path / "a.tif", pixels, compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    content = bytearray(path.read_bytes())
    offsets = FileHead.of(path).values(324)
    content[offsets[-1] : offsets[-1] + 64] = b"\xff" * 64
    verdict = stand_in(path, bytes(content))
    assert words(verdict) >= {"unreadable"}


def test_noise_in_the_bytes_never_raises(tmp_path: Path) -> None:
    whole = write_tif(tmp_path / "a.tif", reflectance(24, 24), BANDS, nodata=-32768, compress="deflate").read_bytes()
    draw = np.random.default_rng(1)
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        at = draw.integers(0, 600, 6)
        content[at] = draw.integers(0, 256, 6)
        assert stand_in(tmp_path / "b.tif", content.tobytes()).verdict in ("accept", "warn", "reject")


@pytest.mark.parametrize(
    ("options", "verdict", "word"),
    [
        ({"crs": None}, "reject", "no_crs"),
        ({"crs": None, "transform": None}, "reject", "no_georeference"),
        ({"transform": None}, "reject", "no_transform"),
        ({"crs": 'LOCAL_CS["plan",UNIT["metre",1]]'}, "reject", "local_crs"),
        ({"crs": "+proj=eqc +R=1737400 +units=m"}, "reject", "not_earth"),
        ({"crs": "EPSG:4326"}, "reject", "off_earth"),
        ({"transform": Affine(1e-4, 0, -135, 0, -1e-4, 68)}, "reject", "off_earth"),
        ({"crs": "EPSG:4326", "transform": Affine(1e-4, 0, -135, 0, -1e-4, 68)}, "warn", "geographic_crs"),
        ({"crs": "EPSG:3857", "transform": Affine(10, 0, -1.5e7, 0, -10, 1e7)}, "warn", "areas_distorted"),
        ({"crs": "EPSG:3413", "transform": Affine(10, 0, -2e6, 0, -10, 5e5)}, "accept", ""),
        ({"crs": "EPSG:3338", "transform": Affine(10, 0, 1e5, 0, -10, 2e6)}, "accept", ""),
        ({"crs": "+proj=geos +h=35785831 +lon_0=-75 +ellps=GRS80"}, "reject", "off_earth"),
        ({"crs": "EPSG:32660", "transform": Affine(10, 0, 627_300, 0, -10, 7_501_500)}, "warn", "antimeridian"),
        ({"transform": Affine(10, 0, 5e5, 0, 10, 7.6e6)}, "warn", "south_up"),
        ({"transform": Affine(9, 3, 5e5, 3, -9, 7.6e6)}, "warn", "rotated"),
        ({"transform": Affine(10, 0, 5e5, 0, -20, 7.6e6)}, "warn", "oblong_pixels"),
        ({"crs": "EPSG:2225", "transform": Affine(10, 0, 6e6, 0, -10, 2e6)}, "warn", "crs_units"),
    ],
)
def test_the_georeference_decides(tmp_path: Path, options: dict[str, Any], verdict: str, word: str) -> None:
    if "+proj=geos" in str(options):
        options = {**options, "transform": Affine(10, 0, 9e6, 0, -10, 9e6)}
    found = judge_raster(write_tif(tmp_path / "a.tif", reflectance(), BANDS, scale=1e-4, **options))
    assert found.verdict == verdict, found.reasons
    assert words(found) == ({word} if word else set())


def test_control_points_alone_are_no_grid(tmp_path: Path) -> None:
    import rasterio
    from rasterio.control import GroundControlPoint

    path = tmp_path / "a.tif"
    points = [GroundControlPoint(r, c, 5e5 + 10 * c, 7e6 - 10 * r) for r, c in ((0, 0), (0, 20), (20, 0))]
    with rasterio.open(
        path, "w", driver="GTiff", width=20, height=20, count=1, dtype="uint8", gcps=points, crs="EPSG:32608"
    ) as file:
        file.write(gray(), 1)
    assert words(judge_raster(path)) == {"gcp_only"}


def test_a_sidecar_that_contradicts_the_tags_is_told(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "a.tif", gray())
    world = path.with_suffix(".tfw")
    world.write_text("10\n0\n0\n-10\n500005\n7599995\n")
    assert judge_raster(path).verdict == "accept"
    world.write_text("1\n0\n0\n-1\n100\n200\n")
    assert words(judge_raster(path)) == {"inconsistent_georeference"}
    world.unlink()
    pam = "<PAMDataset><GeoTransform>400000,10,0,7000000,0,-10</GeoTransform></PAMDataset>"
    path.with_name("a.tif.aux.xml").write_text(pam)
    assert words(judge_raster(path)) == {"inconsistent_georeference"}


@pytest.mark.parametrize(
    ("dtype", "verdict", "word"),
    [
        ("complex64", "reject", "complex"),
        ("int8", "warn", "pixel_type"),
        ("uint16", "accept", ""),
        ("uint32", "accept", ""),
        ("int32", "accept", ""),
        ("float32", "accept", ""),
        ("float64", "accept", ""),
        ("int64", "warn", "pixel_type"),
    ],
)
def test_the_pixel_type_decides(tmp_path: Path, dtype: str, verdict: str, word: str) -> None:
    pixels = np.arange(400).reshape(20, 20) % 120 + 1
    found = judge_raster(write_tif(tmp_path / "a.tif", pixels.astype(dtype)))
    assert (found.verdict, words(found)) == (verdict, {word} if word else set())


def coloured(path: Path, colours: list[ColorInterp], dtype: str = "uint8") -> Verdict:
    import rasterio

    pixels = np.random.default_rng(0).integers(1, 250, (len(colours), 20, 20)).astype(dtype)
    if ColorInterp.alpha in colours:
        pixels[colours.index(ColorInterp.alpha)] = 255
    write_tif(path, pixels)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = colours
    return judge_raster(path)


def test_alpha_is_no_band_and_blue_first_is_dangerous(tmp_path: Path) -> None:
    red, green, blue, alpha = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
    assert coloured(tmp_path / "rgb.tif", [red, green, blue]).verdict == "accept"
    assert words(coloured(tmp_path / "rgba.tif", [red, green, blue, alpha])) == {"alpha_band"}
    bgra = coloured(tmp_path / "bgra.tif", [blue, green, red, alpha], "uint16")
    assert bgra.verdict == "reject"
    assert words(bgra) == {"band_order", "alpha_band"}
    bgr = coloured(tmp_path / "bgr.tif", [blue, green, red])
    assert (bgr.verdict, words(bgr)) == ("warn", {"band_order"})


def test_repeated_bands_are_told(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[2] = pixels[1]
    assert words(judge_raster(write_tif(tmp_path / "a.tif", pixels, BANDS, scale=1e-4))) == {"repeated_bands"}


@pytest.mark.parametrize("nodata", [-32768.0, 0.0])
def test_all_nodata_is_rejected(tmp_path: Path, nodata: float) -> None:
    pixels = np.full((5, 64, 64), nodata, np.int16)
    assert judge_raster(write_tif(tmp_path / "a.tif", pixels, BANDS, nodata=nodata)).verdict == "reject"


def test_all_nan_all_infinite_and_all_zero_are_rejected(tmp_path: Path) -> None:
    for index, value in enumerate((np.nan, -np.inf, 0.0)):
        path = write_tif(tmp_path / f"{index}.tif", np.full((20, 20), value, np.float32))
        assert words(judge_raster(path)) >= {"all_nodata"}


def test_a_sparse_file_without_blocks_is_empty(tmp_path: Path) -> None:
    import rasterio

    path = tmp_path / "a.tif"
    options = {"width": 512, "height": 512, "count": 3, "dtype": "uint8", "crs": "EPSG:32608", "transform": PLACE}
    with rasterio.open(path, "w", driver="GTiff", sparse_ok=True, **options):
        pass
    assert judge_raster(path).verdict == "reject"


def test_a_nodata_limit_rounded_by_the_writer_still_masks(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    pixels[:19] = np.finfo(np.float32).max
    path = write_tif(tmp_path / "a.tif", pixels, nodata=float(np.finfo(np.float32).max))
    assert words(judge_raster(path)) == {"sparse", "odd_nodata"}


def test_zeros_without_declared_nodata_count_as_missing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 3000, (10, 100, 100)).astype(np.uint16)
    pixels[:, :20] = 0
    found = judge_raster(write_tif(tmp_path / "a.tif", pixels))
    assert (found.verdict, words(found)) == ("warn", {"undeclared_missing"})
    pixels[:, 1:] = 0
    pixels[:, :1, 50:] = 0
    assert judge_raster(write_tif(tmp_path / "b.tif", pixels)).verdict == "reject"


def test_undeclared_nan_and_unreachable_nodata_are_told(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    pixels[3, 3] = np.nan
    assert words(judge_raster(write_tif(tmp_path / "a.tif", pixels))) == {"undeclared_nan"}
    assert judge_raster(write_tif(tmp_path / "b.tif", pixels, nodata=float("nan"))).verdict == "accept"


@pytest.mark.parametrize(
    ("scale", "verdict"), [(1e-4, "accept"), (2.75e-5, "accept"), (1.00395256917, "warn"), (1 / 300, "warn")]
)
def test_scales_that_nobody_chooses_are_told(tmp_path: Path, scale: float, verdict: str) -> None:
    assert judge_raster(write_tif(tmp_path / "a.tif", gray(), scale=scale)).verdict == verdict


def test_a_size_bomb_is_refused_without_allocation(tmp_path: Path) -> None:
    import resource

    import rasterio

    options = {"count": 1, "dtype": "uint8", "crs": "EPSG:32608", "transform": PLACE, "sparse_ok": True}
    wide, many = tmp_path / "wide.tif", tmp_path / "many.tif"
    with rasterio.open(wide, "w", driver="GTiff", width=100_000, height=60_000, tiled=True, **options):
        pass
    with rasterio.open(many, "w", driver="GTiff", width=40_000, height=40_000, tiled=True, **options):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words(judge_raster(wide)) == {"size_bomb"}
    assert words(judge_raster(many, max_pixels=10**9)) == {"size_bomb"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_several_images_in_one_file_are_told(tmp_path: Path) -> None:
    import rasterio

    path = write_tif(tmp_path / "a.tif", gray())
    with rasterio.open(path, "r+") as file:
        options = {**file.profile, "append_subdataset": True}
    with rasterio.open(path, "w", **options) as file:
        file.write(gray(3), 1)
    assert words(judge_raster(path)) == {"several_images"}


def test_a_picture_is_told_from_reflectance(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (5, 64, 64)).astype(np.uint8)
    assert words(judge_raster(write_tif(tmp_path / "a.tif", pixels, BANDS, nodata=0))) == {"stretched"}
    assert words(judge_raster(write_tif(tmp_path / "b.tif", reflectance(), BANDS))) == {"range"}


def pair(folder: Path, name: str = "mask.tif") -> Verdict:
    return judge_pair(folder / "image.tif", folder / name)


@pytest.mark.parametrize("change", ["u1", "f4", "u2", "ids", "empty", "nodata"])
def test_every_honest_mask_is_accepted(tmp_path: Path, change: str) -> None:
    mask = slumps()
    folder = write_sample(tmp_path / "a")
    nodata = None
    if change in ("f4", "u2"):
        mask = (mask * 255).astype(change)
    elif change == "ids":
        mask = mask.astype(np.uint16)
        mask[40:] *= 7
    elif change == "empty":
        mask[:] = 0
    elif change == "nodata":
        mask[60:], nodata = 255, 255
    write_tif(folder / "mask.tif", mask, nodata=nodata)
    assert pair(folder) == Verdict(str(folder / "image.tif"), "accept", [])


def moved(pixels: float) -> Affine:
    return PLACE @ Affine.translation(pixels, pixels)


@pytest.mark.parametrize(
    ("mask", "options", "verdict", "word"),
    [
        (slumps(), {"transform": moved(0.5)}, "warn", "label_shift"),
        (slumps(), {"transform": moved(0.001)}, "accept", ""),
        (slumps(), {"transform": moved(5)}, "warn", "label_grid"),
        (slumps(), {"transform": moved(500)}, "reject", "labels_elsewhere"),
        (slumps(32, 32), {"transform": PLACE @ Affine.scale(2)}, "warn", "label_grid"),
        (slumps(), {"crs": None}, "warn", "label_no_crs"),
        (slumps(62, 62), {"crs": None}, "reject", "label_grid"),
        (slumps().astype(np.complex64), {}, "reject", "label_complex"),
    ],
)
def test_labels_are_aligned_by_coordinates(
    tmp_path: Path, mask: np.ndarray, options: dict[str, Any], verdict: str, word: str
) -> None:
    folder = write_sample(tmp_path / "a")
    write_tif(folder / "mask.tif", mask, **options)
    found = pair(folder)
    assert found.verdict == verdict, found.reasons
    assert word in words(found) or not word


def test_labels_on_missing_pixels_are_rejected(tmp_path: Path) -> None:
    pixels = reflectance()
    pixels[:, :55] = -32768
    assert words(pair(write_sample(tmp_path / "a", pixels))) == {"labels_on_missing"}


def polygons(path: Path, points: list[tuple[float, float]]) -> None:
    geometry = {"type": "Polygon", "coordinates": [points]}
    feature = {"type": "Feature", "properties": {}, "geometry": geometry}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def test_polygons_elsewhere_or_swapped_are_rejected(tmp_path: Path) -> None:
    from pyproj import Transformer

    folder = write_sample(tmp_path / "a")
    change = Transformer.from_crs("EPSG:32608", "EPSG:4326", always_xy=True)
    ring = [(500_100, 7_599_900), (500_300, 7_599_900), (500_300, 7_599_700), (500_100, 7_599_900)]
    ground = [change.transform(*point) for point in ring]
    polygons(folder / "labels.geojson", ground)
    assert pair(folder, "labels.geojson").verdict == "accept"
    polygons(folder / "labels.geojson", [(y, x) for x, y in ground])
    swapped = pair(folder, "labels.geojson")
    assert swapped.verdict == "reject"
    assert "exchanged" in swapped.reasons[0]
    polygons(folder / "labels.geojson", [(x + 5, y) for x, y in ground])
    assert words(pair(folder, "labels.geojson")) == {"labels_elsewhere"}
    (folder / "labels.geojson").write_text("{nonsense")
    assert words(pair(folder, "labels.geojson")) == {"label_unreadable"}
