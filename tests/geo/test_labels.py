from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geo_making import BANDS, PLACE, config, reflectance, scene_of, slumps, write_sample, write_tif
from rasterio.transform import Affine

from rtshpc.core.errors import SceneRejected
from rtshpc.geo.instances import label_instances
from rtshpc.geo.scene import open_scene


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_labels_on_missing_pixels_reject_the_scene(tmp_path: Path, whole_bytes: int) -> None:
    pixels = reflectance()
    pixels[:, :55] = -32768
    folder = write_sample(tmp_path / "a", pixels)
    with (
        pytest.raises(SceneRejected, match="labels_on_missing"),
        open_scene(scene_of(folder), config(tmp_path), whole_bytes=whole_bytes) as opened,
    ):
        opened.instances()


def test_a_shifted_label_is_snapped_and_a_farther_one_moved(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    for shift, snapped in ((0.5, True), (5, False)):
        write_tif(folder / "mask.tif", slumps(), transform=PLACE @ Affine.translation(shift, shift))
        with open_scene(scene_of(folder), config(tmp_path)) as opened:
            found = opened.instances()
            assert opened.warnings[0].startswith("label_shift" if snapped else "label_grid")
        if snapped:
            assert np.array_equal(found.ids, label_instances(slumps()))
        else:
            assert np.array_equal(found.ids[5:, 5:], label_instances(slumps())[:-5, :-5])
            assert found.ignore[:5].all()
            assert not found.ignore[5:, 5:].any()


def test_the_label_may_be_a_band_of_the_image(tmp_path: Path) -> None:
    pixels = np.concatenate([reflectance(), slumps()[None].astype(np.int16)])
    folder = write_sample(tmp_path / "a", pixels, names=[*BANDS, "rts"])
    with open_scene(scene_of(folder), config(tmp_path, labels={"kind": "band", "band": "rts"})) as opened:
        assert np.array_equal(opened.instances().ids, label_instances(slumps()))


def feature(box: tuple[float, float, float, float], **properties: Any) -> dict[str, Any]:
    """A rectangle of pixels (left, top, right, bottom) of the scene as a GeoJSON feature in degrees."""
    from pyproj import Transformer

    change = Transformer.from_crs("EPSG:32608", "EPSG:4326", always_xy=True)
    left, top, right, bottom = box
    ring = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    points = [change.transform(500_000 + 10 * x, 7_600_000 - 10 * y) for x, y in ring]
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [points]}}


def write_features(path: Path, *features: dict[str, Any]) -> str:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return str(path)


def test_polygons_in_degrees_become_instances_classes_and_ignore_regions(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    label = write_features(
        folder / "labels.geojson",
        feature((2, 2, 12, 12), kind="rts", status="label"),
        feature((12, 2, 22, 12), kind="pond", status="label"),
        feature((40, 40, 50, 50), kind="rts", status="other"),
        feature((900, 900, 950, 950), kind="rts", status="label"),
    )
    labels = {"kind": "vector", "class_property": "kind", "ignore_property": "status", "ignore_when": ["other"]}
    data = config(tmp_path, labels=labels, classes=["pond", "rts"])
    with open_scene(scene_of(folder, label=label), data) as opened:
        found = opened.instances()
    assert sorted(found.classes) == [0, 1]
    assert found.ids[5, 5] == 1 + found.classes.index(1)
    assert found.ids[5, 15] == 1 + found.classes.index(0)
    assert [(found.ids == number).sum() for number in (1, 2)] == [100, 100]
    assert (found.ignore.sum(), bool(found.ignore[45, 45])) == (100, True)
    with (
        pytest.raises(SceneRejected, match=r'label_class.*"pond" is unknown'),
        open_scene(scene_of(folder, label=label), config(tmp_path, labels=labels)) as opened,
    ):
        opened.instances()


def test_one_inventory_for_all_scenes_may_hold_nothing_here(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    label = write_features(tmp_path / "all.geojson", feature((900, 900, 950, 950)))
    for file, wanted in (("all.geojson", 0), ("", None)):
        data = config(tmp_path, labels={"kind": "vector", "file": file})
        with open_scene(scene_of(folder, label=label), data) as opened:
            if wanted is None:
                with pytest.raises(SceneRejected, match="labels_elsewhere"):
                    opened.instances()
            else:
                assert opened.instances().count == wanted


def test_a_broken_polygon_is_repaired(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    bow = feature((10, 10, 30, 30))
    points = bow["geometry"]["coordinates"][0]
    points[1], points[2] = points[2], points[1]
    label = write_features(folder / "labels.geojson", bow)
    with open_scene(scene_of(folder, label=label), config(tmp_path, labels={"kind": "vector"})) as opened:
        assert opened.instances().count == 1


def test_ignore_regions_beside_a_mask_leave_labels_alone(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    ignore = write_features(
        folder / "i.geojson", feature((0, 0, 30, 30), status="other"), feature((50, 50, 60, 60), status="label")
    )
    labels = {"kind": "mask", "ignore_property": "status", "ignore_when": ["other"]}
    with open_scene(scene_of(folder, ignore_file=ignore), config(tmp_path, labels=labels)) as opened:
        found = opened.instances()
    assert found.count == 2
    assert not (found.ignore & (found.ids > 0)).any()
    assert found.ignore[12, 12]
    assert not found.ignore[55, 55]
