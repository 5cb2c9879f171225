"""The reference numbers, and the tiny models they belong to (see README.md beside this file)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rtshpc.core.config import ModelConfig
from rtshpc.data.sample import Target
from rtshpc.model.detector import Detector, build_detector
from rtshpc.model.heads.box import RoIs
from rtshpc.model.weights import load_strict

HERE = Path(__file__).parent
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
KINDS = ("cascade_mvit", "maskrcnn_resnet")
Levers = tuple[tuple[str, str, Any], ...]
CASES = {"A": (8192, 512), "B": (64, 16), "C": (8192, 512)}
"""Case -> anchors and RoIs sampled an image; in C the second image has no ground truth."""


def read(name: str) -> dict[str, Tensor]:
    return load_file(HERE / f"{name}.safetensors")


def tiny(kind: str, anchors: int = 256, rois: int = 512, levers: Levers = ()) -> ModelConfig:
    """The config of a reference model, with (section, field, value) of some levers."""
    rpn: dict[str, Any] = {"anchor_sizes": (8, 16, 32, 64, 128), "anchors_per_image": anchors}
    rpn |= {"pre_nms_train": 200, "pre_nms_test": 100, "post_nms_train": 150, "post_nms_test": 40}
    roi: dict[str, Any] = {"fc_dim": 16, "mask_convs": 2, "detections_per_image": 12, "rois_per_image": rois}
    if kind == "cascade_mvit":
        backbone: dict[str, Any] = {"kind": "mvit", "embed_dim": 16, "depth": 6, "last_blocks": (0, 2, 4, 5)}
        backbone |= {"window_px": 16, "pretrain_px": 64, "drop_path": 0.0}
        roi |= {"box_convs": 2}
    else:
        backbone = {"kind": "resnet", "blocks": (2, 2, 2, 2), "stem_channels": 8}
        backbone |= {"channels": (16, 32, 64, 96), "bottleneck": (8, 16, 32, 48)}
        rpn |= {"convs": 1}
        roi |= {"kind": "standard", "ious": (0.5,), "box_convs": 0, "box_fcs": 2, "norm": "none"}
    values = {"name": kind, "backbone": backbone, "pyramid_channels": 32, "rpn": rpn, "roi": roi}
    for section, field, value in levers:
        values[section][field] = value
    return ModelConfig.model_validate(values)


def detector(kind: str, **sizes: Any) -> Detector:
    model = build_detector(tiny(kind, **sizes), {"rgb": 3}, classes=2)
    load_strict(model, read(f"{kind}.weights"), kind)
    return model


@dataclass(frozen=True)
class Inputs:
    images: Tensor
    sizes: list[tuple[int, int]]
    wanted: list[tuple[int, int]]
    targets: list[Target]


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    """The two images, normalised and then padded, and their ground truth."""
    raw = read("inputs")
    images = torch.zeros(2, 3, 96, 128)
    sizes, targets = [], []
    for n in range(2):
        x = (raw[f"image.{n}"].float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        images[n, :, : x.shape[1], : x.shape[2]] = x
        sizes.append((x.shape[1], x.shape[2]))
        boxes, classes, masks = (raw[f"gt.{n}.{part}"] for part in ("boxes", "classes", "masks"))
        targets.append(Target(boxes, classes, masks.bool(), torch.zeros(sizes[-1], dtype=torch.bool)))
    return Inputs(images, sizes, [tuple(raw[f"out_size.{n}"].tolist()) for n in range(2)], targets)


@pytest.fixture(scope="session")
def inferred(inputs: Inputs) -> Callable[[str], dict[str, Tensor]]:
    """Kind of model -> every intermediate of inference under the reference's names."""
    done: dict[str, dict[str, Tensor]] = {}

    def of(kind: str) -> dict[str, Tensor]:
        if kind not in done:
            done[kind] = infer(kind, inputs)
        return done[kind]

    return of


