"""The detector: images of every modality to losses (training) or instances (eval)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import ConfigError, ShapeError
from rtshpc.model.detections import Detections
from rtshpc.model.heads.box import BoxHead
from rtshpc.model.heads.cascade import CascadeHeads
from rtshpc.model.heads.mask import MaskHead
from rtshpc.model.heads.rpn import RPN
from rtshpc.model.heads.sampling import Draw
from rtshpc.model.heads.standard import RoIHeads, StandardHeads
from rtshpc.model.pyramid import Pyramid

if TYPE_CHECKING:
    from rtshpc.data.sample import Target

DIVISOR = 32
"""Height and width of the network's input are multiples of this, px (the stride of the coarsest scale)."""


class Detector(nn.Module):
    """Backbones, fusion, pyramid, proposals, boxes and masks, under Detectron2's names.

    Attributes:
        modalities: names, the primary first.
        channels: bands of each modality.
        frozen: the backbones are frozen.
        own_batch_norm_sync: batch norms of the heads synchronise processes by themselves.
    """

    own_batch_norm_sync = False

    def __init__(
        self,
        model: ModelConfig,
        channels: Mapping[str, int],
        classes: int,
        frozen: bool = False,
        cached: bool = False,
    ) -> None:
        super().__init__()
        self._note(model, channels, classes, frozen)
        self.backbone = Pyramid(model, channels, frozen, cached)
        self.proposal_generator, self.roi_heads = fresh_heads(model, classes)

    def _note(self, model: ModelConfig, channels: Mapping[str, int], classes: int, frozen: bool) -> None:
        """Keep what the detector was made of."""
        self.model, self.channels, self.modalities = model, dict(channels), tuple(channels)
        self.classes, self.frozen = classes, frozen

    def forward(
        self,
        images: Mapping[str, Tensor],
        targets: Sequence[Target] | None = None,
        seeds: Sequence[int] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        scales: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> Any:
        """Losses by Detectron2's names in training mode, else one `Detections` an image.

        Args:
            images: for each modality (B, bands, H, W), normalised; any H and W, padded here with zeros.
            targets: ground truth of each image, px of the images; needed in training, else not used.
            seeds: one an image, for its choices of anchors and RoIs and for drop path; None takes the first
                candidates in index order and drops nothing.
            sizes: (height, width) of each image where the batch is already padded; None = all of H and W.
            scales: four backbone scales of each modality, given instead of `images` (which is empty then) and
                together with `sizes`.

        Raises:
            ShapeError: modalities, bands or batch sizes do not agree.
        """
        if scales is None:
            inputs, sizes = self.prepare(images, sizes)
            device = inputs[self.modalities[0]].device
        elif sizes is None or set(scales) != set(self.modalities):
            raise ShapeError(f"scales of {', '.join(scales)}: takes {', '.join(self.modalities)} and the images' sizes")
        else:
            inputs, device = {}, scales[self.modalities[0]][0].device
        if not self.training:
            return self.detect(inputs, sizes, scales)
        if targets is None or len(targets) != len(sizes) or (seeds is not None and len(seeds) != len(sizes)):
            raise ShapeError(f"training takes one target and one seed (or no seeds) for each of {len(sizes)} images")
        targets = [target.to(device) for target in targets]
        draws = [Draw(seed) for seed in seeds] if seeds is not None else [Draw(None)] * len(sizes)
        return self.losses(inputs, sizes, scales, targets, draws, self._drop_draws(draws, device))

    def take_at_once(self, images: int) -> None:
        """Train on less memory, to the same weights within rounding: see `Pyramid.at_once`; 0 = all images.

        Box and mask heads, whose norms and means are over all boxes of the batch, keep all of it and recompute what
        is cheap (`roi.recompute`).
        """
        self.backbone.at_once = images
        for head in self.modules():
            if isinstance(head, BoxHead | MaskHead):
                head.recompute = self.model.roi.recompute or images > 0

    def detect(
        self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], scales: Mapping[str, Any] | None
    ) -> list[Detections]:
        """Instances of prepared images (or of their backbone scales)."""
        levels = self.backbone(inputs, {}) if scales is None else self.backbone.levels(scales)
        proposals, _ = self.proposal_generator(levels, sizes)
        return self.roi_heads(levels, [boxes for boxes, _ in proposals], sizes)[0]

    def losses(
        self,
        inputs: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        scales: Mapping[str, Any] | None,
        targets: Sequence[Target],
        draws: Sequence[Draw],
        drops: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """Losses of prepared images (or of their backbone scales); `drops` are uniform numbers for drop path."""
        levels = self.backbone(inputs, drops) if scales is None else self.backbone.levels(scales)
        proposals, losses = self.proposal_generator(levels, sizes, targets, draws)
        _, more = self.roi_heads(levels, [boxes for boxes, _ in proposals], sizes, targets, draws)
        return {**more, **losses}

    def counted(self) -> dict[str, int]:
        """Boxes that the last losses are means over, of those that are not means over images."""
        return self.roi_heads.counted()

    def prepare(
        self, images: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """Images as the network takes them (one band three times, padded to multiples of 32) and their sizes."""
        if set(images) != set(self.modalities):
            raise ShapeError(f"images = {', '.join(images)}, but the detector takes {', '.join(self.modalities)}")
        first = images[self.modalities[0]].shape
        found: dict[str, Tensor] = {}
        for name in self.modalities:
            x = images[name]
            wanted = (first[0], self.channels[name], *first[2:])
            if tuple(x.shape) != wanted:
                raise ShapeError(f"images[{name!r}] is {tuple(x.shape)}, must be {wanted}")
            x = x.expand(-1, 3, -1, -1) if self.channels[name] == 1 and not self.backbone.early else x
            found[name] = F.pad(x, (0, -x.shape[3] % DIVISOR, 0, -x.shape[2] % DIVISOR))
        return found, list(sizes) if sizes is not None else [(first[2], first[3])] * first[0]

    def _drop_draws(self, draws: Sequence[Draw], device: torch.device) -> dict[str, Tensor | None]:
        """Uniform numbers (B, n) for the drop path of every trained backbone."""
        found: dict[str, Tensor | None] = {}
        for name, backbone in self.backbone.backbones().items():
            rows = [] if self.frozen else [draw.uniform(int(backbone.draws)) for draw in draws]
            whole = [row for row in rows if row is not None]
            found[name] = torch.stack(whole).to(device) if whole else None
        return found


def fresh_heads(model: ModelConfig, classes: int) -> tuple[RPN, RoIHeads]:
    """Proposals and heads of a detector, with the weights that are drawn next."""
    heads = CascadeHeads if model.roi.kind == "cascade" else StandardHeads
    width = model.pyramid_channels
    return RPN(model.rpn, width), heads(model.roi, width, classes)


def build_detector(
    model: ModelConfig,
    channels: Mapping[str, int],
    classes: int,
    frozen: bool = False,
    cached: bool = False,
    kind: type[Detector] = Detector,
) -> Detector:
    """A detector with fresh weights, drawn from torch's global generator.

    Args:
        model: what to build.
        channels: bands of each modality, the primary first; a modality of one band enters as three equal ones.
        classes: number of classes without the background.
        frozen: backbones take no gradient and stay in eval mode (load them with `model.weights.load_backbone`).
        cached: as frozen, but without backbones: `forward` is given their scales. All other weights are drawn as
            they are with backbones.
        kind: the class of the detector; `model.engines.build` takes the one that `model.engine` names.

    Raises:
        ConfigError: no modality, a modality's name that torch cannot hold, or sizes that do not fit.
    """
    if not channels or classes < 1:
        raise ConfigError(f"a detector takes at least one modality and one class, found {dict(channels)} and {classes}")
    for name in channels:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"modalities: {name!r} cannot be the name of a modality, choose another")
    return kind(model, channels, classes, frozen or cached, cached)
