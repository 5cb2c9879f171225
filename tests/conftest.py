"""What tests of several folders share."""

from __future__ import annotations

import json
import os
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
