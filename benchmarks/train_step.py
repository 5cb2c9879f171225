"""Seconds a training step of the paper's detector takes: ours plain, ours lean, and Detectron2's own where it is there.

    python benchmarks/train_step.py [--chip-px 256] [--precision bf16] [--levers plain exact all] [--modalities 1]
        [--arm unimodal] [--model paper] [--set KEY=VALUE] [--repeats 5] [--threads 1] [--json]

All sides run in one process on one generated sample and one set of weights, turn by turn, so that what else the machine
does meets all of them: forward, sum of the losses, backward; no optimizer, gradients held. `plain` keeps everything,
the matrices of attention too; `exact` and `all` are the levers of docs/memory.md. Detectron2's side is its own MViTv2,
FPN, RPN, cascade and mask head of the same sizes with the same weights (one modality only), left out where it cannot be
imported. On a CPU ratios are of processor seconds, which other processes disturb little; on a GPU of wall seconds.
Smaller sizes for small machines: --model mvitv2_t, --chip-px 128, --set roi.rois_per_image=64. Needs torch,
torchvision, pydantic and PyYAML only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fusion_memory import ARMS, CHANNELS, LEVERS, processor
from torch import Tensor, nn

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import MissingExtra, RtshpcError
from rtshpc.core.load import load_model
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.engine.memory.step import given_scales, sample
from rtshpc.model.detector import build_detector

TARGETS = {("all", "plain"): 1.10, ("plain", "detectron2"): 0.85}
"""Largest step time of one side over another's, for the paper model."""

Losses = Callable[[], Mapping[str, Tensor]]
"""The forward pass of a side."""


