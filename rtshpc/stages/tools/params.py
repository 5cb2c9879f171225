"""Tool: parameters, total and trainable, of each part of a detector."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.load import known_names, load_model, load_run
from rtshpc.model.detector import Detector, build_detector

PAPER_INPUTS = {"rgb": 3, "ndvi": 1, "nir": 1}
"""Modalities counted for a model by itself: the paper's, with their bands."""


def main(arguments: Sequence[str]) -> int:
    """Prints a table, or with `--json` `{"model": name, "counts": [...]}`; see `count` for an entry."""
    parser = argparse.ArgumentParser(prog="params", description="Count the parameters of a detector, part by part.")
    parser.add_argument("config", help="model config or sweep config: a file or the name of a shipped one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(list(arguments))
    model, channels, classes = read(given.config)
    counts = []
    for size in range(1, len(channels) + 1):
        for arm in ("full",) if size == 1 or model.fusion.early else ("pretrained", "full"):
            chosen = {name: channels[name] for name in list(channels)[:size]}
            counts.append(count(model, chosen, classes, arm))
    if given.json:
        print(json.dumps({"model": model.name, "counts": counts}, indent=1))
    else:
        Console().print(table(model.name, counts))
    return 0


def read(config: str) -> tuple[ModelConfig, dict[str, int], int]:
    """Model, bands of each modality (primary first) and number of classes of a model config or a sweep.

    Raises:
        ConfigError: `config` is neither.
    """
    if config in known_names("model"):
        return load_model(config), dict(PAPER_INPUTS), 1
    if config in known_names("sweep"):
        return _of_sweep(config)
    try:
        return load_model(config), dict(PAPER_INPUTS), 1
    except ConfigError as as_model:
        try:
            return _of_sweep(config)
        except ConfigError as as_sweep:
            # A file that holds `finetune` was meant as a sweep: its own mistake is the one to tell.
            raise (as_sweep if "finetune" in str(as_sweep) or "data" in str(as_model) else as_model) from None


def _of_sweep(config: str) -> tuple[ModelConfig, dict[str, int], int]:
    run = load_run(config)
    names = [run.finetune.primary, *(name for name in run.finetune.modalities if name != run.finetune.primary)]
    return run.model, {name: run.data.modalities[name].channels for name in names}, len(run.data.classes)


def count(model: ModelConfig, channels: Mapping[str, int], classes: int, arm: str) -> dict[str, Any]:
    """Parameters of one detector.

    Args:
        model: what to build; nothing is allocated.
        channels: bands of each modality, the primary first.
        classes: number of classes.
        arm: `pretrained` (frozen backbones) or `full`.

    Returns:
        `modalities`, `arm`, `total`, `trainable` and `modules`: the same two for each part by name.
    """
    with torch.device("meta"):
        detector = build_detector(model, channels, classes, frozen=arm == "pretrained")
    modules: dict[str, dict[str, int]] = {}
    for name, parameter in detector.named_parameters():
        entry = modules.setdefault(_part(name, detector), {"total": 0, "trainable": 0})
        entry["total"] += parameter.numel()
        entry["trainable"] += parameter.numel() if parameter.requires_grad else 0
    sums = {key: sum(entry[key] for entry in modules.values()) for key in ("total", "trainable")}
    return {"modalities": list(channels), "arm": arm, **sums, "modules": modules}


def _part(name: str, detector: Detector) -> str:
    """The row of the table that a parameter belongs to."""
    first, second, third = name.split(".")[:3]
    if second == "bottom_up":
        return f"backbone {next(iter(detector.backbone.backbones()))}"
    if second == "bottom_ups":
        return f"backbone {third}"
    if first == "backbone":
        return "fusion" if second == "fusion" else "pyramid"
    return "proposals" if first == "proposal_generator" else f"{second.split('_')[0]} heads"


def table(name: str, counts: Sequence[Mapping[str, Any]]) -> Table:
    """One row a part, two columns (total, trainable) a detector, in millions."""
    made = Table(title=f"{name}: parameters, M (all / trained)")
    made.add_column("part")
    rows: list[str] = []
    for entry in counts:
        made.add_column(f"{'+'.join(entry['modalities'])}\n{entry['arm']}", justify="right")
        rows += [part for part in entry["modules"] if part not in rows]
    for part in rows:
        made.add_row(part, *(_pair(entry["modules"].get(part)) for entry in counts))
    made.add_section()
    made.add_row("sum", *(_pair(entry) for entry in counts))
    return made


def _pair(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['total'] / 1e6:.2f} / {entry['trainable'] / 1e6:.2f}"
