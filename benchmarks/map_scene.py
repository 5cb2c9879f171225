"""Chips of large scenes to a detector that costs nothing, against rasterio reading the same bytes once; and peak memory.

    python benchmarks/map_scene.py [--json] [--sizes 5000 10000 20000] [--repeats 3] [--block 5120] [--folder DIR]

A scene is a tiled GeoTIFF of five int16 bands (512 px tiles, deflate), all of which a detector takes. `bare` reads its rows of tiles with rasterio, in one thread, and keeps nothing. `ours` is what stage
`map` does block by block: chips of 256 px with 64 px of overlap, validity, normalisation, batches of one, and a detector that
finds nothing. Both give chips a wall second; the best of `--repeats`, taken by turns, with a warm page cache. The peak is what
one task takes: the highest resident memory of a fresh process that maps one block, less what it held before the first chip.
Both sides run with one place to take memory from, as map tasks do (`stages/runner.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import rasterio
import torch
from common import conclude, options
from rasterio.transform import from_origin
from rasterio.windows import Window

from rtshpc.core.config import GeneratedConfig, MapConfig, RunConfig
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.scenes import Scene
from rtshpc.core.sizing.measured import peak_rss
from rtshpc.data.synthetic import draw, draw_block
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.scenes.strips import ReadFacts
from rtshpc.mapping.scenes.survey import layout_of, survey
from rtshpc.model.detections import Detections
from rtshpc.stages.map import find_pieces, ready_chips

TILE, NODATA = 512, -32768
BANDS = ("red", "green", "blue", "ndvi", "nir")
LEAST_SPEED, LEAST_FLAT, MOST_BYTES = 0.8, 0.8, 2e9
ONE_ARENA = os.environ | {"MALLOC_ARENA_MAX": "1"}
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28))


def make_scene(path: Path, size: int) -> None:
    """A scene of `size` px a side, of eight different generated tiles in turns."""
    config = GeneratedConfig(size_px=TILE, slumps_per_scene=(4, 8), nodata_fraction=0)
    tiles = [draw_block(draw(config, "banks", number), 0, 0, TILE, TILE)[0] for number in range(8)]
    profile: dict[str, Any] = {"driver": "GTiff", "width": size, "height": size, "count": 5, "dtype": "int16"}
    profile |= {"crs": "EPSG:32610", "transform": from_origin(400_000, 7_990_000, 4, 4), "nodata": NODATA}
    profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "zlevel": 1}
    with rasterio.open(path, "w", bigtiff="if_safer", num_threads="all_cpus", **profile) as file:
        file.descriptions = BANDS
        file.scales = [1e-4] * 5
        for row in range(0, size, TILE):
            for col in range(0, size, TILE):
                height, width = min(TILE, size - row), min(TILE, size - col)
                tile = tiles[(row // TILE * 3 + col // TILE) % 8]
                file.write(tile[:, :height, :width], window=Window(col, row, width, height))  # pyright: ignore[reportCallIssue]


def config_of(block_px: int) -> RunConfig:
    """A detector of three modalities."""
    modalities = {"rgb": {"bands": list(BANDS[:3])}, "ndvi": {"bands": ["ndvi"]}, "nir": {"bands": ["nir"]}}
    normal = {
        name: {"mean": [0.1] * len(one["bands"]), "std": [0.1] * len(one["bands"])} for name, one in modalities.items()
    }
    data = {"name": "bench", "scenes": {"glob": "*"}, "modalities": modalities, "primary": "rgb"}
    mapping = {"modalities": list(modalities), "statistics": normal, "block_px": block_px}
    finetune = {"modalities": list(modalities)}
    return RunConfig.model_validate(
        {"name": "bench", "data": data, "model": {"name": "none"}, "finetune": finetune, "map": mapping}
    )


def bare(path: Path) -> float:
    """Seconds that rasterio takes to read every tile once, a row of tiles at a time."""
    with rasterio.Env(GDAL_NUM_THREADS="1", GDAL_CACHEMAX=256 << 20), rasterio.open(path) as file:
        began = time.perf_counter()
        for row in range(0, file.height, TILE):
            for col in range(0, file.width, 16 * TILE):
                width, height = min(16 * TILE, file.width - col), min(TILE, file.height - row)
                file.read(window=Window(col, row, width, height))  # pyright: ignore[reportCallIssue]
        return time.perf_counter() - began


def ours(scene: MapScene, layout: Layout, config: RunConfig, blocks: Sequence[list[int]]) -> float:
    """Seconds that blocks of a scene take with a detector that finds nothing."""
    assert scene.ground is not None
    began = time.perf_counter()
    for chips in blocks:
        ready = ready_chips(scene, scene.ground, layout, chips, config, ReadFacts())
        found = find_pieces(ready, lambda images: [NOTHING], config, layout, lambda done: None)
        if found.mapped != len(chips):
            raise SystemExit(f"{found.mapped} of {len(chips)} chips were mapped")
    return time.perf_counter() - began


def measure(path: Path, repeats: int, block_px: int) -> dict[str, float]:
    """Chips a second of both sides, and the peak memory of ours, of one scene in this process."""
    config = config_of(block_px)
    torch.set_num_threads(1)
    scene = Scene(id="bench", image=str(path))
    known = MapScene(scene=scene, fingerprint="", **dict(survey([scene], config.data, config.map)[0]))
    assert known.ground is not None
    layout = layout_of(known.ground, config.data, config.map)
    blocks = layout.blocks(config.map.block_px)
    before = psutil.Process().memory_info().rss
    ours(known, layout, config, blocks[:1])
    peak = max(1 << 20, peak_rss() - before)  # less than 1 MiB is noise
    pairs = [(bare(path), ours(known, layout, config, blocks)) for _ in range(repeats)]
    chips = len(layout.boxes())
    least = [min(seconds) for seconds in zip(*pairs, strict=True)]
    return {"chips": chips, "bare": chips / least[0], "ours": chips / least[1], "peak_bytes": peak}


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed."""
    parser = options(__doc__, repeats=3, block=MapConfig().block_px)
    parser.add_argument("--sizes", nargs="+", type=int, default=[5000, 10_000, 20_000], help="sides of the scenes, px")
    parser.add_argument("--folder", type=Path, help="where the scenes are made (default: the temporary folder)")
    parser.add_argument("--scene", type=Path, help="measure this one scene in this process, and print JSON")
    given = parser.parse_args(arguments)
    if given.scene is not None:
        print(json.dumps(measure(given.scene, given.repeats, given.block)))
        return 0
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        for size in given.sizes:
            path = Path(root) / f"{size}.tif"
            make_scene(path, size)
            line = [
                sys.executable,
                __file__,
                "--scene",
                str(path),
                "--repeats",
                str(given.repeats),
                "--block",
                str(given.block),
            ]
            told = subprocess.run(line, env=ONE_ARENA, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[size] = json.loads(told)
            path.unlink()
    ratios = {f"ours / bare, {size} px": one["ours"] / one["bare"] for size, one in found.items()}
    targets = dict.fromkeys(ratios, LEAST_SPEED)
    peaks = [one["peak_bytes"] for one in found.values()]
    ratios |= {"first peak / last": peaks[0] / peaks[-1], "2 GB / highest peak": MOST_BYTES / max(peaks)}
    targets |= {"first peak / last": LEAST_FLAT, "2 GB / highest peak": 1.0}
    lines = [
        f"{size:6} px: {one['chips']:6.0f} chips, bare {one['bare']:7.1f}/s, ours {one['ours']:7.1f}/s, peak {one['peak_bytes'] / 1e6:.0f} MB"
        for size, one in found.items()
    ]
    report = {"benchmark": "map_scene", "sizes": found, "block_px": given.block, "ratios": ratios, "targets": targets}
    return conclude(report, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
