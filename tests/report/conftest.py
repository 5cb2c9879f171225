"""A run of test records: real files by the Record class, with values made up for these tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from rtshpc.core import grid
from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig, ScenesConfig
from rtshpc.core.load import write_cell, write_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, read_json, write_json, write_record, write_text
from rtshpc.core.sizing.measured import Counts, Measurement, Protocol
from rtshpc.hpc.nvml import NvmlSampler
from rtshpc.report.gallery import draw_picture
from rtshpc.stages import summarise

# Makers of small rasters and of map runs, and the browser.
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("report", "geo", "mapping")]

FINGERPRINT = "5eed" * 16
AP50 = {
    ("rgb",): 51.234,
    ("ndvi",): 20.517,
    ("nir",): 33.781,
    ("rgb", "ndvi", "pretrained"): 49.876,
    ("rgb", "ndvi", "full"): 52.345,
    ("rgb", "ndvi", "nir", "pretrained"): 55.334,
    ("rgb", "ndvi", "nir", "full"): 54.119,
}
SITES = ("banks", "peel")


def small_config(name: str = "test-run", **changes: Any) -> RunConfig:
    """A sweep of three modalities and two fused sets, pretrained and full."""
    scenes = ScenesConfig.model_validate({"generated": {"sites": list(SITES), "scenes_per_site": 6}})
    modalities: dict[str, Any] = {
        "rgb": {"bands": ("red", "green", "blue")},
        "ndvi": {"expression": "(nir - red) / (nir + red)"},
        "nir": {"bands": ("nir",)},
    }
    data = DataConfig.model_validate(
        {"name": "test scenes", "scenes": scenes, "modalities": modalities, "primary": "rgb"}
    )
    values: dict[str, Any] = {
        "name": name,
        "data": data,
        "model": ModelConfig(name="tiny test model"),
        "finetune": FinetuneConfig(),
        "grid": {
            "finetune.modalities": (("rgb", "ndvi"), ("rgb", "ndvi", "nir")),
            "finetune.backbones": ("pretrained", "full"),
        },
    }
    return RunConfig.model_validate({**values, **changes})


def setting(cell: Cell) -> tuple[str, ...]:
    """Modalities and, for a fused cell, the arm."""
    return cell.modalities if len(cell.modalities) == 1 else (*cell.modalities, cell.arm)


def results(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    """Plausible made-up results of a test cell."""
    makers: dict[str, Callable[[Cell, dict[str, Cell]], dict[str, Any]]] = {
        "preprocess": _preprocess,
        "gather": _gather,
        "pretrain": _trained,
        "finetune": _trained,
        "evaluate": _evaluated,
        "measure": _measured,
    }
    return makers[cell.stage](cell, by_id)


def _preprocess(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    warned = [{"scene": "banks_001", "warnings": ["nodata is undeclared"]}] if cell.task == 0 else []
    return {"shards": [], "chips": [], "rejected": [], "warned": warned, "statistics": {}, "scenes": 6}


def _gather(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    return {
        "chips": 50,
        "instances": 104,
        "modalities": ["rgb", "ndvi", "nir"],
        "allow_leakage": False,
        "bytes": 41234567,
        "splits": {
            "train": {"scenes": 6, "chips": 31, "instances": 66},
            "val": {"scenes": 2, "chips": 9, "instances": 17},
            "test": {"scenes": 2, "chips": 10, "instances": 21},
        },
        "scenes": {"total": 12, "accepted": 10, "rejected": 2, "warned": 1},
        "sites": {
            "banks": {"scenes": 5, "chips": 26, "instances": 57},
            "peel": {"scenes": 5, "chips": 24, "instances": 47},
        },
    }


def _trained(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    value = AP50[setting(cell)]
    total = 711_003 + 412_345 * len(cell.modalities)
    return {
        "epochs": 12,
        "steps": 192,
        "best_epoch": 11,
        "best_ap50": value + 2.5,
        "final_loss": 0.7123 + value / 1000,
        "parameters": {"total": total, "trainable": total if cell.arm != "pretrained" else total - 398_765},
        "seconds_per_step": 0.1873,
        "samples_per_second": 10.68,
        "checkpoint": "checkpoints/best.pt",
        "checkpoint_sha256": "ab" * 32,
        "device": "cpu",
        "precision": "fp32",
        "resumed": 0,
    }


def _evaluated(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    trained = by_id[cell.needs[0]]
    value = AP50[setting(trained)]
    fused = len(trained.modalities) > 1
    scores = {
        "AP": value * 0.46,
        "AP50": value,
        "AP75": value * 0.39,
        "AR": value * 0.61,
        "AR_small": value * 0.21,
        "AR_medium": value * 0.62,
        "AR_large": None,
    }
    return {
        "trained": trained.id,
        "trained_label": trained.label,
        "stage": trained.stage,
        "arm": trained.arm,
        "modalities": list(trained.modalities),
        "mixer": "cross" if fused else None,
        "residual": True if fused else None,
        "split": "test",
        "images": 10,
        "instances": 21,
        "allow_leakage": False,
        "mask": scores,
        "box": {key: None if number is None else number + 3.21 for key, number in scores.items()},
        "per_site": {
            "banks": {"images": 6, "instances": 12, "mask_AP50": value + 4.4, "box_AP50": value + 5.5},
            "peel": {"images": 4, "instances": 9, "mask_AP50": value - 6.6, "box_AP50": None},
        },
        "size_edges_m2": [2000.0, 12000.0],
        "predictions": "predictions.json",
        "gallery": ["gallery/banks_003_0.png"],
        "varied": trained.varied,
    }


def _measured(cell: Cell, by_id: dict[str, Cell]) -> dict[str, Any]:
    count, full = len(cell.modalities), cell.arm != "pretrained"
    params, activations = 3_212_345 * count, (48_123_456 if full else 31_987_654) * count
    grads = params if full else 812_345 * count
    peak = params + grads + activations + 1_234_567
    on_gpu = ("alloc_peak_fb", "alloc_peak_step", "reserved_peak", *NvmlSampler.FIGURES)
    reasons = {**dict.fromkeys(on_gpu, "no GPU is visible"), "data_wait_share": "samples are made before"}
    predicted = {"live_peak_fb": round(peak * 0.98), "error": {"live_peak_fb": -0.02}}
    setting = {"seed": 0, "chip_px": 256, "warmups": 2, "repeats": 5, "instances": 9, "threads": 1}
    measured = Measurement(
        backend="cpu",
        device="Test CPU",
        arm=cell.arm,
        modalities=cell.modalities,
        protocol=Protocol(**setting, sample="random pixels", precision="bf16", gradients="held"),
        params=params,
        grads=grads,
        optim_state=2 * grads,
        activations=activations,
        live_peak_fb=peak,
        rss_peak=712_345_678 + 11_111_111 * count,
        reasons=reasons,
        trainable_parameters=grads // 4,
        total_parameters=params // 4,
        step_seconds=0.3127 * count,
        step_seconds_each=(0.3127 * count,) * 5,
        samples_per_second=1 / (0.3127 * count),
        cpu_seconds=1.5 * count,
        counts=Counts(rois_per_image=512, foreground_per_image={"stage0": 128, "mask": 128}, filled=True),
        predicted=predicted,
        **dict.fromkeys(reasons),
    )
    return measured.model_dump(mode="json")


@dataclass
class Run:
    """A run folder of test records and its summarise cell."""

    paths: RunPaths
    summary: Cell
    cells: dict[str, Cell]

    def find(self, stage: str, *setting_words: str) -> Cell:
        """The cell of a stage with this setting (of the trained cell, for evaluate)."""
        for cell in self.cells.values():
            subject = self.cells[cell.needs[0]] if cell.stage == "evaluate" else cell
            if cell.stage == stage and (not setting_words or setting(subject) == setting_words):
                return cell
        raise AssertionError(f"no test cell {stage} {setting_words}")

    def change(self, cell: Cell, edit: Callable[[dict[str, Any]], None]) -> None:
        """Edit the results in a record in place."""
        path = self.paths.cell(cell.id).record
        value = read_json(path)
        assert value is not None
        edit(value["results"])
        write_record(path, Record.model_validate(value))

    def fail(self, cell: Cell, error: str, kind: str = "ValueError") -> None:
        """Put a failure in the place of a record."""
        folder = self.paths.cell(cell.id)
        folder.record.unlink()
        write_json(folder.failure, {"error": error, "kind": kind, "traceback": "Traceback ..."})

    def summarise(self) -> dict[str, Any]:
        return summarise.run(self.summary, self.paths, SILENT)

    def page(self) -> str:
        self.summarise()
        return self.paths.report_page.read_text(encoding="utf-8")

    def words(self) -> str:
        """The page without style and figures, whose coordinates are numbers too."""
        return re.sub(r"<(style|svg)\b.*?</\1>", "", self.page(), flags=re.DOTALL)

    def text(self, name: str) -> str:
        """A file of the report."""
        return (self.paths.report / name).read_text(encoding="utf-8")


def make_run(root: Path, config: RunConfig | None = None, values: dict[tuple[str, ...], float] | None = None) -> Run:
    """Write a whole run of test records below `root`; `values` adds AP50s of further settings."""
    for key, value in (values or {}).items():
        AP50.setdefault(key, value)
    config = config or small_config()
    cells = grid.cells(config, FINGERPRINT)
    summary = next(cell for cell in cells if cell.stage == "summarise")
    paths = RunPaths(root)
    paths.create()
    by_id = {cell.id: cell for cell in cells if cell.stage != "summarise"}
    for i, cell in enumerate(by_id.values()):
        _write(paths, cell, by_id, i)
    _write_shards(paths)
    write_run_config(paths.config, config, {"commit": "c0ffee1", "data_fingerprint": FINGERPRINT})
    write_cell(paths.cell(summary.id).config, summary)
    return Run(paths, summary, by_id)


def _write(paths: RunPaths, cell: Cell, by_id: dict[str, Cell], i: int) -> None:
    folder = paths.cell(cell.id)
    folder.root.mkdir(parents=True)
    write_cell(folder.config, cell)
    environment = {
        "host": "testhost",
        "python": "3.11.9",
        "cpu": "Test CPU",
        "gpu": None,
        "torch": None,
        "commit": "c0ffee1",
    }
    if cell.stage in ("pretrain", "finetune"):
        environment["torch"] = "2.14.1"
        _write_curve(folder.metrics, AP50[setting(cell)])
    write_record(
        folder.record,
        Record(
            cell=cell.id,
            stage=cell.stage,
            label=cell.label,
            result_version=RESULT_VERSION[cell.stage],
            started=f"2031-02-03T04:{i:02d}:07+00:00",
            seconds=3.7 + 41 * i,
            attempts=1,
            environment=environment,
            results=results(cell, by_id),
        ),
    )
    if cell.stage == "evaluate":
        draw(folder.gallery / "banks_003_0.png", by_id[cell.needs[0]].modalities)


def _write_curve(path: Path, best: float) -> None:
    rows: list[dict[str, Any]] = []
    for epoch in range(1, 13):
        for step in range(4):
            loss = 3.0 / (epoch + step / 4) + 20 / best
            rows.append({"kind": "train", "epoch": epoch, "step": epoch * 4 + step, "loss": loss, "losses": {}})
        rows.append({"kind": "val", "epoch": epoch, "step": epoch * 4, "ap50": best * (1 - 0.8**epoch), "ap": 1.0})
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_shards(paths: RunPaths) -> None:
    counts = {
        ("banks", "train"): (16, 36),
        ("banks", "val"): (4, 9),
        ("banks", "test"): (6, 12),
        ("peel", "train"): (15, 30),
        ("peel", "val"): (5, 8),
        ("peel", "test"): (4, 9),
    }
    chips = []
    for (site, split), (number, instances) in counts.items():
        for i in range(number):
            own = instances // number + (1 if i < instances % number else 0)
            chips.append(
                {"id": f"{site}-{split}-{i}", "scene": f"{site}_00", "site": site, "split": split, "instances": own}
            )
    statistics = {"channels": 1, "mean": [1234.5], "std": [321.25], "min": [-77.0], "max": [8765.0], "pixels": 99}
    write_json(
        paths.index,
        {
            "data": "test scenes",
            "classes": ["rts"],
            "chips": chips,
            "shards": {},
            "modalities": {
                "rgb": {key: value * 3 if isinstance(value, list) else value for key, value in statistics.items()},
                "ndvi": statistics,
                "nir": statistics,
            },
        },
    )
    write_json(
        paths.rejected,
        [
            {"scene": "banks_004", "reason": "no_crs", "detail": "the file names no coordinate system"},
            {"scene": "peel_002", "reason": "truncated", "detail": "strip 7 cannot be read"},
        ],
    )


def draw(path: Path, modalities: tuple[str, ...]) -> None:
    """A small real picture: two true instances (one with a hole) and two predictions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:96, 0:96]
    random = np.random.default_rng(7)
    grey = np.clip(0.45 + 0.12 * np.sin(columns / 9) + random.normal(0, 0.05, (96, 96)), 0, 1)
    blob = (rows - 34) ** 2 / 300 + (columns - 38) ** 2 / 500 < 1
    hole = (rows - 34) ** 2 + (columns - 38) ** 2 < 30
    other = (rows - 72) ** 2 + (columns - 70) ** 2 < 90
    truth = np.stack([blob & ~hole, other])
    predictions = np.stack([np.roll(blob, (2, -3), (0, 1)), np.roll(other, 2, 0)])
    tint = np.where(blob, 0.25, 0.0)
    images = {
        name: np.stack([grey + tint, grey, grey - tint], -1).clip(0, 1) if name == "rgb" else (grey - tint).clip(0, 1)
        for name in modalities
    }
    draw_picture(path, images, truth, predictions, "banks_003, chip 0")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of a config of one's own."""
    return lambda *arguments, **values: make_run(tmp_path / "test-run", *arguments, **values)


@pytest.fixture
def configured() -> Callable[..., RunConfig]:
    return small_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made once; tests work on copies of it."""
    return make_run(tmp_path_factory.mktemp("finished") / "test-run")


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    root = tmp_path / "test-run"
    shutil.copytree(finished.paths.root, root)
    return Run(RunPaths(root), finished.summary, finished.cells)
