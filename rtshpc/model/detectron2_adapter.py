"""Our backbones and fusion inside Detectron2's GeneralizedRCNN, with its proposals, heads and losses.

Only this module imports Detectron2, and only `model.engines` imports this module. Weights have the same names in both
engines, so a checkpoint of one fits the other. Detectron2's interfaces have no place for two things of ours, which
`Guide` brings to where it labels and samples:

- its random choices come from torch's global generator: while it draws for an image, that generator stands where the
  image's own draws stand (`rng_of`), and is put back afterwards. On a CPU it then chooses what ours chooses.
- ignored ground (`Target.ignore`): background candidates that lie there are not sampled, as with ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtshpc.core.config import ModelConfig, RoIConfig
from rtshpc.core.errors import MissingExtra, RunError
from rtshpc.model.detections import Detections
from rtshpc.model.detector import DIVISOR, Detector, fresh_heads
from rtshpc.model.heads import box, mask
from rtshpc.model.heads.anchors import STRIDES
from rtshpc.model.heads.pooling import FIRST, LAST
from rtshpc.model.heads.sampling import Draw, in_ignored
from rtshpc.model.heads.standard import CODERS
from rtshpc.model.pyramid import Pyramid

if TYPE_CHECKING:
    from rtshpc.data.sample import Target

try:
    from detectron2.layers import ShapeSpec
    from detectron2.layers.batch_norm import NaiveSyncBatchNorm
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.backbone import Backbone
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN
    from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
    from detectron2.modeling.roi_heads import (
        CascadeROIHeads,
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
        MaskRCNNConvUpsampleHead,
        StandardROIHeads,
    )
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage
except ImportError as error:
    raise MissingExtra(
        f'model.engine = "detectron2": Detectron2 cannot be imported ({error}); build it as docs/detectron2.md says'
    ) from None

LEVELS = [f"p{level}" for level in range(2, 2 + len(STRIDES))]
POOLED_LEVELS = LEVELS[: LAST - FIRST + 1]


@dataclass
class Guide:
    """What one training step tells Detectron2 about each image.

    Attributes:
        draws: each image's random choices.
        ignored: (H, W) bool of each image.
    """

    draws: Sequence[Draw] = ()
    ignored: Sequence[Tensor] = ()

    def turns(self, boxes: Sequence[Tensor]) -> Iterator[tuple[Draw, Tensor]]:
        """For each image its draws, and which of its candidate boxes (N, 4) lie on ignored ground, (N,) bool."""
        for draw, ignore, candidates in zip(self.draws, self.ignored, boxes, strict=True):
            yield draw, in_ignored(candidates, ignore)


@contextmanager
def rng_of(draw: Draw, device: torch.device) -> Iterator[None]:
    """Torch's generators go on from `draw` inside, and are afterwards as they were; `draw` has moved on.

    Without a seed nothing is done: Detectron2 then draws as it does by itself.
    """
    if draw.generator is None:
        yield
        return
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        if cuda:
            # Permutations on a GPU come from its own generator, whose sequence differs from the CPU's.
            seed = int(torch.randint(2**62, (), generator=draw.generator))
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        torch.set_rng_state(draw.generator.get_state())
        yield
        draw.generator.set_state(torch.get_rng_state())


class PyramidBackbone(Pyramid, Backbone):
    """Our backbones, fusion and pyramid as Detectron2 sees a backbone: an image of all bands to p2 to p6."""

    def __init__(self, model: ModelConfig, channels: Mapping[str, int], frozen: bool, cached: bool) -> None:
        super().__init__(model, channels, frozen, cached)
        self.entering = {name: 3 if bands == 1 and not self.early else bands for name, bands in channels.items()}
        self.width = model.pyramid_channels
        self._drops: Mapping[str, Tensor | None] = {}
        self._scales: Mapping[str, Any] | None = None

    @contextmanager
    def given(self, drops: Mapping[str, Tensor | None], scales: Mapping[str, Any] | None) -> Iterator[None]:
        """The next pass drops paths by `drops`, and takes `scales` (if any) in place of those of its image."""
        self._drops, self._scales = drops, scales
        try:
            yield
        finally:
            self._drops, self._scales = {}, None

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """(B, all bands, H, W), padded, to the levels by name, fp32.

        Also under autocast: Detectron2's pooler rounds boxes to the type of the levels, which in bf16 is 1 px at 256.
        """
        if self._scales is not None:
            levels = self.levels(self._scales)
        else:
            images = dict(zip(self.entering, x.split(list(self.entering.values()), dim=1), strict=True))
            levels = super().forward(images, self._drops)
        return {name: level.float() for name, level in zip(LEVELS, levels, strict=True)}

    @property
    def size_divisibility(self) -> int:
        return DIVISOR

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        shapes = zip(LEVELS, STRIDES, strict=True)
        return {name: ShapeSpec(channels=self.width, stride=stride) for name, stride in shapes}


class GuidedRPN(RPN):
    """Detectron2's RPN, told of draws and ignored ground by `guide`."""

    guide: Guide

    def label_and_sample_anchors(self, anchors: Any, gt_instances: Any) -> Any:
        """As Detectron2's."""
        boxes = Boxes.cat(anchors).tensor
        self._turns = self.guide.turns([boxes] * len(gt_instances))
        return super().label_and_sample_anchors(anchors, gt_instances)

    def _subsample_labels(self, label: Tensor) -> Tensor:
        draw, ignored = next(self._turns)
        label[(label == 0) & ignored] = -1
        with rng_of(draw, label.device):
            return super()._subsample_labels(label)


