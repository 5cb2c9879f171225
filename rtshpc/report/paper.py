"""What the paper printed, as constants, so that a report can set it beside what was measured.

Source: Li, Hsu, Wang, Gu, Yang, Rogers, Liljedahl, "A multi-scale vision transformer-based multimodal
GeoAI model for mapping Arctic permafrost thaw" (arXiv 2504.17822). Nothing here was measured by this code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rtshpc.core.config import ModelConfig

SOURCE = (
    "Li, Hsu, Wang, Gu, Yang, Rogers, Liljedahl: A multi-scale vision transformer-based multimodal GeoAI model "
    "for mapping Arctic permafrost thaw (arXiv 2504.17822)"
)
SETTING = (
    "MViTv2-B backbones, 36 epochs, 717 training and 138 test samples of seven Arctic sites, split inside every site"
)

CASCADE_MVIT = "Cascade Mask R-CNN MViT"
MASK_MVIT = "Mask R-CNN MViT"
MASK_R50 = "Mask R-CNN R50-FPN"

# Mask AP50, %, of one modality: detector -> modality -> figure.
_ALONE: dict[str, dict[str, float]] = {
    MASK_R50: {"rgb": 31.29, "ndvi": 12.78, "nir": 12.30},
    MASK_MVIT: {"rgb": 37.94, "ndvi": 13.57, "nir": 15.57},
    CASCADE_MVIT: {"rgb": 39.73, "ndvi": 15.30, "nir": 18.06},
}
_RGB_ALONE_NOTE = "39.17 in the paper's Table 2"

# Mask AP50, %, fused, pretrained backbones: (mixer, residual) -> (RGB+NDVI, RGB+NDVI+NIR).
_FUSED: dict[tuple[str, bool], tuple[float, float]] = {
    ("early", False): (42.74, 43.87),
    ("convolution", False): (44.51, 45.45),
    ("convolution", True): (46.21, 47.62),
    ("stacked", False): (44.53, 45.79),
    ("stacked", True): (47.00, 47.69),
    ("cross", False): (44.71, 46.72),
    ("cross", True): (46.67, 48.99),
}
_FULL = (45.97, 48.50)  # residual cross attention, full training (Table 2)

# Box AP50, %, of GeoImageNet's six landforms: (mixer, residual) -> RGB+DEM.
GEOIMAGENET_RGB = 73.39
GEOIMAGENET: dict[tuple[str, bool], float] = {
    ("early", False): 82.88,
    ("convolution", False): 85.28,
    ("convolution", True): 85.78,
    ("stacked", True): 86.50,
    ("cross", True): 86.68,
}

MEMORY_MB: dict[tuple[int, str], float] = {
    (1, "unimodal"): 1649,
    (2, "full"): 2527,
    (2, "pretrained"): 1454,
    (3, "full"): 3361,
    (3, "pretrained"): 1754,
}
"""Table 2: (modalities, arm) -> peak of one sample, model, forward and backward, MB as printed."""

PARAMETERS_M: dict[tuple[int, str], tuple[float, float | None]] = {
    (1, "unimodal"): (103, None),
    (2, "pretrained"): (170, 69),
    (3, "pretrained"): (230, 78),
}
"""(modalities, arm) -> million parameters in all and trainable, as printed."""


@dataclass(frozen=True)
class PaperCell:
    """One cell of the paper's comparison: its setting and the figure printed for it.

    Attributes:
        value: AP50 in percent.
        metric: `mask` or `box`.
        note: what a reader must know about the figure; empty where nothing.
    """

    detector: str
    modalities: frozenset[str]
    mixer: str | None
    residual: bool | None
    arm: str
    value: float
    metric: str = "mask"
    note: str = ""


def _cells() -> tuple[PaperCell, ...]:
    """All cells of the paper's RTS comparison, in its order."""
    cells = [
        PaperCell(
            detector,
            frozenset({modality}),
            None,
            None,
            "unimodal",
            value,
            note=_RGB_ALONE_NOTE if (detector, modality) == (CASCADE_MVIT, "rgb") else "",
        )
        for detector, row in _ALONE.items()
        for modality, value in row.items()
    ]
    sets = (frozenset({"rgb", "ndvi"}), frozenset({"rgb", "ndvi", "nir"}))
    for (mixer, residual), row in _FUSED.items():
        for names, value in zip(sets, row, strict=True):
            arm = "full" if mixer == "early" else "pretrained"  # one backbone over all bands has nothing to freeze
            cells.append(PaperCell(CASCADE_MVIT, names, mixer, residual, arm, value))
    for names, value in zip(sets, _FULL, strict=True):
        cells.append(PaperCell(CASCADE_MVIT, names, "cross", True, "full", value))
    return tuple(cells)


CELLS = _cells()


def detector_kind(model: ModelConfig) -> str:
    """The detector in the paper's words, e.g. `Cascade Mask R-CNN MViT` (whatever the backbone's size)."""
    head = "Cascade Mask R-CNN" if model.roi.kind == "cascade" else "Mask R-CNN"
    if model.backbone.kind == "mvit":
        return f"{head} MViT"
    return f"{head} R50-FPN" if model.backbone.blocks == (3, 4, 6, 3) else f"{head} ResNet-FPN"


def find(
    detector: str, modalities: Iterable[str], mixer: str | None, residual: bool | None, arm: str
) -> PaperCell | None:
    """The paper's cell of the same setting; None where the paper printed none.

    Args:
        detector: as `detector_kind` gives it.
        modalities: names, the primary first; a fused set matches only with RGB as the primary, as in the paper.
        mixer: None for one modality.
        residual: None for one modality; early fusion has no residual form.
        arm: unimodal, pretrained or full.
    """
    names = [name.lower() for name in modalities]
    if len(names) > 1 and names[0] != "rgb":
        return None
    if len(names) == 1:
        mixer, residual, arm = None, None, "unimodal"
    elif mixer == "early":
        residual = False
    wanted = (detector, frozenset(names), mixer, residual, arm)
    for cell in CELLS:
        if (cell.detector, cell.modalities, cell.mixer, cell.residual, cell.arm) == wanted:
            return cell
    return None


def find_geoimagenet(modalities: Iterable[str], mixer: str | None, residual: bool | None, arm: str) -> PaperCell | None:
    """The paper's GeoImageNet figure (boxes only) of the same setting."""
    names = [name.lower() for name in modalities]
    value: float | None = None
    if names == ["rgb"]:
        value = GEOIMAGENET_RGB
    elif names == ["rgb", "dem"] and mixer and arm == ("full" if mixer == "early" else "pretrained"):
        value = GEOIMAGENET.get((mixer, bool(residual) and mixer != "early"))
    if value is None:
        return None
    return PaperCell(CASCADE_MVIT, frozenset(names), mixer, residual, arm, value, "box", "GeoImageNet, boxes")
