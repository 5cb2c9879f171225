"""Frozen means free: frozen backbones cost no gradient, no optimizer state, no traffic and no place in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT
from rtshpc.engine import checkpoint, loop
from rtshpc.engine.detectors import on_backbones
from rtshpc.engine.distributed import Group
from rtshpc.model.detector import Detector
from rtshpc.model.weights import trainable_state
from rtshpc.stages import pretrain

from .conftest import MODEL, TRAINING, cell_of, finish, small_config

RESNET = {
    "kind": "resnet",
    "blocks": [1, 1, 1, 1],
    "stem_channels": 8,
    "channels": [8, 16, 24, 32],
    "bottleneck": [8, 8, 8, 8],
}


def _pretrained(paths: RunPaths, backbone: dict[str, Any]) -> Cell:
    """A fusion cell of one epoch whose backbones are pretrained."""
    training = {**TRAINING, "epochs": 1}
    config = small_config(training)
    model = type(config.model).model_validate({**MODEL, "backbone": backbone})
    config = config.model_copy(update={"model": model})
    for name in ("rgb", "ndvi"):
        cell = cell_of(config, "pretrain", name)
        finish(cell, paths, pretrain.run(cell, paths, SILENT))
    return cell_of(config, "finetune")


class _Watched:
    """Builds the cell's detector, keeps it, and notes how its backbones run."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, bool, bool]] = []
        self.before: dict[str, torch.Tensor] = {}

    def __call__(self, cell: Cell, paths: RunPaths) -> Detector:
        self.detector = on_backbones(cell, paths)
        self.before = {name: tensor.clone() for name, tensor in self._tensors().items()}
        for backbone in self.detector.backbone.backbones().values():
            backbone.register_forward_hook(self._note)
        return self.detector

    def _note(self, module: nn.Module, given: Any, scales: tuple[torch.Tensor, ...]) -> None:
        parts = any(part.training for part in module.modules())
        self.calls.append((parts, torch.is_grad_enabled(), any(scale.requires_grad for scale in scales)))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.detector.state_dict().items() if "bottom_up" in name}

    def changed(self) -> list[str]:
        return [name for name, tensor in self._tensors().items() if not torch.equal(tensor, self.before[name])]


@pytest.mark.parametrize("backbone", [MODEL["backbone"], RESNET], ids=["mvit", "resnet"])
def test_after_an_epoch_frozen_backbones_have_no_gradient_and_the_same_bytes(
    paths: RunPaths, backbone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = _pretrained(paths, backbone)
    watched = _Watched()
    kept: list[torch.optim.Optimizer] = []
    build = loop.optim.build_optimizer
    monkeypatch.setattr(loop.optim, "build_optimizer", lambda *given: kept.append(build(*given)) or kept[0])
    loop.fit(cell, paths, watched)
    frozen = [p for one in watched.detector.backbone.backbones().values() for p in one.parameters()]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert watched.before and watched.changed() == []
    assert watched.calls and set(watched.calls) == {(False, False, False)}
    # The rest did train: else all of the above would be true of a training that does nothing.
    rest = [p for p in watched.detector.parameters() if p.requires_grad]
    assert any(p.grad is not None and bool(p.grad.any()) for p in rest)
    held = {id(p) for group in kept[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in rest} and {id(p) for p in kept[0].state} <= held
    last = checkpoint.load(paths.cell(cell.id).last_checkpoint)
    assert len(last["optimizer"]["state"]) == len(kept[0].state)
    best = checkpoint.load(paths.cell(cell.id).best_checkpoint)
    assert last["model"].keys() == best["model"].keys() == trainable_state(watched.detector).keys()
    assert not [name for name in last["model"] if "bottom_up" in name]
    assert set(best["backbones"]) == {"rgb", "ndvi"} and all(len(s["sha256"]) == 64 for s in best["backbones"].values())


def test_frozen_tensors_are_no_part_of_the_distributed_model(tmp_path: Path) -> None:
    detector = Detector(type(small_config().model).model_validate(MODEL), {"rgb": 3, "ndvi": 1}, 1, frozen=True)
    frozen = detector.state_dict().keys() - trainable_state(detector).keys()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = Group(0, 2, torch.device("cpu")).wrap(detector, frozen)
        ignored = wrapped.parameters_to_ignore
        sent = {id(parameter) for parameter in wrapped._module_parameters}
    finally:
        dist.destroy_process_group()
    assert frozen and set(ignored) == set(frozen) and all("bottom_up" in name for name in ignored)
    assert sent == {id(p) for name, p in detector.named_parameters() if "bottom_up" not in name}
