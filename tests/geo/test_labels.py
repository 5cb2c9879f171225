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


@pytest.mark.parametrize(("beside", "moved"), [("mask.tif", 5), ("image.tif", -5)])
def test_a_file_beside_the_labels_or_the_image_may_move_them(tmp_path: Path, beside: str, moved: int) -> None:
    folder = write_sample(tmp_path / "a")
    pam = "<PAMDataset><GeoTransform>500050,10,0,7600000,0,-10</GeoTransform></PAMDataset>"
    (folder / f"{beside}.aux.xml").write_text(pam)
    found, words = labelled(folder)
    wanted = np.zeros((64, 64), np.int32)
    wanted[:, max(moved, 0) : 64 + min(moved, 0)] = label_instances(slumps())[:, max(-moved, 0) : 64 - max(moved, 0)]
    assert np.array_equal(found.ids > 0, wanted > 0) and words[0] == "label_grid"


def test_labels_lie_where_gdal_is_told_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sample(tmp_path / "a")
    (folder / "mask.tfw").write_text("10\n0\n0\n-10\n500055\n7599995\n")
    assert labelled(folder)[1] == []
    monkeypatch.setenv("GDAL_GEOREF_SOURCES", "WORLDFILE,INTERNAL")
    assert labelled(folder)[1][0] == "label_grid"


def test_labels_stored_upside_down_like_their_image_are_turned_with_it(tmp_path: Path) -> None:
    south_up = Affine(10.0, 0.0, 500_000.0, 0.0, 10.0, 7_599_360.0)
    folder = write_sample(tmp_path / "a", transform=south_up)
    write_tif(folder / "mask.tif", slumps(), transform=south_up)
    found, words = labelled(folder)
    assert np.array_equal(found.ids > 0, slumps()[::-1] > 0) and words == ["south_up"]


MOVES = [(0.3, 0), (0.5, 0), (-0.5, 0), (0.75, 1), (1, 1), (-1, -1), (1.3, 1), (2, 2)]


@pytest.mark.parametrize(
    ("shift", "moved", "most"),
    # Half a pixel off, without snapping, either neighbour is right.
    [(*move, most) for most in (0.0, 1.0, 3.0) for move in MOVES if most or abs(move[0]) != 0.5],
)
def test_labels_move_by_whole_pixels_and_only_the_rest_is_snapped(
    tmp_path: Path, shift: float, moved: int, most: float
) -> None:
    folder = write_sample(tmp_path / "a")
    write_tif(folder / "mask.tif", slumps(), transform=PLACE @ Affine.translation(shift, 0))
    found, words = labelled(folder, labels={"kind": "mask", "max_shift_px": most})
    wanted = np.zeros((64, 64), np.int32)
    wanted[:, max(moved, 0) : 64 + min(moved, 0)] = label_instances(slumps())[:, max(-moved, 0) : 64 - max(moved, 0)]
    assert np.array_equal(found.ids, wanted)
    assert words[0] == ("label_shift" if abs(shift) <= min(most, 0.5) else "label_grid")


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


def labelled(folder: Path, **changes: Any) -> tuple[Any, list[str]]:
    """The instances of a sample folder and the words of its warnings."""
    with open_scene(scene_of(folder), config(folder.parent, **changes)) as opened:
        return opened.instances(), [text.split(":")[0] for text in opened.warnings]


@pytest.mark.parametrize("shift", [0, 20])
def test_nodata_0_is_background_where_the_label_file_reaches(tmp_path: Path, shift: int) -> None:
    folder = write_sample(tmp_path / "a")
    place = PLACE @ Affine.translation(shift, 0)
    write_tif(folder / "mask.tif", slumps(), nodata=0, transform=place)
    found, words = labelled(folder)
    assert np.array_equal(found.ids[:, shift:], label_instances(slumps()[:, : 64 - shift]))
    assert found.ignore[:, :shift].all() and not found.ignore[:, shift:].any()
    assert words == (["label_grid"] if shift else [])
    write_tif(folder / "mask.tif", slumps() * 0, nodata=0)
    empty, words = labelled(folder)
    assert (empty.count, int(empty.ignore.sum()), words) == (0, 0, [])


