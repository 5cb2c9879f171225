"""Second stage of Cascade R-CNN (Cai and Vasconcelos 2018): three box heads, each refining the last one's boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rtshpc.core.config import RoIConfig
from rtshpc.model.choices import choices
from rtshpc.model.heads.box import POOLED, BoxHead, BoxPredictor, RoIs
from rtshpc.model.heads.boxes import BoxCoder, clip, nonempty
from rtshpc.model.heads.pooling import Pooled
from rtshpc.model.heads.standard import CODERS, Found, RoIHeads

if TYPE_CHECKING:
    from rtshpc.data.sample import Target


class CascadeHeads(RoIHeads):
    """Stages with rising IoU, each with its own head; boxes are the same for all classes."""

    def __init__(self, config: RoIConfig, channels: int, classes: int) -> None:
        super().__init__(config, channels, classes)
        self.stages = len(config.ious)
        self.box_head = nn.ModuleList(BoxHead(config, channels) for _ in range(self.stages))
        self.box_predictor = nn.ModuleList(
            BoxPredictor(config.fc_dim, classes, False, BoxCoder(CODERS[k])) for k in range(self.stages)
        )

    def predictors(self) -> list[BoxPredictor]:
        """Of each stage, in order."""
        return list(self.box_predictor)  # type: ignore[arg-type]

    def box_losses(
        self, levels: Sequence[Tensor], sampled: list[RoIs], sizes: Sequence[tuple[int, int]], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """`loss_cls_stageK` and `loss_box_reg_stageK`; later stages label the last one's boxes anew."""
        losses: dict[str, Tensor] = {}
        labelled, refined = sampled, [r.boxes for r in sampled]
        for k in range(self.stages):
            if k > 0:
                refined = [b[choices().where(nonempty(b))] for b in refined]
                labelled = [self.label(b, t, k) for b, t in zip(refined, targets, strict=True)]
            boxes = [r.boxes for r in labelled]
            logits, deltas = self._stage(levels, boxes, k)
            score, place = self.box_predictor[k].losses(logits, deltas, labelled)
            losses[f"loss_cls_stage{k}"], losses[f"loss_box_reg_stage{k}"] = score, place
            refined = self._refine(deltas, boxes, sizes, k)
        return losses

    def find_boxes(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Found]:
        """Boxes of the last stage with the mean of all stages' scores."""
        counts = [len(p) for p in proposals]
        boxes, scores = list(proposals), []
        for k in range(self.stages):
            logits, deltas = self._stage(levels, boxes, k)
            scores.append(logits.softmax(dim=1))
            boxes = self._refine(deltas, boxes, sizes, k)
        mean = (sum(scores[1:], scores[0]) * (1.0 / self.stages)).split(counts)
        return [self._choose(*image) for image in zip(boxes, mean, sizes, strict=True)]

    def _stage(self, levels: Sequence[Tensor], boxes: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Logits and deltas of stage k; the pyramid takes one stage's share of the gradient."""
        features = Pooled(levels, boxes, POOLED, 1.0 / self.stages if self.training else 1.0)
        return self.box_predictor[k](self.box_head[k](features))

    @torch.no_grad()
    def _refine(self, deltas: Tensor, boxes: list[Tensor], sizes: Sequence[tuple[int, int]], k: int) -> list[Tensor]:
        """The stage's boxes of each image, clipped, without gradient."""
        moved = self.box_predictor[k].coder.decode(deltas, torch.cat(boxes)).split([len(b) for b in boxes])
        return [clip(b, size) for b, size in zip(moved, sizes, strict=True)]
