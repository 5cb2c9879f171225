"""Sections that say what the detector is: backbone, pyramid, heads, fusion."""

from __future__ import annotations

import importlib.util
import sys
from typing import Literal

from pydantic import model_validator

from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import MissingExtra


class MViTConfig(Section):
    """MViTv2 as in Detectron2's projects/MViTv2 (Li et al. 2022); defaults are MViTv2-B."""

    kind: Literal["mvit"] = doc("multi-scale vision transformer", "mvit")
    embed_dim: int = doc("channels at stride 4", 96, ge=8)
    depth: int = doc("number of blocks", 24, ge=1)
    num_heads: int = doc("attention heads at stride 4", 1, ge=1)
    last_blocks: tuple[int, int, int, int] = doc("last block of each scale", (1, 4, 20, 23))
    kv_stride: int = doc("stride of key and value pooling at stride 4", 4, ge=1)
    window_px: int = doc("attention window at stride 4, in tokens", 56, ge=1)
    pretrain_px: int = doc("image side that sizes the relative-position tables, px", 224, ge=32)
    mlp_ratio: float = doc("hidden over outer width of a block's MLP", 4.0, gt=0)
    drop_path: float = doc("stochastic depth of the last block", 0.4, ge=0, lt=1)
    attention: Literal["plain", "fused"] = doc(
        "plain: the matrix of all pairs in a window is kept for backward; fused: a kernel that keeps none", "plain"
    )
    checkpoint: Literal["none", "light", "blocks", "stages"] = doc(
        "recomputed in backward: nothing; norms, activations and half-precision weights; blocks; all blocks of a scale",
        "none",
    )


class ResNetConfig(Section):
    """Bottleneck ResNet as in Detectron2; defaults are ResNet-50."""

    kind: Literal["resnet"] = doc("residual network", "resnet")
    blocks: tuple[int, int, int, int] = doc("bottlenecks per scale", (3, 4, 6, 3))
    stem_channels: int = doc("channels of the stem", 64, ge=8)
    channels: tuple[int, int, int, int] = doc("channels of each scale", (256, 512, 1024, 2048))
    bottleneck: tuple[int, int, int, int] = doc("inner channels of each scale", (64, 128, 256, 512))
    stride_in_1x1: bool = doc("stride in the first 1x1 (Detectron2's MSRA weights) or in the 3x3 (torchvision)", True)


class RPNConfig(Section):
    """Region proposal network (Ren et al. 2015) on the pyramid."""

    anchor_sizes: tuple[float, ...] = doc(
        "anchor side per level p2 to p6, px of the network input", (32, 64, 128, 256, 512)
    )
    aspect_ratios: tuple[float, ...] = doc("anchor height over width", (0.5, 1.0, 2.0), min_length=1)
    convs: int = doc("3x3 convolutions before the logits", 2, ge=1)
    iou: tuple[float, float] = doc("below: background; at or above: foreground", (0.3, 0.7))
    anchors_per_image: int = doc("anchors sampled for the loss", 256, ge=1)
    positive_fraction: float = doc("largest foreground share of them", 0.5, gt=0, le=1)
    pre_nms_train: int = doc("proposals per level before suppression, training", 2000, ge=1)
    pre_nms_test: int = doc("proposals per level before suppression, test", 1000, ge=1)
    post_nms_train: int = doc("proposals per image after it, training", 1000, ge=1)
    post_nms_test: int = doc("proposals per image after it, test", 1000, ge=1)
    nms_iou: float = doc("overlap that suppresses", 0.7, gt=0, le=1)