class GuidedHeads(StandardROIHeads):
    """Detectron2's standard heads, told of draws and ignored ground by `guide`."""

    guide: Guide

    def label_and_sample_proposals(self, proposals: Any, targets: Any) -> Any:
        """As Detectron2's, which appends the ground truth to the proposals."""
        pairs = zip(proposals, targets, strict=True)
        self._turns = self.guide.turns([torch.cat((p.proposal_boxes.tensor, t.gt_boxes.tensor)) for p, t in pairs])
        return super().label_and_sample_proposals(proposals, targets)

    def _sample_proposals(self, matched: Tensor, labels: Tensor, gt_classes: Tensor) -> Any:
        draw, ignored = next(self._turns)
        labels[(labels == 0) & ignored] = -1
        if len(gt_classes) == 0:
            # Without ground truth Detectron2 does not look at labels; nothing is matched to this one.
            gt_classes = gt_classes.new_zeros(1)
        with rng_of(draw, labels.device):
            return super()._sample_proposals(matched, labels, gt_classes)


class GuidedCascade(GuidedHeads, CascadeROIHeads):
    """Detectron2's cascade, told the same; a background box on ignored ground leaves it at the stage it got there."""

    def _match_and_label_boxes(self, proposals: Any, stage: int, targets: Any) -> Any:
        found = super()._match_and_label_boxes(proposals, stage, targets)
        kept: list[Instances] = []
        for one, ignore in zip(found, self.guide.ignored, strict=True):
            left_out = (one.gt_classes == self.num_classes) & in_ignored(one.proposal_boxes.tensor, ignore)
            kept.append(one[~left_out])
        return kept


