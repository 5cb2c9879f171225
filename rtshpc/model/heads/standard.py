"""Second stage of Mask R-CNN: one box head with boxes per class, and what it shares with the cascade."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rtshpc.core.config import RoIConfig
from rtshpc.model.choices import choices
from rtshpc.model.detections import Detections
from rtshpc.model.heads import mask as masks
from rtshpc.model.heads.box import POOLED, BoxHead, BoxPredictor, RoIs, choose
from rtshpc.model.heads.boxes import BoxCoder, Matcher, iou
from rtshpc.model.heads.pooling import Pooled
from rtshpc.model.heads.sampling import Draw, in_ignored, quota, subsample

if TYPE_CHECKING:
    from rtshpc.data.sample import Target

CODERS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Weights of the box coder, per stage."""

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes (D, 4), scores (D,) and classes (D,) of one image."""


class RoIHeads(nn.Module, ABC):
    """Sampling, labelling and the mask branch; subclasses define the box branch."""

    def __init__(self, config: RoIConfig, channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.matchers = [Matcher(value, value) for value in config.ious]
        self.mask_head = masks.MaskHead(config, channels, classes) if config.mask else None

    def forward(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
        draws: Sequence[Draw] = (),
    ) -> tuple[list[Detections], dict[str, Tensor]]:
        """Detections of each image in eval mode, or the losses in training (the other is empty).

        Args:
            levels: p2 to p5 (and more, not used).
            proposals: (N, 4) of each image, px.
            sizes: (height, width) of each image without padding, px.
            targets: ground truth of each image, in training.
            draws: random choices of each image, in training.
        """
        if targets is None:
            found = self.find_boxes(levels, proposals, sizes)
            return self._with_masks(levels, found), {}
        with torch.no_grad():
            sampled = [self.sample(*image) for image in zip(proposals, targets, draws, strict=True)]
        losses = self.box_losses(levels, sampled, sizes, targets)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(levels, sampled, targets)
        return [], losses

    @abstractmethod
    def box_losses(
        self, levels: Sequence[Tensor], sampled: list[RoIs], sizes: Sequence[tuple[int, int]], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """The losses of the box branch by name."""

    @abstractmethod
    def predictors(self) -> list[BoxPredictor]:
        """Of each stage, in order."""

    def counted(self) -> dict[str, int]:
        """Boxes that each of the last losses is a mean over."""
        predictors, found = self.predictors(), dict[str, int]()
        for stage, predictor in enumerate(predictors):
            suffix = f"_stage{stage}" if len(predictors) > 1 else ""
            found |= {f"loss_cls{suffix}": predictor.counted, f"loss_box_reg{suffix}": predictor.counted}
        return found if self.mask_head is None else found | {"loss_mask": self.mask_head.counted}

    @abstractmethod
    def find_boxes(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Found]:
        """Detected boxes, scores and classes of each image."""

    def sample(self, proposals: Tensor, target: Target, draw: Draw) -> RoIs:
        """Ground truth joins the proposals; foreground, then background, at most rois_per_image."""
        labelled = self.label(torch.cat((proposals, target.boxes)), target, 0)
        config = self.config
        first, second = subsample(labelled.classes, config.rois_per_image, config.positive_fraction, self.classes, draw)
        return labelled[torch.cat((first, second))]

    @torch.no_grad()
    def label(self, boxes: Tensor, target: Target, stage: int) -> RoIs:
        """Boxes (N, 4) with the class and box of the ground truth they overlap by the stage's IoU."""
        matched, labels = self.matchers[stage].match(iou(target.boxes, boxes))
        if len(target.boxes):
            classes, truths = target.classes[matched].clone(), target.boxes[matched]
        else:
            classes, truths = torch.zeros_like(matched), torch.zeros_like(boxes)
        classes[labels == 0] = self.classes
        classes[(labels == 0) & in_ignored(boxes, target.ignore)] = -1
        return RoIs(boxes, classes, truths, matched)

    def _mask_loss(self, levels: Sequence[Tensor], sampled: list[RoIs], targets: Sequence[Target]) -> Tensor:
        assert self.mask_head is not None
        most = quota(self.config.rois_per_image, self.config.positive_fraction)
        front = [r[choices().where((r.classes >= 0) & (r.classes < self.classes), most)] for r in sampled]
        boxes, matched = [r.boxes for r in front], [r.matched for r in front]
        wanted = masks.crop_masks([t.masks for t in targets], boxes, matched)
        features = Pooled(levels, boxes, masks.POOLED)
        return self.mask_head.loss(features, torch.cat([r.classes for r in front]), wanted)

    def _with_masks(self, levels: Sequence[Tensor], found: list[Found]) -> list[Detections]:
        if self.mask_head is None:
            return [Detections(*image, None) for image in found]
        boxes = [image[0] for image in found]
        classes = torch.cat([image[2] for image in found])
        probs = self.mask_head.probabilities(Pooled(levels, boxes, masks.POOLED), classes)
        parts = probs.split([len(b) for b in boxes])
        return [Detections(*image, part) for image, part in zip(found, parts, strict=True)]

    def _choose(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Found:
        config = self.config
        return choose(boxes, scores, size, config.score_threshold, config.nms_iou, config.detections_per_image)


class StandardHeads(RoIHeads):
    """One box head; every class has its own box."""

    def __init__(self, config: RoIConfig, channels: int, classes: int) -> None:
        super().__init__(config, channels, classes)
        self.box_head = BoxHead(config, channels)
        self.box_predictor = BoxPredictor(config.fc_dim, classes, True, BoxCoder(CODERS[0]))

    def predictors(self) -> list[BoxPredictor]:
        """The only one."""
        return [self.box_predictor]

    def box_losses(
        self, levels: Sequence[Tensor], sampled: list[RoIs], sizes: Sequence[tuple[int, int]], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box_reg`."""
        logits, deltas = self.box_predictor(self.box_head(Pooled(levels, [r.boxes for r in sampled], POOLED)))
        score, place = self.box_predictor.losses(logits, deltas, sampled)
        return {"loss_cls": score, "loss_box_reg": place}

    def find_boxes(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Found]:
        """Detected boxes, scores and classes of each image."""
        logits, deltas = self.box_predictor(self.box_head(Pooled(levels, proposals, POOLED)))
        counts = [len(p) for p in proposals]
        boxes = self.box_predictor.coder.decode(deltas, torch.cat(list(proposals))).split(counts)
        scores = logits.softmax(dim=1).split(counts)
        return [self._choose(*image) for image in zip(boxes, scores, sizes, strict=True)]
