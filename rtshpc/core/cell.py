"""A cell: one task of one stage, with all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rtshpc.core.config import RunConfig, ScaleTask
from rtshpc.core.config.section import Section, doc
from rtshpc.core.mapping.ground import MapScene

SWEEP_STAGES = (
    "predict",
    "preprocess",
    "gather",
    "pretrain",
    "features",
    "finetune",
    "evaluate",
    "measure",
    "summarise",
)
"""Stages of a sweep, in the order they run."""

MAP_STAGES = ("map", "merge", "publish")
"""Stages of a map run, in the order they run."""

SCALE_STAGES = ("preprocess", "gather", "scale")
"""Stages of a scaling study, in the order they run."""

STAGES = (*SWEEP_STAGES, *MAP_STAGES, "scale")

LENIENT = frozenset({"merge", "publish"})
"""Stages that take what is there of the cells they need, once all those are over, and say what is missing."""

RESULT_VERSION = {
    "predict": 1,
    "preprocess": 3,
    "gather": 1,
    "pretrain": 1,
    "features": 1,
    "finetune": 1,
    "evaluate": 1,
    "measure": 2,
    "summarise": 1,
    "map": 2,
    "merge": 2,
    "publish": 1,
    "scale": 1,
}
"""Raised by hand, one integer a stage, when the stage's results change."""


class Cell(Section):
    """What `cells/<id>/config.yaml` holds; a stage needs nothing else to run."""

    id: str = doc("hash of all that can change the result")
    stage: str = doc("one of STAGES")
    label: str = doc("name for people")
    task: int = doc("index in the stage's array", 0, ge=0)
    tasks: int = doc("length of the stage's array (preprocess shares the scenes by it)", 1, ge=1)
    needs: tuple[str, ...] = doc("ids of the cells it builds on, in order", ())
    backbones: dict[str, str] = doc("modality -> id of the pretrain cell its backbone comes from", {})
    features: dict[str, str] = doc("modality -> id of the features cell its scales come from; empty = live", {})
    modalities: tuple[str, ...] = doc("modalities of the detector, the primary first", ())
    arm: str = doc("unimodal, pretrained (frozen backbones), full or, of a measure cell, cached", "unimodal")
    varied: dict[str, Any] = doc("grid values of this cell", {})
    scenes: tuple[MapScene, ...] = doc("map: its scene; merge: all scenes of its group", ())
    block: int = doc("map: which block of its scene", 0, ge=0)
    scaling: ScaleTask | None = doc("scale: what it measures", None)
    data_fingerprint: str = doc("SHA-256 of the inputs' names, sizes and ends", "")
    config: RunConfig = doc("the sweep's config with the grid values of this cell in place")


def digest(value: Any, length: int = 12) -> str:
    """Short stable hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