class Detectron2Detector(Detector, GeneralizedRCNN):
    """`Detector` with Detectron2's GeneralizedRCNN behind its door.

    Fresh weights are those that ours would draw. Without seeds, training draws from torch's global generator, as
    Detectron2 does by itself.
    """

    own_batch_norm_sync = True

    def __init__(
        self,
        model: ModelConfig,
        channels: Mapping[str, int],
        classes: int,
        frozen: bool = False,
        cached: bool = False,
    ) -> None:
        # Not Detector's, which would build our heads; the modules of both have the same names.
        backbone = PyramidBackbone(model, channels, frozen, cached)
        start = start_of_ours(model, classes)
        bands = sum(backbone.entering.values())
        with torch.random.fork_rng([]):
            GeneralizedRCNN.__init__(
                self,
                backbone=backbone,
                proposal_generator=build_rpn(model, backbone),
                roi_heads=build_heads(model, classes),
                pixel_mean=(0.0,) * bands,  # images come normalised
                pixel_std=(1.0,) * bands,
            )
        for part, weights in start.items():
            self.get_submodule(part).load_state_dict(weights)
        self._note(model, channels, classes, frozen)
        self.guide = Guide()
        self.proposal_generator.guide = self.roi_heads.guide = self.guide

    def detect(
        self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], scales: Mapping[str, Any] | None
    ) -> list[Detections]:
        """Instances of prepared images (or of their backbone scales)."""
        with self.backbone.given({}, scales):
            return [_detections(found) for found in self.inference(self._batch(inputs, sizes), do_postprocess=False)]

    def losses(
        self,
        inputs: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        scales: Mapping[str, Any] | None,
        targets: Sequence[Target],
        draws: Sequence[Draw],
        drops: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """Detectron2's losses of prepared images (or of their backbone scales).

        Raises:
            RunError: what the network predicts is not finite.
        """
        self.guide.draws, self.guide.ignored = draws, [target.ignore for target in targets]
        batch = self._batch(inputs, sizes)
        for entry, target, size in zip(batch, targets, sizes, strict=True):
            entry["instances"] = _instances(target, size)
        try:
            # Detectron2 notes figures of its own in a storage; ours are the losses, so it ends with the step.
            with self.backbone.given(drops, scales), EventStorage():
                return GeneralizedRCNN.forward(self, batch)
        except FloatingPointError as error:
            raise RunError(f"Detectron2: {error}; try a lower learning_rate, a longer warmup_steps or fp32") from None

    def counted(self) -> dict[str, int]:
        """Unknown: Detectron2's heads do not tell."""
        return {}

    def _batch(self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Images one by one without padding, all bands of all modalities in one (nothing where scales are given)."""
        if not inputs:
            return [{"image": self.pixel_mean.expand(-1, *size)} for size in sizes]
        whole = torch.cat([inputs[name] for name in self.modalities], dim=1)
        return [{"image": image[:, :height, :width]} for image, (height, width) in zip(whole, sizes, strict=True)]


def _instances(target: Target, size: tuple[int, int]) -> Instances:
    masks = BitMasks(target.masks)
    return Instances(size, gt_boxes=Boxes(target.boxes), gt_classes=target.classes, gt_masks=masks)


def _detections(found: Instances) -> Detections:
    masks = found.pred_masks[:, 0].float() if found.has("pred_masks") else None
    return Detections(found.pred_boxes.tensor, found.scores.float(), found.pred_classes, masks)


def start_of_ours(model: ModelConfig, classes: int) -> dict[str, dict[str, Tensor]]:
    """The weights that our proposals and heads would draw next: one seed starts both engines alike.

    Detectron2 draws from the same distributions in another order.
    """
    proposals, heads = fresh_heads(model, classes)
    return {"proposal_generator": proposals.state_dict(), "roi_heads": heads.state_dict()}


def build_rpn(model: ModelConfig, backbone: PyramidBackbone) -> GuidedRPN:
    """Detectron2's RPN of our config; its constants are those of its MViTv2 configs."""
    config = model.rpn
    anchors = DefaultAnchorGenerator(
        sizes=[[size] for size in config.anchor_sizes],
        aspect_ratios=config.aspect_ratios,
        strides=[backbone.output_shape()[name].stride for name in LEVELS],
        offset=0.0,
    )
    return GuidedRPN(
        in_features=LEVELS,
        head=StandardRPNHead(
            in_channels=model.pyramid_channels,
            num_anchors=len(config.aspect_ratios),
            conv_dims=[-1] * config.convs,
        ),
        anchor_generator=anchors,
        anchor_matcher=Matcher(list(config.iou), [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=config.anchors_per_image,
        positive_fraction=config.positive_fraction,
        pre_nms_topk=(config.pre_nms_train, config.pre_nms_test),
        post_nms_topk=(config.post_nms_train, config.post_nms_test),
        nms_thresh=config.nms_iou,
    )


def build_heads(model: ModelConfig, classes: int) -> GuidedHeads:
    """Detectron2's cascade or standard heads of our config, with or without its mask head."""
    config, channels = model.roi, model.pyramid_channels
    cascade = config.kind == "cascade"
    branches: dict[str, Any] = {"num_classes": classes}
    if config.mask:
        branches |= {"mask_in_features": POOLED_LEVELS, "mask_pooler": _pooler(mask.POOLED)}
        branches["mask_head"] = MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, width=mask.POOLED, height=mask.POOLED),
            num_classes=classes,
            conv_dims=[channels] * (config.mask_convs + 1),
            conv_norm=_norm(config),
        )
    stages = len(config.ious)
    heads = [_box_head(config, channels) for _ in range(stages)]
    predictors = [_predictor(config, classes, CODERS[k], cascade) for k in range(stages)]
    matchers = [Matcher([iou], [0, 1], allow_low_quality_matches=False) for iou in config.ious]
    branches |= {
        "batch_size_per_image": config.rois_per_image,
        "positive_fraction": config.positive_fraction,
        "box_in_features": POOLED_LEVELS,
        "box_pooler": _pooler(box.POOLED),
    }
    if cascade:
        return GuidedCascade(box_heads=heads, box_predictors=predictors, proposal_matchers=matchers, **branches)
    return GuidedHeads(box_head=heads[0], box_predictor=predictors[0], proposal_matcher=matchers[0], **branches)


def _pooler(side: int) -> ROIPooler:
    scales = [1.0 / stride for stride in STRIDES[: len(POOLED_LEVELS)]]
    return ROIPooler(output_size=side, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def _box_head(config: RoIConfig, channels: int) -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead(
        ShapeSpec(channels=channels, width=box.POOLED, height=box.POOLED),
        conv_dims=[channels] * config.box_convs,
        fc_dims=[config.fc_dim] * config.box_fcs,
        conv_norm=_norm(config),
    )


def _predictor(
    config: RoIConfig, classes: int, coder: tuple[float, float, float, float], cascade: bool
) -> FastRCNNOutputLayers:
    return FastRCNNOutputLayers(
        ShapeSpec(channels=config.fc_dim),
        box2box_transform=Box2BoxTransform(weights=coder),
        num_classes=classes,
        test_score_thresh=config.score_threshold,
        test_nms_thresh=config.nms_iou,
        test_topk_per_image=config.detections_per_image,
        cls_agnostic_bbox_reg=cascade,
    )


def _norm(config: RoIConfig) -> Any:
    """The norm of heads: Detectron2's own synchronised batch norm, a plain one in one process; it takes no boxes too."""
    return (lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N")) if config.norm == "bn" else ""