def main(arguments: Sequence[str]) -> int:
    """Time the sides and print them; exit code 1 when a target is missed."""
    given = options().parse_args(list(arguments))
    torch.set_num_threads(given.threads)
    try:
        device = torch.device("cuda" if given.device != "cpu" and torch.cuda.is_available() else "cpu")
        sides, missing = build(given, device)
    except RtshpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = timed(sides, device, given)
    clock = "wall" if device.type == "cuda" else "processor"
    medians = {name: {key: statistics.median(values) for key, values in of.items()} for name, of in times.items()}
    ratios = {
        f"{a} / {b}": medians[a][clock] / medians[b][clock]
        for a in medians
        for b in ("plain", "detectron2")
        if b in medians and a not in ("detectron2", b)
    }
    limits = {
        f"{a} / {b}": most for (a, b), most in TARGETS.items() if given.model == "paper" and f"{a} / {b}" in ratios
    }
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "setting": {key: value for key, value in vars(given).items() if key != "json"},
        "missing": missing,
        "clock": clock,
        "seconds": times,
        "median": medians,
        "ratios": ratios,
        "targets": limits,
        "met": {name: ratios[name] <= most for name, most in limits.items()},
    }
    print(json.dumps(report, indent=1, allow_nan=False) if given.json else "\n".join(lines(report)))
    return 0 if all(report["met"].values()) else 1


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS)
    parser.add_argument("--modalities", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--arm", default="unimodal", choices=ARMS)
    parser.add_argument("--model", default="paper", help="name or path of a model config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the model, all sides")
    parser.add_argument("--chip-px", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def build(given: argparse.Namespace, device: torch.device) -> tuple[dict[str, tuple[nn.Module, Losses]], str]:
    """Name -> module and forward pass of every side, and why Detectron2 is not among them (empty if it is)."""
    sides: dict[str, tuple[nn.Module, Losses]] = {}
    channels = {name: CHANNELS[name] for name in list(CHANNELS)[: given.modalities]}
    frozen, cached = given.arm in ("pretrained", "cached"), given.arm == "cached"
    size = (given.chip_px, given.chip_px)
    for levers in given.levers:
        model = load_model(given.model, [*given.set, *LEVERS[levers]])
        torch.manual_seed(0)
        detector = build_detector(model, channels, 1, frozen, cached).to(device).train()
        spec = MemorySpec(model=model, channels=channels, arm=given.arm, chip_px=given.chip_px)
        images, targets = sample(spec, device)
        if cached:
            scales = given_scales(detector, spec.model_copy(update={"precision": given.precision}), device)
            sides[levers] = (detector, partial(detector, {}, targets, [0], [size], scales))
        else:
            sides[levers] = (detector, partial(detector, images, targets, [0]))
    if given.modalities > 1:
        return sides, "it has no fusion"
    try:
        model = load_model(given.model, given.set)
        images, targets = sample(MemorySpec(model=model, channels=channels, chip_px=given.chip_px), device)
        own = detectron2(model, next(iter(sides.values()))[0]).to(device).train()
        sides["detectron2"] = (own, partial(detectron2_losses, own, images["rgb"][0], targets[0]))
    except (ImportError, MissingExtra) as error:
        return sides, str(error)
    return sides, ""


def detectron2(model: ModelConfig, ours: nn.Module) -> nn.Module:
    """Detectron2's own model of our config, with a detector's weights.

    Raises:
        ImportError: Detectron2, or a library it needs, is not there.
    """
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    from detectron2.modeling.backbone.mvit import MViT

    from rtshpc.model.detectron2_adapter import Guide, build_heads, build_rpn

    config: Any = model.backbone
    bottom_up = MViT(
        img_size=config.pretrain_px,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        last_block_indexes=config.last_blocks,
        adaptive_kv_stride=config.kv_stride,
        adaptive_window_size=config.window_px,
        residual_pooling=True,
        drop_path_rate=config.drop_path,
        out_features=("scale2", "scale3", "scale4", "scale5"),
    )
    names = [f"scale{level}" for level in range(2, 6)]
    backbone: Any = FPN(bottom_up, names, model.pyramid_channels, top_block=LastLevelMaxPool(), square_pad=0)
    # Its pooler rounds boxes to the type of the levels; ours pools in fp32 as well.
    backbone.register_forward_hook(lambda _module, _given, out: {name: level.float() for name, level in out.items()})
    heads: Any = build_heads(model, 1)
    proposals: Any = build_rpn(model, backbone)
    heads.guide = proposals.guide = Guide()
    own = GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=proposals,
        roi_heads=heads,
        pixel_mean=(0.0,) * 3,
        pixel_std=(1.0,) * 3,
    )
    own.load_state_dict(ours.state_dict())
    return own


def detectron2_losses(own: Any, image: Tensor, target: Target) -> Mapping[str, Tensor]:
    """A training step's losses; its choices are the first candidates, as ours without seeds."""
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    from rtshpc.model.detectron2_adapter import Guide
    from rtshpc.model.heads.sampling import Draw

    guide = Guide([Draw(None)], [target.ignore])
    own.proposal_generator.guide = own.roi_heads.guide = guide
    size = (int(image.shape[1]), int(image.shape[2]))
    truth = Instances(size, gt_boxes=Boxes(target.boxes), gt_classes=target.classes, gt_masks=BitMasks(target.masks))
    with EventStorage():
        return own([{"image": image, "instances": truth}])


def timed(
    sides: Mapping[str, tuple[nn.Module, Losses]], device: torch.device, given: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Name -> `wall` and `processor` seconds of every timed step; sides take turns, each round begins with another."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in sides}
    names = list(sides)
    for round_ in range(given.repeats + 1):
        for place in range(len(names)):
            name = names[(round_ + place) % len(names)]
            module, losses = sides[name]
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            wall, processor_ = step(losses, device, given.precision)
            if round_ > 0:
                times[name]["wall"].append(wall)
                times[name]["processor"].append(processor_)
        print(f"round {round_} of {given.repeats}", file=sys.stderr, flush=True)
    return times


def step(losses: Losses, device: torch.device, precision: str) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, used = time.perf_counter(), time.process_time()
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=half, enabled=precision != "fp32"):
        found = losses()
    torch.stack([value.float() for value in found.values()]).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - used


def lines(report: Mapping[str, Any]) -> list[str]:
    """The figures for people."""
    out = [f"{report['device']}, torch {report['torch']}; {report['setting']}"]
    for name, values in report["median"].items():
        out.append(f"{name:<12}{values['processor']:9.2f} processor s {values['wall']:9.2f} wall s a step")
    if report["missing"]:
        out.append(f"detectron2: left out, {report['missing']}")
    for name, ratio in report["ratios"].items():
        most = report["targets"].get(name)
        verdict = "no target" if most is None else f"at most {most:g}: {'met' if report['met'][name] else 'MISSED'}"
        out.append(f"{name:<22}{ratio:8.3f}  ({verdict})")
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
