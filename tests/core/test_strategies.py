"""The paper's comparison as one grid: strategies, and detectors by name."""

from __future__ import annotations

from collections import Counter

import pytest

from rtshpc.core.cell import Cell
from rtshpc.core.errors import ConfigError
from rtshpc.core.grid import cells
from rtshpc.core.load import load_run


def _cells(stage: str, name: str, *sets: str) -> list[Cell]:
    return [cell for cell in cells(load_run(name, sets), "f" * 64) if cell.stage == stage]


def test_seven_strategies_two_sets_and_two_arms_are_26_cells_because_early_fusion_has_one_form() -> None:
    found = _cells("finetune", "strategies")
    assert len(found) == 26
    counts = Counter((cell.config.model.fusion.mixer, cell.config.model.fusion.residual) for cell in found)
    assert counts.pop(("early", False)) == 2 and set(counts.values()) == {4} and len(counts) == 6
    early = [cell for cell in found if cell.config.model.fusion.early]
    assert [cell.label for cell in early] == ["finetune rgb+ndvi early full", "finetune rgb+ndvi+nir early full"]
    for cell in early:
        assert cell.arm == cell.config.finetune.backbones == "full" and not cell.backbones and len(cell.needs) == 1
        assert cell.varied["finetune.backbones"] == "full" and cell.varied["model.fusion.residual"] is False


def test_a_sweep_of_early_fusion_alone_measures_no_frozen_arm() -> None:
    found = _cells("measure", "demo", "model.fusion.mixer=early")
    assert {cell.arm for cell in found} == {"unimodal", "full"}


def test_detectors_are_a_value_of_the_grid_and_each_is_pretrained_of_its_own() -> None:
    sets = ("grid={model: [tiny, mask_rcnn_r50], finetune.backbones: [pretrained, full]}",)
    tuned, pretrained = _cells("finetune", "demo", *sets), _cells("pretrain", "demo", *sets)
    assert len(tuned) == 4 and len(pretrained) == 6 and len(_cells("measure", "demo", *sets)) == 6
    kinds = {cell.id: cell.config.model.backbone.kind for cell in pretrained}
    for cell in tuned:
        assert cell.varied["model"] == cell.config.model.name
        assert {kinds[id] for id in cell.backbones.values()} <= {cell.config.model.backbone.kind}
    assert {cell.id for cell in _cells("pretrain", "demo")} < set(kinds)
    assert {cell.label for cell in pretrained} >= {'pretrain rgb model="Mask R-CNN, ResNet-50"'}


def test_a_key_of_the_grid_overrides_the_detector_it_names() -> None:
    found = _cells("finetune", "demo", "grid={model.roi.mask: [false], model: [tiny]}")
    assert [cell.config.model.roi.mask for cell in found] == [False]


def test_an_unknown_detector_in_a_grid_is_named_with_a_guess() -> None:
    with pytest.raises(ConfigError, match='Did you mean "tiny"'):
        load_run("demo", ["grid={model: [tinny]}"])
