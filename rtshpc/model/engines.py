"""Which code runs the detector: ours, or an installed Detectron2's (`model.engine`)."""

from __future__ import annotations

from collections.abc import Mapping

from rtshpc.core.config import ModelConfig
from rtshpc.model.detector import Detector, build_detector


def build(
    model: ModelConfig, channels: Mapping[str, int], classes: int, frozen: bool = False, cached: bool = False
) -> Detector:
    """`build_detector` with the class that `model.engine` names; the arguments are the same.

    Raises:
        ConfigError: see `build_detector`.
        MissingExtra: `model.engine = "detectron2"`, and Detectron2 is not installed.
    """
    kind = Detector
    if model.engine == "detectron2":
        model.require_engine()
        from rtshpc.model.detectron2_adapter import Detectron2Detector

        kind = Detectron2Detector
    return build_detector(model, channels, classes, frozen, cached, kind)