def test_nodata_that_is_the_slumps_own_value_is_told(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    write_tif(folder / "mask.tif", slumps(), nodata=1)
    found, words = labelled(folder)
    assert (found.count, words) == (0, ["label_nodata"])


@pytest.mark.parametrize("way", ["south up", "mirrored", "both"])
def test_a_mask_without_a_crs_is_turned_as_the_image_is(tmp_path: Path, way: str) -> None:
    rows, cols = way != "mirrored", way != "south up"
    place = Affine(-10 if cols else 10, 0, 500_640 if cols else 500_000, 0, 10 if rows else -10, 7_600_000 - 640 * rows)
    turned = (slice(None, None, -1 if rows else 1), slice(None, None, -1 if cols else 1))
    folder = write_sample(tmp_path / "a", reflectance()[:, *turned], transform=place)
    write_tif(folder / "mask.tif", slumps()[turned], crs=None, transform=None)
    found, words = labelled(folder)
    assert np.array_equal(found.ids, label_instances(slumps()))
    assert "label_no_crs" in words


def test_a_mask_without_a_crs_is_laid_where_its_own_transform_says(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    write_tif(folder / "mask.tif", slumps()[::-1], crs=None, transform=Affine(10, 0, 500_000, 0, 10, 7_600_000 - 640))
    found, words = labelled(folder)
    assert np.array_equal(found.ids, label_instances(slumps()))
    assert words == ["label_no_crs"]
    write_tif(folder / "mask.tif", slumps(), crs=None, transform=Affine(10, 0, 400_000, 0, -10, 7_000_000))
    with pytest.raises(SceneRejected, match="labels_elsewhere"):
        labelled(folder)


def test_a_label_file_of_several_bands_needs_a_name_unless_they_are_equal(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    wanted = label_instances(slumps())
    write_tif(folder / "mask.tif", np.stack([slumps()] * 3))
    assert np.array_equal(labelled(folder)[0].ids, wanted)
    write_tif(folder / "mask.tif", np.stack([slumps() * 0, slumps()]), names=["water", "rts"])
    with pytest.raises(SceneRejected, match="label_bands"):
        labelled(folder)
    for band in ("rts", "2"):
        assert np.array_equal(labelled(folder, labels={"kind": "mask", "band": band})[0].ids, wanted)
    with pytest.raises(SceneRejected, match="missing_band"):
        labelled(folder, labels={"kind": "mask", "band": "ice"})
    alpha = np.stack([slumps(), np.full((64, 64), 255, np.uint8)])
    write_tif(folder / "mask.tif", alpha, photometric="MINISBLACK", alpha="YES")
    assert np.array_equal(labelled(folder)[0].ids, wanted)


def shape(kind: str, **parts: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind, **parts} if kind else None}


def within(*features: dict[str, Any]) -> dict[str, Any]:
    """The features' geometries as one collection."""
    return shape("GeometryCollection", geometries=[one["geometry"] for one in features])


def drawn(folder: Path, *features: dict[str, Any]) -> tuple[Any, list[str]]:
    label = write_features(folder / "labels.geojson", *features)
    with open_scene(scene_of(folder, label=label), config(folder.parent, labels={"kind": "vector"})) as opened:
        return opened.instances(), [text.split(":")[0] for text in opened.warnings]


def test_features_that_are_no_polygons_are_no_negative_scene(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    corner = feature((2, 2, 12, 12))["geometry"]["coordinates"][0]
    point, line = shape("Point", coordinates=corner[0]), shape("LineString", coordinates=corner)
    for features in ([point], [line], [point, line], [shape("")], [within(point)], [shape("Polygon", coordinates=[])]):
        with pytest.raises(SceneRejected, match=r"label_unreadable.*no polygons"):
            drawn(folder, *features)
    assert drawn(folder)[0].count == 0
    found, words = drawn(folder, point, feature((2, 2, 12, 12)), shape(""))
    assert (found.count, words) == (1, ["label_shapes"])


def test_a_collection_is_the_polygons_in_it(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    line = shape("LineString", coordinates=feature((2, 2, 12, 12))["geometry"]["coordinates"][0])
    inner = within(feature((30, 30, 40, 40)), line)
    found, words = drawn(folder, within(feature((2, 2, 12, 12)), inner), feature((50, 50, 60, 60)))
    assert (found.count, words) == (2, [])
    assert sorted((found.ids == number).sum() for number in (1, 2)) == [100, 200]


def test_a_polygon_under_an_equal_one_is_told_as_that(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "a")
    found, words = drawn(folder, feature((2, 2, 12, 12)), feature((2, 2, 12, 12)))
    assert (found.count, words) == (1, ["small_polygons"])
    assert "under others" in found.notes[0]
