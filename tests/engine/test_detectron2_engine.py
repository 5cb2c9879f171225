"""The stages train and score a detector of `model.engine: detectron2` as they do ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtshpc.core.config import RunConfig
from rtshpc.core.grid import cells
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, read_lines
from rtshpc.engine.detectors import fresh, read_trained, trained
from rtshpc.model.weights import load_strict
from rtshpc.stages import evaluate

from .conftest import cell_of, small_config

Train = Callable[..., dict[str, Any]]


def _with_engine(engine: str, **finetune: Any) -> RunConfig:
    config = small_config({"epochs": 1})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"engine": engine}),
            "finetune": config.finetune.model_copy(update=finetune),
        }
    )


@pytest.fixture(autouse=True)
def _detectron2() -> None:
    pytest.importorskip("detectron2", reason="needs Detectron2, built from its source (docs/detectron2.md)")


@pytest.mark.slow
def test_pretraining_fusion_and_scoring_run_and_repeat_to_the_byte(
    paths: RunPaths, train: Train, tmp_path: Any
) -> None:
    config = _with_engine("detectron2")
    results = [train(cell_of(config, "pretrain", modality)) for modality in ("rgb", "ndvi")]
    results += [
        train(cell_of(config, "finetune")),
        train(cell_of(_with_engine("detectron2", backbones="full"), "finetune")),
    ]
    first = cell_of(config, "pretrain", "rgb")
    again = RunPaths(tmp_path / "again")
    again.create()
    again.shards.rmdir()
    again.shards.symlink_to(paths.shards)
    assert train(first, again)["checkpoint_sha256"] == results[0]["checkpoint_sha256"]
    for cell in cells(config, "f"):
        if cell.stage == "evaluate":
            scored = evaluate.run(cell, paths, SILENT)
            assert scored["images"] > 0 and scored["mask"]["AP50"] is not None
    assert results[2]["parameters"]["trainable"] < results[3]["parameters"]["trainable"]
    assert results[2]["parameters"]["total"] == results[3]["parameters"]["total"]


def test_training_starts_as_ours_does_from_the_same_start(paths: RunPaths, train: Train) -> None:
    ours, theirs = (cell_of(_with_engine(engine), "pretrain", "rgb") for engine in ("native", "detectron2"))
    start, other = fresh(ours).state_dict(), fresh(theirs).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in start.items())
    for cell in (ours, theirs):
        train(cell)
    rows = [
        [row for row in read_lines(paths.cell(cell.id).metrics) if row["kind"] == "train"] for cell in (ours, theirs)
    ]
    assert len(rows[0]) == len(rows[1]) > 2
    # Gradients differ by rounding, which every further step multiplies.
    for one, other in list(zip(*rows, strict=True))[:2]:
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_checkpoint_of_detectron2_is_read_by_ours(paths: RunPaths, train: Train) -> None:
    cell = cell_of(_with_engine("detectron2"), "pretrain", "rgb")
    train(cell)
    native = fresh(cell_of(_with_engine("native"), "pretrain", "rgb")).eval()
    load_strict(native, read_trained(paths, cell.id)["model"], "detectron2")
    images = {"rgb": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    with torch.inference_mode():
        found, other = native(images)[0], trained(cell, paths)(images)[0]
    assert len(found) == len(other) > 0
    torch.testing.assert_close(found.boxes_N4, other.boxes_N4, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores_N, other.scores_N, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_it_and_its_batch_norms_see_both(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1, "processes": 2}, {"roi": {"norm": "bn"}})
    config = config.model_copy(update={"model": config.model.model_copy(update={"engine": "detectron2"})})
    cell = cell_of(config, "pretrain", "rgb")
    assert train(cell)["final_loss"] > 0
    alone = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"processes": 1})})
    one = cell_of(alone, "pretrain", "rgb")
    train(one)
    name = "roi_heads.mask_head.mask_fcn1.norm.running_mean"
    found, other = (read_trained(paths, id)["model"][name] for id in (cell.id, one.id))
    # Two plain batch norms would each keep the mean of half of the chips.
    assert float((found - other).norm()) <= 0.05 * float(other.norm())
