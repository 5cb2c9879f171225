"""Generated files and shards that several benchmarks read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from rtshpc.core.cell import Cell
from rtshpc.core.config import DataConfig, FinetuneConfig, GeneratedConfig, ModelConfig, RunConfig, ScenesConfig
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT
from rtshpc.data.synthetic import draw, draw_block
from rtshpc.stages import preprocess

SIZE, BANDS = 512, 5
KINDS = {"uint8": "lzw", "uint16": "deflate", "float32": "deflate"}
"""Sample type of the images and how they are compressed."""


def make_files(folder: Path, kind: str, count: int) -> None:
    """`count` images and masks; eight different generated scenes, moved, so that making them is quick."""
    folder.mkdir(parents=True)
    config = GeneratedConfig(size_px=SIZE, slumps_per_scene=(4, 8), nodata_fraction=0)
    scenes = [draw_block(draw(config, "banks", number), 0, 0, SIZE, SIZE) for number in range(8)]
    common: dict[str, Any] = {"driver": "GTiff", "width": SIZE, "height": SIZE, "crs": "EPSG:32610", "tiled": True}
    common |= {"blockxsize": 256, "blockysize": 256}
    for number in range(count):
        pixels, ids = scenes[number % 8]
        pixels = np.roll(pixels, number, axis=2)
        if kind == "uint8":
            layers = np.clip(pixels // 40 + 60, 1, 255).astype(np.uint8)
        elif kind == "uint16":
            layers = (pixels.astype(np.int32) + 4000).astype(np.uint16)
        else:
            layers = (pixels * 1e-4).astype(np.float32)
        transform = from_origin(400_000 + 3000 * (number % 40), 7_990_000 - 3000 * (number // 40), 4, 4)
        with rasterio.open(
            folder / f"scene{number:04d}.tif",
            "w",
            count=BANDS,
            dtype=kind,
            compress=KINDS[kind],
            transform=transform,
            **common,
        ) as file:
            file.write(layers)
        mask = (np.roll(ids, number, axis=1) > 0).astype(np.uint8)
        with rasterio.open(
            folder / f"mask{number:04d}.tif",
            "w",
            count=1,
            dtype="uint8",
            compress="deflate",
            transform=transform,
            **common,
        ) as file:
            file.write(mask, 1)


def bench_data(folder: Path) -> DataConfig:
    """The files of `make_files` as a data set: one modality of all bands, one chip a file, one shard."""
    names = sorted(path.stem.removeprefix("scene") for path in folder.glob("scene*.tif"))
    rows = ["scene,image,number,site", *(f"scene{name},scene{name}.tif,{name},bench" for name in names)]
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return DataConfig(
        name="bench",
        root=str(folder),
        scenes=ScenesConfig(index="index.csv"),
        modalities={"all": {"bands": [str(band) for band in range(1, BANDS + 1)]}},  # pyright: ignore[reportArgumentType]
        primary="all",
        labels={"kind": "mask", "file": "mask{number}.tif"},  # pyright: ignore[reportArgumentType]
        chip={"size_px": SIZE, "overlap_px": 0},  # pyright: ignore[reportArgumentType]
        shard={"tasks": 1},  # pyright: ignore[reportArgumentType]
    )


def shard_files(folder: Path, out: Path) -> tuple[Cell, dict[str, Any]]:
    """Run the stage `preprocess` over the files of `make_files`, as one task; its cell and its results."""
    finetune = FinetuneConfig(modalities=("all",), primary="all")
    config = RunConfig(name="bench", data=bench_data(folder), model=ModelConfig(name="none"), finetune=finetune)
    cell = Cell(id="bench", stage="preprocess", label="bench", config=config)
    results = preprocess.run(cell, RunPaths(out), SILENT)
    if results["rejected"] or len(results["chips"]) != len(list(folder.glob("scene*.tif"))):
        raise SystemExit(f"preprocess did not take every scene: {results['rejected'][:3]}")
    return cell, results


def options(text: str | None, **counts: int) -> argparse.ArgumentParser:
    """A parser with `--json` and a whole number for each of `counts`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


def conclude(report: dict[str, Any], lines: Iterable[str], as_json: bool) -> int:
    """Print `lines` and the ratios beside their targets, or all of `report` as JSON.

    Args:
        report: figures, among them `ratios` and `targets` (the least value of a ratio); `met` is added where it is not.
        lines: the figures for people.
        as_json: print JSON.

    Returns:
        Exit code: 1 when a target is missed.
    """
    ratios, targets = report["ratios"], report["targets"]
    met = report.setdefault("met", {}) | {name: ratios[name] >= least for name, least in targets.items()}
    report["met"] = met
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(*lines, sep="\n")
        for name, ratio in ratios.items():
            judged = f"at least {targets[name]:g}: {'met' if met[name] else 'MISSED'}" if name in met else "no target"
            print(f"{name:22} {ratio:8.2f}  ({judged})")
    return 0 if all(met.values()) else 1
