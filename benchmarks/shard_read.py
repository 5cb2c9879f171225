"""Random reads of chips: our shards against memmap, GeoTIFF and TorchGeo, in CPU milliseconds a sample of one run.

    python benchmarks/shard_read.py [--json] [--files 200] [--passes 5] [--repeats 3]

All sides give the same chips (5 x 512 x 512 px uint8 and their mask) in random order, page cache warm. Within the
process: `memmap` copies a packed record, `shard` reads one of ours. Through a DataLoader with one worker and
batches of 8: `memmap` (a dataset of packed records and the default collate function), `records` (ours as they are
stored: image, validity, instance ids), `samples` (ours as the training takes them: normalised float32, validity,
a mask an instance), `geotiff` (LZW, rasterio, image and mask) and `torchgeo` (RasterDataset over the same images,
without the mask). The CPU time of the worker counts; every page that arrives is touched.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import rasterio
import torch
from common import BANDS, SIZE, bench_data, conclude, make_files, options, shard_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import RasterDataset

from rtshpc.core.cell import RESULT_VERSION
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.data.reader import ShardDataset
from rtshpc.data.sample import collate
from rtshpc.stages import gather

BATCH = 8
TARGETS = {"memmap / records": 1.0, "torchgeo / records": 9.0}
"""Least CPU time of a peer over ours, through the loader."""


class Memmap(Dataset[Tensor]):
    """Image and mask of every chip in one flat file: the limit."""

    def __init__(self, path: Path, count: int) -> None:
        self._records = np.memmap(path, np.uint8, "r", shape=(count, BANDS + 1, SIZE, SIZE))

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(np.array(self._records[row]))


class Records(Dataset[Tensor]):
    """Our shards as stored, a whole batch at once in shared memory."""

    def __init__(self, shards: ShardDataset) -> None:
        self._shards = shards

    def __getitem__(self, row: int) -> Tensor:
        return self._shards.read([row]).data[0]

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        return self._shards.read(rows, shared=True).data


class GeoTiff(Dataset[Tensor]):
    """Image and mask by rasterio, a file each."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def __getitem__(self, row: int) -> Tensor:
        with rasterio.open(self._folder / f"scene{row:04d}.tif") as image:
            pixels = image.read()
        with rasterio.open(self._folder / f"mask{row:04d}.tif") as mask:
            return torch.from_numpy(np.concatenate([pixels, mask.read()]))


class Torchgeo(Dataset[Tensor]):
    """TorchGeo's dataset, asked for the ground of one chip."""

    def __init__(self, folder: Path, count: int) -> None:
        paths = [str(folder / f"scene{row:04d}.tif") for row in range(count)]
        self._raster = RasterDataset(paths)
        found: geopandas.GeoDataFrame = self._raster.index
        bounds = list(found.bounds.itertuples(index=False))
        order = dict(zip(found.filepath, bounds, strict=True))
        self._bounds = [order[path] for path in paths]

    def __getitem__(self, row: int) -> Tensor:
        left, bottom, right, top = self._bounds[row]
        return self._raster[slice(left, right), slice(bottom, top)]["image"]


def training_batch(samples: Any) -> Any:
    """What the training's loader passes on: images and targets."""
    batch = collate(samples)
    return [*batch.images.values(), *(target.masks for target in batch.targets)]


def same(value: Any) -> Any:
    """No collation: the dataset gave a whole batch."""
    return value


def make(root: Path, count: int) -> tuple[Path, ShardDataset]:
    """Files, the memmap of them, and the shards of the same chips."""
    folder = root / "uint8"
    make_files(folder, "uint8", count)
    with (root / "packed.bin").open("wb") as file:
        for row in range(count):
            file.write(GeoTiff(folder, count)[row].numpy().tobytes())
    paths = RunPaths(root / "run")
    paths.create()
    cell, results = shard_files(folder, paths.root)
    record = Record(
        cell=cell.id,
        stage=cell.stage,
        label=cell.label,
        result_version=RESULT_VERSION[cell.stage],
        started="",
        seconds=0.0,
        results=results,
    )
    write_record(paths.cell(cell.id).record, record)
    merged = cell.model_copy(update={"id": "gather", "stage": "gather", "needs": (cell.id,)})
    gather.run(merged, paths, SILENT)
    return folder, ShardDataset(paths.index, bench_data(folder), "", ("all",))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def touch(batch: Any) -> int:
    """Read one byte a page of all that came."""
    if not isinstance(batch, Tensor):
        return sum(touch(part) for part in batch)
    flat = batch.reshape(-1)
    return int(flat[:: 4096 // batch.element_size()].sum())


def loaded(dataset: Dataset[Any], rows: Sequence[int], gather_batch: Callable[[Any], Any] | None) -> float:
    """CPU milliseconds a sample through a loader with one worker."""
    loader = DataLoader(dataset, BATCH, sampler=rows, num_workers=1, collate_fn=gather_batch)  # pyright: ignore[reportArgumentType]
    start = cpu_seconds()
    for batch in loader:
        touch(batch)
    del loader
    return (cpu_seconds() - start) / len(rows) * 1e3


def inside(read: Callable[[int], Any], rows: Sequence[int]) -> float:
    """CPU milliseconds a sample within this process."""
    start = time.process_time()
    for row in rows:
        read(row)
    return (time.process_time() - start) / len(rows) * 1e3


def measure(root: Path, count: int, passes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Least milliseconds of each side, taken in turn."""
    folder, shards = make(root, count)
    packed = Memmap(root / "packed.bin", count)
    order = torch.Generator().manual_seed(1)
    once = torch.randperm(count, generator=order).tolist()
    often = [row for _ in range(passes) for row in torch.randperm(count, generator=order).tolist()]
    sides: dict[str, Callable[[], float]] = {
        "in process: memmap": lambda: inside(packed.__getitem__, often),
        "in process: shard": lambda: inside(lambda row: shards.read([row]), often),
        "loader: memmap": lambda: loaded(packed, often, None),
        "loader: records": lambda: loaded(Records(shards), often, same),
        "loader: samples": lambda: loaded(shards, once, training_batch),
        "loader: geotiff": lambda: loaded(GeoTiff(folder, count), once, None),
        "loader: torchgeo": lambda: loaded(Torchgeo(folder, count), once, None),
    }
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, run in sides.items():
            milliseconds = run()
            if repeat:  # the first round warms caches
                taken[side].append(milliseconds)
    return {side: min(values) for side, values in taken.items()}


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed."""
    parser = options(__doc__, files=200, passes=5, repeats=3)
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        times = measure(Path(root), given.files, given.passes, given.repeats)
    ratios = {name: times[f"loader: {name.split(' / ')[0]}"] / times["loader: records"] for name in TARGETS}
    ratios["torchgeo / samples"] = times["loader: torchgeo"] / times["loader: samples"]
    report = {"benchmark": "shard_read", "cpu_ms": times, "ratios": ratios, "targets": TARGETS}
    lines = [f"CPU milliseconds a sample of {BANDS} x {SIZE} x {SIZE} uint8, least of {given.repeats}"]
    lines += [f"{side:22} {value:8.3f}" for side, value in times.items()]
    return conclude(report, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
