from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import shapely

from rtshpc.core.config import GeneratedConfig
from rtshpc.data.shapes import draw_outline
from rtshpc.data.synthetic import BANDS, NODATA, SCALE, blocks, draw, draw_block, draw_scene, place_of

CONFIG = GeneratedConfig(size_px=160, slumps_per_scene=(2, 4), slump_px=(40, 600), nodata_fraction=0.5, touching=0.7)


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    first = draw_scene(CONFIG, "banks", 3, tmp_path / "a")
    second = draw_scene(CONFIG, "banks", 3, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    other = draw_scene(CONFIG.model_copy(update={"seed": 1}), "banks", 3, tmp_path / "c")
    assert other[0].read_bytes() != first[0].read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_scenes_are_georeferenced_in_several_zones_and_never_overlap(tmp_path: Path) -> None:
    zones, boxes = set(), []
    for site in CONFIG.sites:
        for index in range(3):
            image, label = draw_scene(CONFIG, site, index, tmp_path)
            with rasterio.open(image) as layers, rasterio.open(label) as ids:
                assert layers.descriptions == BANDS and layers.scales == (SCALE,) * 5
                assert layers.nodata == NODATA and layers.dtypes == ("int16",) * 5
                assert layers.crs == ids.crs and layers.transform == ids.transform
                assert layers.res == (CONFIG.resolution_m,) * 2
                zones.add(layers.crs.to_epsg())
                boxes.append((layers.crs.to_epsg(), shapely.box(*layers.bounds)))
    assert len(zones) >= 2
    for number, (zone, box) in enumerate(boxes):
        assert all(zone != other or not box.intersects(place) for other, place in boxes[number + 1 :])


def test_a_scene_does_not_depend_on_the_blocks_it_is_written_in() -> None:
    scene = draw(CONFIG, "peel", 1)
    whole_ids = draw_block(scene, 0, 0, 160, 160)[1]
    ids = np.zeros_like(whole_ids)
    for row, col, height, width in blocks(160, 64):
        ids[row : row + height, col : col + width] = draw_block(scene, row, col, height, width)[1]
    assert np.array_equal(ids, whole_ids)


def test_slumps_are_whole_apart_and_within_their_size(tmp_path: Path) -> None:
    config = GeneratedConfig(size_px=256, slumps_per_scene=(5, 8), touching=0.5, nodata_fraction=0.3)
    touching = 0
    for index in range(4):
        with rasterio.open(draw_scene(config, "yamal", index, tmp_path)[1]) as file:
            ids = file.read(1)
        count = int(ids.max())
        assert set(np.unique(ids)) == set(range(count + 1)) and count >= 4
        for number in range(1, count + 1):
            mask = (ids == number).astype(np.uint8)
            assert cv2.connectedComponents(mask, connectivity=8)[0] == 2
            assert 60 <= mask.sum() <= 1700
            ring = cv2.dilate(mask, np.ones((3, 3), np.uint8)) > 0
            touching += bool(set(np.unique(ids[ring])) - {0, number})
    assert touching > 0


def test_patches_look_like_slumps_in_rgb_alone_and_ponds_in_ndvi_alone() -> None:
    config = GeneratedConfig(size_px=256, slumps_per_scene=(4, 4), rgb_confusers=4, nodata_fraction=0)
    means: dict[str, list[np.ndarray]] = {"slump": [], "confuser": [], "pond": []}
    spread = []
    for index in range(4):
        scene = draw(config, "banks", index)
        pixels, ids = draw_block(scene, 0, 0, 256, 256)
        spread.append(pixels[:, ids == 0].std(axis=1))
        for shape in (*scene.slumps, *scene.others):
            x1, y1, x2, y2 = shape.bounds
            mask = np.zeros((256, 256), dtype=bool)
            mask[max(y1, 0) : y2, max(x1, 0) : x2] = shape.mask()[max(-y1, 0) :, max(-x1, 0) :][: 256 - y1, : 256 - x1]
            means[shape.kind].append(pixels[:, mask].mean(axis=1))
    slump, confuser, pond = (np.mean(means[kind], axis=0) for kind in means)
    noise = np.mean(spread, axis=0)
    red, green, blue, ndvi, nir = range(5)
    for band in (red, green, blue):
        assert abs(slump[band] - confuser[band]) < 0.25 * noise[band] + 60
        assert slump[band] - pond[band] > 1.5 * noise[band]
    assert confuser[ndvi] - slump[ndvi] > noise[ndvi] and confuser[nir] - slump[nir] > 2 * noise[nir]
    assert abs(slump[ndvi] - pond[ndvi]) < noise[ndvi]


def test_shapes_have_the_statistics_of_real_slumps() -> None:
    random = np.random.default_rng(0)
    areas, solidity, elongation = [], [], []
    for _ in range(600):
        polygon = shapely.Polygon(draw_outline(random, 4.0, (0, 1e9)))
        assert polygon.is_valid
        areas.append(polygon.area * 16)
        solidity.append(polygon.area / polygon.convex_hull.area)
        sides = np.hypot(*np.diff(np.array(polygon.minimum_rotated_rectangle.exterior.coords), axis=0).T)
        elongation.append(max(sides[:2]) / min(sides[:2]))
    assert np.log(areas).mean() == pytest.approx(8.54, abs=0.2) and np.log(areas).std() == pytest.approx(1.35, abs=0.15)
    assert np.median(elongation) == pytest.approx(1.73, abs=0.15)
    assert np.quantile(elongation, 0.95) == pytest.approx(3.43, abs=0.5)
    assert np.median(solidity) == pytest.approx(0.90, abs=0.02)
    assert np.quantile(solidity, 0.05) == pytest.approx(0.67, abs=0.05)


def test_a_nodata_wedge_holds_no_slump(tmp_path: Path) -> None:
    config = GeneratedConfig(size_px=128, nodata_fraction=1.0, slumps_per_scene=(3, 3), slump_px=(30, 200))
    image, label = draw_scene(config, "peel", 0, tmp_path)
    with rasterio.open(image) as layers, rasterio.open(label) as ids:
        missing = (layers.read() == NODATA).all(axis=0)
        assert 0 < missing.mean() < 0.5 and not ids.read(1)[missing].any() and ids.read(1).max() == 3


def test_unknown_sites_lie_in_valid_zones() -> None:
    for name in ("a", "b", "somewhere else"):
        crs, _ = place_of(CONFIG, name, 5)
        assert 32601 <= crs.to_epsg() <= 32660


@pytest.mark.slow
def test_a_large_scene_is_written_in_bounded_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from rtshpc.core.config import GeneratedConfig; from rtshpc.data.synthetic import draw_scene\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "make = lambda size, i: draw_scene(GeneratedConfig(size_px=size), 'banks', i, Path(sys.argv[1]))\n"
        "make(600, 0); before = peak(); make(3000, 1); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "3,000 px a side are 90 MB of pixels; only a block of them may be held"
    assert resource.getpagesize()


@pytest.mark.full
def test_the_largest_scene_is_whole(tmp_path: Path) -> None:
    config = GeneratedConfig(size_px=20_000, slumps_per_scene=(20_000, 20_000), slump_px=(20, 900), resolution_m=4)
    image, label = draw_scene(config, "banks", 0, tmp_path)
    with rasterio.open(image) as layers, rasterio.open(label) as ids:
        assert layers.shape == (20_000, 20_000) and ids.read(1).max() > 15_000