class RoIConfig(Section):
    """Second stage: cascade (Cai and Vasconcelos 2018) or standard box heads, and the mask head."""

    kind: Literal["cascade", "standard"] = doc("three refining stages, or one", "cascade")
    ious: tuple[float, ...] = doc("foreground IoU per stage", (0.5, 0.6, 0.7), min_length=1)
    box_convs: int = doc("3x3 convolutions of a box head", 4, ge=0)
    box_fcs: int = doc("fully connected layers of a box head", 1, ge=1)
    fc_dim: int = doc("width of a fully connected layer", 1024, ge=1)
    norm: Literal["bn", "none"] = doc("normalisation of box and mask convolutions", "bn")
    rois_per_image: int = doc("RoIs sampled for the losses", 512, ge=1)
    positive_fraction: float = doc("largest foreground share of them", 0.25, gt=0, le=1)
    mask: bool = doc("predict masks (off: boxes only)", True)
    mask_convs: int = doc("3x3 convolutions of the mask head", 4, ge=1)
    score_threshold: float = doc("lower detections are dropped", 0.05, ge=0, le=1)
    nms_iou: float = doc("overlap that suppresses, per class", 0.5, gt=0, le=1)
    detections_per_image: int = doc("most detections of an image", 100, ge=1)
    recompute: bool = doc(
        "make pooled features, norms, activations and half-precision weights again in backward", False
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> RoIConfig:
        wanted = 3 if self.kind == "cascade" else 1
        if len(self.ious) != wanted:
            raise ValueError(f"kind = {self.kind} takes {wanted} ious, found {len(self.ious)}")
        return self


class FusionConfig(Section):
    """How the scales of several modalities become one set (Li et al. 2025, Eqs. 1-3 and Table 4)."""

    mixer: Literal["early", "convolution", "stacked", "cross"] = doc(
        "primary x auxiliary -> one map; early: the bands of all modalities enter one backbone instead", "cross"
    )
    residual: bool = doc("add the primary and the auxiliaries to the mixed maps (early fusion has no such form)", True)
    mlp_ratio: float = doc("hidden over outer width of the mixer's MLP", 4.0, gt=0)
    heads: tuple[int, int, int, int] = doc("attention heads at strides 4, 8, 16, 32", (1, 2, 4, 8))
    kv_stride: tuple[int, int, int, int] = doc("pooling of keys and values at strides 4, 8, 16, 32", (1, 1, 1, 1))
    recompute: bool = doc("make norms, activations and half-precision weights of the fusion again in backward", False)

    @property
    def early(self) -> bool:
        """Whether modalities are fused before the backbone (data-level fusion, channel expansion)."""
        return self.mixer == "early"


class ModelConfig(Section):
    """A detector: what `configs/models/*.yaml` holds."""

    name: str = doc("name of the model, for reports")
    engine: Literal["native", "detectron2"] = doc(
        "code of proposals, heads and losses: ours, or an installed Detectron2's (docs/detectron2.md)", "native"
    )
    backbone: MViTConfig | ResNetConfig = doc("bottom-up network of each modality", MViTConfig(), discriminator="kind")
    pyramid_channels: int = doc("channels of the feature pyramid", 256, ge=8)
    rpn: RPNConfig = doc("first stage", RPNConfig())
    roi: RoIConfig = doc("second stage", RoIConfig())
    fusion: FusionConfig = doc("how modalities are fused", FusionConfig())
    frozen_dtype: Literal["fp32", "bf16"] = doc(
        "numbers that frozen backbones are kept and run in; bf16 is an approximation", "fp32"
    )

    @model_validator(mode="after")
    def _engine_has_it(self) -> ModelConfig:
        if self.engine == "detectron2" and self.roi.recompute:
            raise ValueError('engine = "detectron2" keeps what its heads compute: roi.recompute must be false')
        return self

    def require_engine(self) -> None:
        """Raise MissingExtra where the engine's library is not installed; nothing is imported."""
        if self.engine == "detectron2" and importlib.util.find_spec("detectron2") is None:
            raise MissingExtra(
                f'model.engine = "detectron2": Detectron2 is not installed in {sys.prefix}; build it from its source'
                " (docs/detectron2.md), set site.image to an image with it, or take engine: native"
            )
