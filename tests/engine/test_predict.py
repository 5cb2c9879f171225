from __future__ import annotations

import json

import numpy as np
import pyproj
import pytest
import shapely
import torch
from pycocotools import mask as coder

from rtshpc.core.config import DataConfig
from rtshpc.core.paths import RunPaths
from rtshpc.data.reader import ShardDataset
from rtshpc.engine.predict import (
    boxes_of_masks,
    coco_predictions,
    components,
    decode,
    encode,
    image_result,
    outlines,
    predict,
)
from rtshpc.engine.scoring import score
from rtshpc.model.detections import Detections
from rtshpc.model.detector import build_detector

from .conftest import DATA, small_config


def _sets(shards: str) -> tuple[ShardDataset, ShardDataset]:
    """The same chips as they are and enlarged twice."""
    enlarged = DataConfig.model_validate({**DATA, "chip": {**DATA["chip"], "enlarge": 2}})
    index = RunPaths(shards).index  # type: ignore[arg-type]
    return tuple(ShardDataset(index, data, "test", ("rgb",)) for data in (small_config().data, enlarged))  # type: ignore[return-value]


def _nothing() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28))


def test_truth_of_an_enlarged_chip_is_that_of_the_chip(shards: str) -> None:
    plain, enlarged = _sets(shards)
    assert len(plain)
    for row in range(len(plain)):
        one, other = image_result(plain[row], _nothing()), image_result(enlarged[row], _nothing())
        assert enlarged[row].size == (128, 128) and other.size == (64, 64)
        assert one.truth.masks == other.truth.masks and one.ignore.masks == other.ignore.masks
        assert np.array_equal(one.truth.boxes, other.truth.boxes)
        assert other.pixel_m == pytest.approx(4.0, rel=0.01)


def test_detections_come_out_at_the_chips_own_resolution(shards: str) -> None:
    _, enlarged = _sets(shards)
    box = torch.tensor([[20.0, 40.0, 60.0, 80.0]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([0]), torch.ones(1, 28, 28))
    result = image_result(enlarged[0], found)
    assert result.found.boxes.tolist() == [[10, 20, 30, 40]]
    assert decode(result.found.masks or [], (64, 64))[0].sum() == 20 * 20


def test_predicting_is_in_order_and_leaves_the_mode_as_it_was(shards: str) -> None:
    plain, _ = _sets(shards)
    torch.manual_seed(0)
    detector = build_detector(small_config().model, {"rgb": 3}, 1).train()
    told: list[tuple[int, int]] = []
    rows = list(range(len(plain)))[::-1]
    results = predict(detector, plain, rows, torch.device("cpu"), told=lambda *counts: told.append(counts))
    assert [result.id for result in results] == plain.ids[::-1]
    assert detector.training and told[-1] == (len(rows), len(rows))
    again = predict(detector, plain, rows[:1], torch.device("cpu"))
    assert np.allclose(again[0].found.boxes, results[0].found.boxes, atol=1e-3)
    assert score(results, 1, (2000, 12000))["mask"]["AP50"] is not None


def test_predictions_are_coco_json_that_says_where_on_earth(shards: str) -> None:
    plain, _ = _sets(shards)
    sample = plain[0]
    box = torch.tensor([[8.0, 16.0, 24.0, 40.0]])
    found = Detections(box, torch.tensor([0.75]), torch.tensor([0]), torch.ones(1, 28, 28))
    result = image_result(sample, found)
    value = json.loads(json.dumps(coco_predictions([result], ["rts"]), allow_nan=False))
    (image,), (row,) = value["images"], value["annotations"]
    assert image["file_name"] == sample.id and image["crs"].startswith("EPSG:326")
    assert row["bbox"] == [8, 16, 16, 24] and row["area"] == 16 * 24 and row["score"] == 0.75
    assert row["area_m2"] == pytest.approx(16 * 24 * 16, rel=0.02)
    assert coder.area(row["segmentation"]) == 16 * 24
    to_map = pyproj.Transformer.from_crs(4326, pyproj.CRS.from_wkt(sample.crs_wkt), always_xy=True)
    a, b, c, d, e, f = sample.transform
    x, y = to_map.transform(row["geo"]["lon"], row["geo"]["lat"])
    assert (x, y) == pytest.approx((a * 16 + b * 28 + c, d * 16 + e * 28 + f), abs=0.05)
    west, south, east, north = row["geo"]["bbox"]
    assert west < row["geo"]["lon"] < east and south < row["geo"]["lat"] < north
    shape = shapely.transform(shapely.geometry.shape(row["geo"]["geometry"]), to_map.transform, interleaved=False)
    assert shape.area == pytest.approx(16 * 24 * 16, rel=0.001)


def test_outlines_follow_pixel_edges_with_holes_and_are_valid() -> None:
    random = np.random.default_rng(3)
    mask = random.random((20, 30)) < 0.5
    shapes = [shapely.Polygon(rings[0], rings[1:]) for rings in outlines(mask)]
    assert all(shape.is_valid for shape in shapes)
    assert sum(shape.area for shape in shapes) == mask.sum()
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    (polygon,) = outlines(ring)
    assert len(polygon) == 2 and outlines(np.zeros((4, 4), bool)) == []


def test_run_length_codes_boxes_and_parts_are_exact() -> None:
    random = np.random.default_rng(4)
    masks = random.random((3, 17, 23)) < 0.1
    assert np.array_equal(decode(encode(masks), (17, 23)), masks)
    assert decode([], (17, 23)).shape == (0, 17, 23)
    x1, y1, x2, y2 = boxes_of_masks(masks)[0].astype(int)
    assert masks[0, y1:y2, x1:x2].sum() == masks[0].sum() and masks[0, y1].any() and masks[0, :, x2 - 1].any()
    diagonal = np.eye(5, dtype=bool)
    diagonal[0, 4] = True
    assert sorted(part.sum() for part in components(diagonal)) == [1, 5]
