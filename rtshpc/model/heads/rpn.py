"""Region proposals (Ren et al. 2015): which anchors hold something, and where their boxes should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import RPNConfig
from rtshpc.model.choices import choices
from rtshpc.model.heads.anchors import Anchors
from rtshpc.model.heads.boxes import BoxCoder, Matcher, clip, iou, nonempty
from rtshpc.model.heads.sampling import Draw, in_ignored, quota, subsample
from rtshpc.model.layers import ConvNorm, start_normal

if TYPE_CHECKING:
    from rtshpc.data.sample import Target


class RPNHead(nn.Module):
    """Convolutions shared by all levels, then one logit and four deltas an anchor."""

    def __init__(self, channels: int, anchors: int, convs: int) -> None:
        super().__init__()
        layers = [ConvNorm(channels, channels, 3, relu=True) for _ in range(convs)]
        # Detectron2's names: a single convolution is `conv`, several are `conv.conv0`, `conv.conv1`, ...
        named = nn.Sequential()
        for i, layer in enumerate(layers):
            named.add_module(f"conv{i}", layer)
        self.conv: nn.Module = layers[0] if convs == 1 else named
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, anchors * 4, 1)
        for layer in (*layers, self.objectness_logits, self.anchor_deltas):
            start_normal(layer, 0.01)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, H, W) to logits (B, A, H, W) and deltas (B, 4 A, H, W, anchor-major) per level."""
        logits: list[Tensor] = []
        deltas: list[Tensor] = []
        for level in levels:
            x = self.conv(level)
            logits.append(self.objectness_logits(x))
            deltas.append(self.anchor_deltas(x))
        return logits, deltas


class RPN(nn.Module):
    """The first stage: pyramid levels to proposals, and in training its two losses."""

    def __init__(self, config: RPNConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.anchors = Anchors(config.anchor_sizes, config.aspect_ratios)
        self.rpn_head = RPNHead(channels, self.anchors.per_cell, config.convs)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.matcher = Matcher(*config.iou, keep_best=True)

    def forward(
        self,
        levels: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
        draws: Sequence[Draw] = (),
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Proposals of each image, best first, and the losses.

        Args:
            levels: p2 to p6.
            sizes: (height, width) of each image without padding, px.
            targets: ground truth of each image in training, else None.
            draws: random choices of each image in training.

        Returns:
            For each image boxes (N, 4) and logits (N,) without gradient; `loss_rpn_cls`, `loss_rpn_loc`.
        """
        anchors = self.anchors(levels)
        logits, deltas = self.rpn_head(levels)
        flat = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits]
        moves = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float() for x in deltas]
        losses = {} if targets is None else self._losses(anchors, flat, moves, targets, draws)
        with torch.no_grad():
            return self._propose(anchors, flat, moves, sizes), losses

    def _losses(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        targets: Sequence[Target],
        draws: Sequence[Draw],
    ) -> dict[str, Tensor]:
        """Both losses, each over (anchors_per_image * images), not over the number sampled."""
        every = torch.cat(anchors)
        labelled = [self.label(every, target, draw) for target, draw in zip(targets, draws, strict=True)]
        labels = torch.stack([labels for labels, _ in labelled])
        share = self.config.anchors_per_image * len(targets)
        chosen = choices().where(labels.flatten() >= 0, share)
        positive = choices().where(labels.flatten() == 1, self._quota() * len(targets))
        scores, moves = torch.cat(logits, dim=1).flatten(), torch.cat(deltas, dim=1).flatten(0, 1)
        truth = labels.flatten()[chosen].float()
        objectness = F.binary_cross_entropy_with_logits(scores[chosen], truth, reduction="sum")
        sources = [every[choices().where(row == 1, self._quota())] for row in labels]
        wanted = torch.cat(
            [self.coder.encode(source, boxes) for source, (_, boxes) in zip(sources, labelled, strict=True)]
        )
        place = F.l1_loss(moves[positive], wanted, reduction="sum")
        return {"loss_rpn_cls": objectness / share, "loss_rpn_loc": place / share}

    @torch.no_grad()
    def label(self, anchors: Tensor, target: Target, draw: Draw) -> tuple[Tensor, Tensor]:
        """Labels (anchors,): 1 and 0 for the sampled, -1 for the rest; and the truth (positives, 4) of each 1."""
        matched, labels = self.matcher.match(iou(target.boxes, anchors))
        labels[(labels == 0) & in_ignored(anchors, target.ignore)] = -1
        first, second = subsample(labels, self.config.anchors_per_image, self.config.positive_fraction, 0, draw)
        labels = torch.full_like(labels, -1)
        labels[first] = 1
        labels[second] = 0
        return labels, target.boxes[matched[choices().where(labels == 1, self._quota())]]

    def _quota(self) -> int:
        """Most foreground anchors of an image in the losses."""
        return quota(self.config.anchors_per_image, self.config.positive_fraction)

    def _propose(
        self, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Best of each level, clipped, suppressed within the level, then best of all levels."""
        before = self.config.pre_nms_train if self.training else self.config.pre_nms_test
        after = self.config.post_nms_train if self.training else self.config.post_nms_test
        found: list[tuple[Tensor, Tensor]] = []
        tops = [x.topk(min(before, x.shape[1]), dim=1) for x in logits]
        level = torch.cat([torch.full_like(top.indices[0], i) for i, top in enumerate(tops)])
        for n, size in enumerate(sizes):
            scores = torch.cat([top.values[n] for top in tops])
            boxes = torch.cat(
                [
                    self.coder.decode(move[n, top.indices[n]], anchor[top.indices[n]])
                    for move, anchor, top in zip(deltas, anchors, tops, strict=True)
                ]
            )
            sound = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
            boxes = clip(boxes, size)
            whole = choices().where(sound & nonempty(boxes))
            boxes, scores, group = boxes[whole], scores[whole], level[whole]
            keep = choices().unsuppressed(boxes, scores, group, self.config.nms_iou, after)
            found.append((boxes[keep], scores[keep]))
        return found
