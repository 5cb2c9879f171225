"""What tests of several folders share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


class Programs:
    """Programs by the names of Slurm's that print what a test gave them and keep what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def says(self, name: str, output: str, code: int = 0, error: str = "") -> None:
        (self.folder / f"{name}.out").write_text(output)
        script = self.folder / name
        script.write_text(
            f'#!/bin/sh\necho "$@" >> "{self.folder}/{name}.asked"\ncat "{self.folder}/{name}.out"\n'
            f"echo '{error}' >&2\nexit {code}\n"
        )
        script.chmod(0o755)

    def asked(self, name: str) -> list[str]:
        file = self.folder / f"{name}.asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Programs(folder)


@pytest.fixture
def gdal_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a module of this text in the place of GDAL's bindings, in a Python of their own."""

    def install(text: str) -> None:
        folder = tmp_path / "other python"
        venv.create(folder, with_pip=False, symlinks=True)
        package = next(folder.glob("lib/python3*/site-packages")) / "osgeo"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "gdal.py").write_text(text)
        monkeypatch.setenv("RTSHPC_GDAL_PYTHON", str(folder / "bin" / "python"))

    return install


@pytest.fixture
def square_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small scenes are cut into rows of blocks, too."""
    monkeypatch.setattr("rtshpc.mapping.layout.TALL", 1)


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders for LD_LIBRARY_PATH with a libnvidia-ml.so.1 that answers without a GPU: `current`, and an `old` driver's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to build a small libnvidia-ml.so.1")
    folders = {name: tmp_path_factory.mktemp(f"nvml-{name}") for name in ("current", "old")}
    for name, folder in folders.items():
        options = ["-shared", "-fPIC", "-w", *(["-DOLD"] if name == "old" else [])]
        source = Path(__file__).with_name("fake_nvml.c")
        subprocess.run([compiler, *options, "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folders


DETECTOR: dict[str, Any] = {
    "name": "small",
    "data": {
        "name": "small",
        "scenes": {"glob": "*.tif"},
        "modalities": {
            "rgb": {"bands": ["red", "green", "blue"]},
            "ndvi": {"bands": ["ndvi"]},
            "dem": {"bands": ["1"], "file": "dem/{scene}.tif"},
        },
        "primary": "rgb",
        "labels": {"kind": "none"},
        "chip": {"size_px": 64, "overlap_px": 0},
    },
    "model": {"base": "tiny", "backbone": {"embed_dim": 8}, "pyramid_channels": 16},
    "finetune": {"modalities": ["rgb"], "primary": "rgb"},
}
"""Of a detector that sees slumps everywhere: its weights are as they were drawn."""


class ToMap:
    """A run with one trained cell, its weights as a file of their own, and scenes to map with them."""

    def __init__(self, folder: Path) -> None:
        from rtshpc.core.cell import Cell
        from rtshpc.core.load import load_run, write_cell
        from rtshpc.core.paths import RunPaths
        from rtshpc.core.records import Record, write_json, write_record
        from rtshpc.engine import checkpoint
        from rtshpc.engine.detectors import fresh

        self.folder, self.sweep, self.run = folder, folder / "small.yaml", folder / "trained"
        self.sweep.write_text(yaml.safe_dump(DETECTOR))
        config = load_run(self.sweep)
        cell = Cell(id="0123456789ab", stage="pretrain", label="pretrain rgb", config=config, modalities=("rgb",))
        paths = RunPaths(self.run)
        own = paths.cell(cell.id)
        own.checkpoints.mkdir(parents=True)
        weights = fresh(cell).state_dict()
        self.weights = folder / "weights.pt"
        checkpoint.save(self.weights, {"model": weights})
        sha256 = checkpoint.save(own.best_checkpoint, {"format": checkpoint.FORMAT, "model": weights, "backbones": {}})
        results = {"checkpoint": "checkpoints/best.pt", "checkpoint_sha256": sha256}
        facts: dict[str, Any] = {
            "stage": cell.stage,
            "label": cell.label,
            "result_version": 1,
            "started": "",
            "seconds": 1,
        }
        write_record(own.record, Record(cell=cell.id, results=results, **facts))
        write_cell(own.config, cell)
        self.statistics = paths.index
        write_json(paths.index, {"modalities": {"rgb": {"mean": [0.08] * 3, "std": [0.03] * 3}}})
        planned = [{"id": cell.id, "stage": cell.stage, "label": cell.label, "needs": []}]
        write_json(paths.plan, {"run": "trained", "cells": planned, "stages": [{"stage": "pretrain"}]})
        paths.config.write_text(json.dumps({"name": "trained"}))
        self.model = f"{self.run}:{cell.label}"
        self.cell = own.root

    def scenes(self, names: str, side: int = 100) -> Path:
        """A folder with a scene for each letter, on one lattice: neighbours share 20 px; `x` is broken, `y` far away."""
        import numpy as np
        import rasterio
        from rasterio.transform import Affine

        folder = self.folder / f"scenes {names} $HOME 'x'"
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            if name == "x":
                (folder / "x.tif").write_bytes(b"II*\0 no raster at all")
                continue
            draw = np.random.default_rng(ord(name))
            pixels = draw.integers(200, 1400, (5, side, side)).astype(np.int16)
            pixels[:, :7, :9] = -32768
            place = Affine(10.0, 0.0, 5e5 + 10 * (10_000 if name == "y" else number * (side - 20)), 0.0, -10.0, 7.6e6)
            common = {"crs": "EPSG:32608", "transform": place, "nodata": -32768, "dtype": "int16", "count": 5}
            with rasterio.open(folder / f"{name}.tif", "w", driver="GTiff", height=side, width=side, **common) as file:
                file.write(pixels)
                file.descriptions = ("red", "green", "blue", "ndvi", "nir")
                file.scales = [1e-4] * 5
        return folder


@pytest.fixture(scope="session")
def to_map(tmp_path_factory: pytest.TempPathFactory) -> ToMap:
    return ToMap(tmp_path_factory.mktemp("map"))


class Study:
    """Makes the folder of a scaling study as `launch scale` leaves it; its figures are made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str = "study", gpu: str = "", share: float = 0.9, lost: str = "", **scale: Any) -> Any:
        """The RunPaths of a study whose efficiency falls to `share` with each doubling.

        Args:
            name: of its folder.
            gpu: what it ran on; empty = CPUs.
            share: see above.
            lost: labels that begin with this have no record.
            scale: keys of the section, e.g. `gpus=[1, 2]`.
        """
        from rtshpc.core.load import load_run, write_cell, write_run_config
        from rtshpc.core.paths import RunPaths
        from rtshpc.core.records import write_json, write_record
        from rtshpc.core.sizing.studies import scale_cells

        generated = {"generated": {"sites": ["a"], "scenes_per_site": 4, "size_px": 64}}
        data = {**DETECTOR["data"], "scenes": generated, "modalities": {"rgb": {"bands": ["red", "green", "blue"]}}}
        section = {"gpus": [1, 2, 4], "concurrency": [1, 2], "tasks": [1, 2], "batch": 8, **scale}
        facts = {**DETECTOR, "name": name, "data": data, "scale": section}
        sweep, paths = self.folder / f"{name}.yaml", RunPaths(self.folder / name)
        sweep.write_text(yaml.safe_dump(facts))
        config = load_run(sweep)
        cells = scale_cells(config, "f" * 64)
        paths.create()
        write_run_config(paths.config, config, {"data_fingerprint": "f" * 64, "commit": "0" * 40, "image": None})
        planned = [
            {"id": cell.id, "stage": cell.stage, "label": cell.label, "needs": list(cell.needs)} for cell in cells
        ]
        write_json(paths.plan, {"run": name, "cells": planned, "stages": [{"stage": "gather"}, {"stage": "scale"}]})
        for number, cell in enumerate(cell for cell in cells if cell.scaling is not None):
            write_cell(paths.cell(cell.id).config, cell)
            if not lost or not cell.label.startswith(lost):
                write_record(
                    paths.cell(cell.id).record, self._record(cell, 100 + number - cell.scaling.part, gpu, share)
                )
        return paths

    @staticmethod
    def _record(cell: Any, job: int, gpu: str, share: float) -> Any:
        """Of a job that took a minute, where nothing else ran."""
        from rtshpc.core.cell import RESULT_VERSION
        from rtshpc.core.records import Record

        task = cell.scaling
        speed = task.count * share ** (task.count.bit_length() - 1) * (1 + 0.01 * task.repeat)
        slower = 1 / share ** (task.count - 1)
        step = (task.batch or 8) / (10 * speed)
        results: dict[str, Any] = {
            **task.model_dump(mode="json"),
            "nodes": -(-task.count // 2),
            "rate": 10 * speed if task.kind != "array" else None,
            "unit": {"array": "cells/h", "strong": "samples/s", "weak": "samples/s"}.get(task.kind, "chips/s"),
            "seconds": [step, step, step],
            "device": "cuda" if gpu else "cpu",
            "gpu": gpu,
            "job": f"{job}_{task.part}" if task.parts > 1 else str(job),
            "series": str(job),
            "ended": 1_790_000_000.0 + 60 * (1 + task.part // task.count) * slower,
        }
        return Record(
            cell=cell.id,
            stage="scale",
            label=cell.label,
            result_version=RESULT_VERSION["scale"],
            started="2026-09-21T20:00:00+00:00",
            seconds=60.0 * slower,
            environment={"host": f"n{task.part % task.count}", "gpu": gpu or None, "torch": "2.14.1"},
            results=results,
        )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


@pytest.fixture(scope="session")
def short_study() -> Callable[..., list[str]]:
    """Options of `launch scale` for one repeat of as few and as small steps as can be measured."""

    def options(gpus: str = "1,2", concurrency: str = "2", tasks: str = "2", **scale: int) -> list[str]:
        section = {"steps": 1, "warmups": 1, "batch_per_gpu": 1, "waves": 1, **scale}
        counts = ["--gpus", gpus, "--concurrency", concurrency, "--tasks", tasks, "--repeats", "1"]
        return [*counts, *(word for key, value in section.items() for word in ("--set", f"scale.{key}={value}"))]

    return options
