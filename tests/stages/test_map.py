"""What the map stage sends to the detector, and what it makes of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from ideal_making import SIZE, Seen, config, ideal
from rasterio.transform import Affine

from rtshpc.core.config import RunConfig
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.scenes import Scene
from rtshpc.geo.scene import OpenScene
from rtshpc.mapping.mosaic import PlacedScene, merge
from rtshpc.mapping.pieces import read_pieces, write_pieces
from rtshpc.mapping.scenes.strips import ReadFacts
from rtshpc.mapping.scenes.survey import layout_of, survey
from rtshpc.stages.map import Detect, Found, find_pieces, ready_chips

pytestmark = pytest.mark.usefixtures("square_blocks")

HEIGHT, WIDTH = 70, 90
NODATA = -9999


def truth() -> np.ndarray:
    ids = np.zeros((HEIGHT, WIDTH), np.int16)
    ids[5:40, 10:14] = 1  # longer than a chip
    ids[5:9, 14:60] = 2  # touches it, and crosses three chips
    ids[50:52, 70:90] = 3
    ids[60:70, 0:3] = 4
    return ids


def scene_of(folder: Path, ids: np.ndarray, made: RunConfig) -> MapScene:
    path = folder / "ids.tif"
    place = {"crs": "EPSG:32608", "transform": Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 7_600_000.0), "nodata": NODATA}
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=len(ids), width=ids.shape[1], dtype="int16", **place
    ) as file:
        file.write(ids, 1)
    scene = Scene(id="ids", image=str(path))
    return MapScene(scene=scene, fingerprint="", **dict(survey([scene], made.data, made.map)[0]))


def block(scene: MapScene, made: RunConfig, number: int, detect: Detect) -> Found:
    assert scene.ground is not None
    layout = layout_of(scene.ground, made.data, made.map)
    chips = layout.blocks(made.map.block_px)[number]
    ready = ready_chips(scene, scene.ground, layout, chips, made, ReadFacts())
    return find_pieces(ready, detect, made, layout, lambda done: None)


@pytest.mark.parametrize(("block_px", "batch"), [(8192, 1), (64, 3), (64, 1)])
def test_an_ideal_detector_gives_the_truth_whatever_the_blocks_and_the_batch(
    tmp_path: Path, block_px: int, batch: int
) -> None:
    made = config(block_px=block_px, batch_size=batch)
    scene = scene_of(tmp_path, truth(), made)
    assert scene.ground is not None and scene.blocks == (1 if block_px > WIDTH else 4)
    pieces = []
    for number in reversed(range(scene.blocks)):
        write_pieces(tmp_path / f"{number}.bin", block(scene, made, number, ideal).pieces)
        pieces += read_pieces(tmp_path / f"{number}.bin")
    layout = layout_of(scene.ground, made.data, made.map)
    found = np.zeros((HEIGHT, WIDTH), np.int16)
    for one in merge([PlacedScene("ids", 0, 0, layout, pieces)]):
        number = round((one.score - 0.5) * 100)
        assert not found[one.row :, one.col :][: one.mask.shape[0], : one.mask.shape[1]][one.mask].any()
        found[one.row : one.row + one.mask.shape[0], one.col : one.col + one.mask.shape[1]][one.mask] = number
    np.testing.assert_array_equal(found, truth())


def test_chips_of_nodata_alone_are_not_sent_to_the_detector_and_valid_pixels_are_counted_once(tmp_path: Path) -> None:
    made, ids = config(), truth()
    ids[:, 40:] = NODATA
    sent = []

    def detect(images: dict[str, torch.Tensor]) -> list[Any]:
        sent.append(len(images["ids"]))
        return ideal(images)

    found = block(scene_of(tmp_path, ids, made), made, 0, detect)
    assert (sum(sent), found.mapped, found.empty) == (6, 6, 6)
    assert found.valid_px == HEIGHT * 40


def test_detections_below_the_threshold_and_what_lies_beyond_the_scene_are_no_pieces(tmp_path: Path) -> None:
    made = config(score_threshold=0.525)
    ids = truth()[:20, :20]

    def detect(images: dict[str, torch.Tensor]) -> list[Any]:
        everything = np.full((SIZE, SIZE), 3)
        everything[0, 0] = 1
        return [Seen(everything, (1, 3))]

    found = block(scene_of(tmp_path, ids, made), made, 0, detect)
    assert [(one.mask.shape, one.mask.sum(), one.score) for one in found.pieces] == [
        ((20, 20), 399, pytest.approx(0.53))
    ]


def test_a_block_looks_at_no_more_of_its_scene_than_it_takes_to_find_something_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    part = OpenScene.part

    def counted(self: OpenScene, row: int, col: int, height: int, width: int) -> Any:
        looked.append(height * width)
        return part(self, row, col, height, width)

    monkeypatch.setattr("rtshpc.geo.scene._FEWEST_BLOCK", 8)
    monkeypatch.setattr(OpenScene, "part", counted)
    made = config(block_px=64)
    made = made.model_copy(update={"data": made.data.model_copy(update={"min_valid_fraction": 0.9})})
    scene = scene_of(tmp_path, truth(), made)
    for number in range(scene.blocks):
        block(scene, made, number, ideal)
    assert scene.blocks == 4 and sum(px <= 8 * 8 for px in looked) == 4
