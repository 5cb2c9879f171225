"""GeoTIFF -> shards against the decode limit and a plain rasterio + h5py gzip loop, in CPU seconds of one run.

    python benchmarks/preprocess.py [--json] [--files 40] [--rounds 6] [--kinds uint8 uint16 float32]

All sides read the same files (5 x 512 x 512 px, page cache warm) with one thread, by turns in `--rounds`; the least
times are compared. `limit` decodes the images and nothing else. `writer` decodes them and writes the shard,
without checksums. `whole` is the stage `preprocess` as it runs in a sweep: scene checks, validity, masks ->
instances, statistics, CRC-32 of every chip, SHA-256 of every shard, sync. `naive` is a group a sample and gzip 4.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import cv2
import h5py
import numpy as np
import rasterio
import torch
from common import BANDS, KINDS, SIZE, conclude, make_files, options, shard_files

from rtshpc.data.normalise import Statistics
from rtshpc.data.shard import Chip, Layout, ShardWriter
from rtshpc.stages.runner import set_memory

LEAST = {"limit / writer": (0.8, 0.8, 0.8), "limit / whole": (0.55, 0.55, 0.4), "naive / whole": (2.5, 2.5, 2.5)}
TARGETS = {f"{kind} {name}": least[number] for name, least in LEAST.items() for number, kind in enumerate(KINDS)}
"""Least CPU seconds of the limit over ours, and of the naive loop over the whole of ours."""


def decode(folder: Path, out: Path) -> None:
    """The limit: every image decoded, nothing kept."""
    for path in sorted(folder.glob("scene*.tif")):
        with rasterio.open(path) as file:
            file.read()


def write(folder: Path, out: Path) -> None:
    """The writer alone, without checksums."""
    valid = {"all": np.ones((SIZE, SIZE), dtype=bool)}
    ids = np.zeros((SIZE, SIZE), dtype=np.uint16)
    none = {"all": Statistics.empty(BANDS)}
    writer: ShardWriter | None = None
    with patch("rtshpc.data.shard.record_crc", lambda *_: 0), patch("rtshpc.data.shard.file_sha256", lambda *_: ""):
        for path in sorted(folder.glob("scene*.tif")):
            with rasterio.open(path) as file:
                pixels, transform = {"all": file.read()}, tuple(file.transform)[:6]
            writer = writer or ShardWriter(out / "alone.h5", Layout.of(pixels))
            chip = Chip(path.stem, path.stem, "site", transform, "")
            writer.append(chip, pixels, valid, ids, (), {"all": (1.0, 0.0)}, none)
        assert writer is not None
        writer.close()


def whole(folder: Path, out: Path) -> None:
    """The stage, one task."""
    shard_files(folder, out)


def naive(folder: Path, out: Path) -> None:
    """What one writes first: a group a sample, gzip 4, automatic chunks."""
    with h5py.File(out / "naive.h5", "w") as store:
        for path in sorted(folder.glob("scene*.tif")):
            mask = folder / path.name.replace("scene", "mask")
            with rasterio.open(path) as image, rasterio.open(mask) as label:
                group = store.create_group(path.stem)
                group.create_dataset("image", data=image.read(), compression="gzip", compression_opts=4)
                group.create_dataset("mask", data=label.read(1), compression="gzip", compression_opts=4)


SIDES: dict[str, Callable[[Path, Path], None]] = {"limit": decode, "writer": write, "whole": whole, "naive": naive}


def measure(folder: Path, work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Least CPU and wall seconds of each side: a busy or virtual machine only adds to them.

    The sides take turns, for such a machine is fast and slow for minutes. In its turn a side runs twice, and the second
    run counts: a virtual machine gets its pages from the host at their first touch and hands back those that lie free
    for seconds; writing to such a page costs ten times the copy, and in the second run the pages are those that the
    first has just freed.
    """
    seconds = {side: {"cpu_s": float("inf"), "wall_s": float("inf")} for side in SIDES}
    for side, run in [*SIDES.items()] * rounds:
        took = {}
        for _ in ("pages", "counts"):
            out = work / "out"
            out.mkdir()
            start = time.process_time(), time.perf_counter()
            run(folder, out)
            took = {"cpu_s": time.process_time() - start[0], "wall_s": time.perf_counter() - start[1]}
            shutil.rmtree(out)
        seconds[side] = {name: min(least, took[name]) for name, least in seconds[side].items()}
    return seconds


def compare(kind: str, seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ratios of one kind of file by the names of TARGETS."""
    limit = seconds["limit"]["cpu_s"]
    return {
        f"{kind} limit / writer": limit / seconds["writer"]["cpu_s"],
        f"{kind} limit / whole": limit / seconds["whole"]["cpu_s"],
        f"{kind} naive / whole": seconds["naive"]["cpu_s"] / seconds["whole"]["cpu_s"],
    }


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed."""
    parser = options(__doc__, files=40, rounds=6)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # As the runner of a task does.
    gc.freeze()
    set_memory("preprocess")
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    with rasterio.Env(GDAL_NUM_THREADS="1"), tempfile.TemporaryDirectory(dir=given.folder) as root:
        for kind in given.kinds:
            make_files(Path(root) / kind, kind, given.files)
            work = Path(root) / "work"
            work.mkdir()
            seconds[kind] = measure(Path(root) / kind, work, given.rounds)
            shutil.rmtree(work)
            shutil.rmtree(Path(root) / kind)
    ratios = {name: ratio for kind in seconds for name, ratio in compare(kind, seconds[kind]).items()}
    targets = {name: TARGETS[name] for name in ratios}
    report = {"benchmark": "preprocess", "files": given.files, "seconds": seconds, "ratios": ratios, "targets": targets}
    lines = [f"{given.files} files of {BANDS} x {SIZE} x {SIZE}; CPU seconds, least of {given.rounds} rounds"]
    for kind, sides in seconds.items():
        lines.append(f"{kind:8} " + "  ".join(f"{side} {value['cpu_s']:.2f}" for side, value in sides.items()))
    return conclude(report, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
