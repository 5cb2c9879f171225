from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from rtshpc.core.errors import DataError, RunError
from rtshpc.core.grid import cells, finished
from rtshpc.core.load import write_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, read_json
from rtshpc.engine import checkpoint
from rtshpc.engine.scoring import ImageResult, Regions
from rtshpc.stages import evaluate

from .conftest import TRAINING, cell_of, small_config

Train = Callable[..., dict[str, Any]]


def test_a_trained_cell_is_scored_stored_and_drawn(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1}, evaluate={"gallery": 3, "size_edges_m2": [2000, 5000]})
    for modality in ("rgb", "ndvi"):
        train(cell_of(config, "pretrain", modality))
    tuned = cell_of(config, "finetune")
    train(tuned)
    cell = next(c for c in _evaluations(config) if c.needs[0] == tuned.id)
    results = evaluate.run(cell, paths, SILENT)
    json.dumps(results, allow_nan=False)
    chips = [chip for chip in read_json(paths.index)["chips"] if chip["split"] == "test"]
    assert results["images"] == len(chips) and results["instances"] == sum(chip["instances"] for chip in chips)
    assert results["trained"] == tuned.id and results["mixer"] == "cross" and results["residual"] is True
    assert results["modalities"] == ["rgb", "ndvi"] and results["arm"] == "pretrained"
    for kind in ("mask", "box"):
        assert set(results[kind]) == {"AP", "AP50", "AP75", "AR", "AR_small", "AR_medium", "AR_large"}
    assert set(results["per_site"]) == {"north", "south"}
    assert sum(site["instances"] for site in results["per_site"].values()) == results["instances"]
    own = paths.cell(cell.id)
    assert len(results["gallery"]) == 3
    for name in results["gallery"]:
        assert (own.root / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    coco = COCO(str(own.root / results["predictions"]))
    assert sorted(image["file_name"] for image in coco.dataset["images"]) == sorted(chip["id"] for chip in chips)
    assert all(annotation["geo"]["geometry"]["coordinates"] for annotation in coco.dataset["annotations"])


def test_one_modality_has_no_mixer_and_scoring_twice_gives_the_same(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1})
    trained = cell_of(config, "pretrain", "rgb")
    train(trained)
    cell = next(c for c in _evaluations(config) if c.needs[0] == trained.id)
    first, second = (evaluate.run(cell, paths, SILENT) for _ in range(2))
    assert first == second and first["mixer"] is None and first["residual"] is None


def test_a_checkpoint_that_is_not_the_recorded_one_is_not_scored(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1})
    trained = cell_of(config, "pretrain", "rgb")
    train(trained)
    best = paths.cell(trained.id).best_checkpoint
    checkpoint.save(best, {**checkpoint.load(best), "epoch": 5})
    cell = next(c for c in _evaluations(config) if c.needs[0] == trained.id)
    write_cell(paths.cell(cell.id).config, cell)
    assert finished(trained, paths) is not None
    with pytest.raises(RunError, match="the record says"):
        evaluate.run(cell, paths, SILENT)
    # It is undone now, and its training does not take the damaged file for its best.
    assert finished(trained, paths) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(trained)
    assert evaluate.run(cell, paths, SILENT)["trained"] == trained.id


@pytest.mark.parametrize("stage", ["pretrain", "features", "finetune", "evaluate"])
def test_a_shard_altered_after_preprocess_is_not_used_and_its_cells_are_undone(
    shards: Path, tmp_path: Path, stage: str
) -> None:
    paths = RunPaths(tmp_path / "run")
    shutil.copytree(shards, paths.root)
    fused = {"modalities": ["rgb", "ndvi"], "primary": "rgb", "features": "cached", "augment": {}}
    config = small_config(finetune={**TRAINING, **fused})
    cell = cell_of(config, stage)
    for need in cells(config, "f"):
        write_cell(paths.cell(need.id).config, need)
    made = [one for one in cells(config, "f") if one.stage in ("preprocess", "gather")]
    assert all(finished(one, paths) for one in made)
    shard = paths.shard(0, 0)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"removed: {shard.name}; run the sweep again"):
        importlib.import_module(f"rtshpc.stages.{stage}").run(cell, paths, SILENT)
    assert not any(finished(one, paths) for one in made)


def test_the_gallery_takes_rich_chips_of_every_site_in_turn() -> None:
    def image(id: str, site: str, instances: int) -> ImageResult:
        nothing = Regions(np.zeros((instances, 4), np.float32), np.zeros(instances, np.int64), [])
        return ImageResult(id, "s", site, (4, 4), 1.0, nothing, nothing, nothing)

    images = [image("a", "north", 9), image("b", "north", 8), image("c", "south", 1), image("d", "south", 2)]
    assert [images[n].id for n in evaluate.chosen_rows(images, 3)] == ["a", "d", "b"]


def _evaluations(config: Any) -> list[Any]:
    from rtshpc.core.grid import cells

    return [cell for cell in cells(config, "f") if cell.stage == "evaluate"]
