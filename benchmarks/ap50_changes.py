"""What a sensor gap and the approximations cost in AP50: trained cells of a run, scored again with one thing changed.

    python benchmarks/ap50_changes.py RUN [--json] [--window 32]

RUN is the folder of a finished sweep. Every trained cell is scored on the test split as it was trained; without each
of its auxiliaries in turn, as chips of a scene that lacks it come out of preprocess (`without ndvi`); with frozen
backbones in bf16 (`frozen_dtype=bf16`); and with attention windows of `--window` tokens, the tables of relative
positions interpolated (`window_px=32`). Weights stay as they are: what a new training would win back is not counted.
Points of mask AP50 (of box AP50 where there are no masks); nothing has a target.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import conclude, options

from rtshpc.core.cell import Cell
from rtshpc.core.load import read_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_plan, read_record
from rtshpc.data.reader import ShardDataset
from rtshpc.data.sample import Sample
from rtshpc.engine.detectors import fresh, trained
from rtshpc.engine.distributed import choose_device
from rtshpc.engine.loop import training_of
from rtshpc.engine.predict import predict
from rtshpc.engine.scoring import score
from rtshpc.model.detector import Detector
from rtshpc.model.imports.fit import resize_table


class Gap(ShardDataset):
    """Chips as of scenes that lack the modality `missing`."""

    missing = ""

    def __getitems__(self, rows: Sequence[int]) -> list[Sample]:
        return [self._without(sample) for sample in super().__getitems__(rows)]

    def _without(self, sample: Sample) -> Sample:
        image, valid = sample.images[self.missing], sample.modality_valid[self.missing]
        return replace(
            sample,
            images=sample.images | {self.missing: torch.zeros_like(image)},
            modality_valid={**sample.modality_valid, self.missing: torch.zeros_like(valid)},
        )


def changed(cell: Cell, key: str, value: Any) -> Cell:
    """The cell with one value of its model section changed, by dots; it keeps its id and so its weights."""
    model = cell.config.model
    section, _, field = key.rpartition(".")
    if section:
        field, value = section, getattr(model, section).model_copy(update={field: value})
    config = cell.config.model_copy(update={"model": model.model_copy(update={field: value})})
    return cell.model_copy(update={"config": config})


def with_window(cell: Cell, paths: RunPaths, window: int) -> Detector:
    """The trained detector with other attention windows, its tables of relative positions interpolated."""
    state = trained(cell, paths).state_dict()
    detector = fresh(changed(cell, "backbone.window_px", window))
    own = detector.state_dict()
    fitted = {
        name: tensor if tensor.shape == own[name].shape else resize_table(tensor, len(own[name]))
        for name, tensor in state.items()
    }
    detector.load_state_dict(fitted)
    return detector.eval()


def ap50(cell: Cell, paths: RunPaths, detector: Detector, missing: str = "") -> float:
    """Mask AP50 (box AP50 without masks) on the test split, percent."""
    kind = Gap if missing else ShardDataset
    dataset = kind(paths.index, cell.config.data, "test", cell.modalities)
    if isinstance(dataset, Gap):
        dataset.missing = missing
    training = training_of(cell)
    device = choose_device(training.device)
    torch.set_num_threads(training.threads)
    results = predict(detector.to(device), dataset, range(len(dataset)), device, training.precision)
    figures = score(results, len(dataset.classes), cell.config.evaluate.size_edges_m2)
    return float((figures["mask"] or figures["box"])["AP50"])


def measure(cell: Cell, paths: RunPaths, window: int) -> dict[str, float]:
    """Change -> AP50 of one trained cell."""
    detector = trained(cell, paths)
    found = {"as trained": ap50(cell, paths, detector)}
    for missing in cell.modalities[1:]:
        found[f"without {missing}"] = ap50(cell, paths, detector, missing)
    if cell.arm == "pretrained":
        found["frozen_dtype=bf16"] = ap50(cell, paths, trained(changed(cell, "frozen_dtype", "bf16"), paths))
    if cell.config.model.backbone.kind == "mvit":
        found[f"window_px={window}"] = ap50(cell, paths, with_window(cell, paths, window))
    return found


def main(arguments: list[str]) -> int:
    """Score and print."""
    parser = options(__doc__, window=32)
    parser.add_argument("run", type=Path, help="folder of a finished sweep")
    given = parser.parse_args(arguments)
    paths = RunPaths(given.run)
    plan = read_plan(paths.plan)
    if plan is None:
        parser.error(f"{given.run}: no plan.json; is it a run folder?")
    cells = [read_cell(paths.cell(entry["id"]).config) for entry in plan["cells"] if _scored(paths, entry)]
    figures = {cell.label: measure(cell, paths, given.window) for cell in cells}
    changes = {
        f"{label}: {change}": value - found["as trained"]
        for label, found in figures.items()
        for change, value in found.items()
        if change != "as trained"
    }
    lines = ["mask AP50 on the test split, percent"]
    for label, found in figures.items():
        lines += [label, *(f"  {change:20} {value:7.2f}" for change, value in found.items())]
    report = {"benchmark": "ap50_changes", "ap50": figures, "ratios": changes, "targets": {}}
    return conclude(report, [*lines, "points won or lost:"], given.json)


def _scored(paths: RunPaths, entry: dict[str, Any]) -> bool:
    trains = entry["stage"] in ("pretrain", "finetune")
    return trains and read_record(paths.cell(entry["id"]).record) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