@torch.no_grad()
def infer(kind: str, inputs: Inputs, levers: Levers = ()) -> dict[str, Tensor]:
    """Every intermediate of inference, and the final instances, under the reference's names."""
    model = detector(kind, levers=levers).eval()
    found: dict[str, Tensor] = {"input.normalised_padded": model.prepare({"rgb": inputs.images})[0]["rgb"]}
    scales = model.backbone.scales({"rgb": inputs.images}, {})
    for level, scale in enumerate(scales["rgb"], start=2):
        found[f"backbone.{'scale' if kind == 'cascade_mvit' else 'res'}{level}"] = scale
    levels = model.backbone.levels(scales)
    logits, deltas = model.proposal_generator.rpn_head(levels)
    for i, anchors in enumerate(model.proposal_generator.anchors(levels)):
        found |= {f"fpn.p{i + 2}": levels[i], f"rpn.anchors.{i}": anchors}
        found |= {f"rpn.logits.{i}": logits[i], f"rpn.deltas.{i}": deltas[i]}
    _watch(model, found)
    for n, (boxes, scores) in enumerate(model.proposal_generator(levels, inputs.sizes)[0]):
        found |= {f"proposals.{n}.boxes": boxes, f"proposals.{n}.logits": scores}
    for n, made in enumerate(model({"rgb": inputs.images}, sizes=inputs.sizes)):
        found |= {f"det.{n}.boxes": made.boxes_N4, f"det.{n}.scores": made.scores_N}
        found |= {f"det.{n}.classes": made.classes_N, f"det.{n}.mask_probs": made.mask_probs_NHW}
        place = (*inputs.wanted[n], *inputs.sizes[n])
        masks = made.masks(*place)
        found[f"final.{n}.boxes"] = made.scaled_boxes(*place)
        found[f"final.{n}.masks_packbits"] = torch.from_numpy(np.packbits(masks.numpy(), axis=-1))
        found[f"final.{n}.mask_area"] = masks.sum((1, 2))
    return found


def _watch(model: Detector, found: dict[str, Tensor]) -> None:
    """Keep the outputs of blocks and of the box predictors."""
    for i, block in enumerate(getattr(model.backbone.backbones()["rgb"], "blocks", ())):
        block.register_forward_hook(lambda _m, _a, out, i=i: found.update({f"block.{i}": out}))
    predictor = model.roi_heads.box_predictor
    for i, stage in enumerate(predictor if isinstance(predictor, torch.nn.ModuleList) else [predictor]):
        stage.register_forward_hook(
            lambda _m, _a, out, i=i: found.update({f"roi.stage{i}.cls_logits": out[0], f"roi.stage{i}.deltas": out[1]})
        )


@dataclass(frozen=True)
class Trained:
    model: Detector
    losses: dict[str, Tensor]
    proposals: list[Tensor]
    sampled: list[RoIs]


@pytest.fixture(scope="session")
def trained(inputs: Inputs) -> Callable[[str, str], Trained]:
    """Kind of model and case -> one training step: losses, samples, gradients and buffers after it."""
    done: dict[tuple[str, str], Trained] = {}

    def of(kind: str, case: str) -> Trained:
        if (kind, case) not in done:
            done[kind, case] = train(kind, case, inputs)
        return done[kind, case]

    return of


def train(kind: str, case: str, inputs: Inputs, levers: Levers = ()) -> Trained:
    """One training step of a case."""
    anchors, rois = CASES[case]
    model = detector(kind, anchors=anchors, rois=rois, levers=levers).train()
    proposals: list[Tensor] = []
    sampled: list[RoIs] = []
    model.proposal_generator.register_forward_hook(lambda _m, _a, out: proposals.extend(b for b, _ in out[0]))
    sample = model.roi_heads.sample

    def keep(*arguments: Any) -> RoIs:
        sampled.append(sample(*arguments))
        return sampled[-1]

    model.roi_heads.sample = keep  # type: ignore[method-assign]
    first, second = inputs.targets
    if case == "C":
        second = Target(second.boxes[:0], second.classes[:0], second.masks[:0], second.ignore)
    losses = model({"rgb": inputs.images}, [first, second], None, inputs.sizes)
    sum(losses.values()).backward()
    return Trained(model, {name: loss.detach() for name, loss in losses.items()}, proposals, sampled)
