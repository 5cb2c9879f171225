"""A map run as its merges leave it: records, tables and pictures of a few drawn scenes, without a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyproj
from geo_making import BANDS, config, reflectance, write_tif
from rasterio.transform import Affine

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import MapConfig, RunConfig
from rtshpc.core.load import load_run, write_cell
from rtshpc.core.mapping.cells import map_cells
from rtshpc.core.mapping.ground import Ground, MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, file_sha256, write_json, write_record
from rtshpc.core.scenes import Scene
from rtshpc.mapping.attributes import Origin, describe
from rtshpc.mapping.features import write_features
from rtshpc.mapping.mosaic import MapInstance
from rtshpc.mapping.outlines import outlines
from rtshpc.report.overview.quicklook import write_quicklooks

SIDE = 120
PLACES = {
    # name -> site, date, EPSG, left, top, group
    "west": ("Banks", "2020-07-01", 32608, 500_000.0, 7_700_000.0, 0),
    "west again": ("Banks", "2021-07-03", 32608, 500_300.0, 7_700_100.0, 1),
    "zone <9>": ("Banks", "2020-07-01", 32609, 280_000.0, 7_702_000.0, 2),
    "over": ("Banks", "2020-07-01", 32609, 264_752.0, 7_711_509.0, 6),
    "seam": ("Chukotka", "2020", 32601, 379_317.0, 7_650_000.0, 3),
    "empty": ("Chukotka", "", 32601, 390_000.0, 7_650_000.0, 4),
}


def scenes(folder: Path) -> list[MapScene]:
    """The scenes, one of them broken."""
    found = []
    for number, (name, (site, date, epsg, left, top, group)) in enumerate(PLACES.items()):
        place = Affine(10, 0, left, 0, -10, top)
        pixels = reflectance(SIDE, SIDE, number)
        pixels[:, :20, :30] = -32768
        image = write_tif(folder / f"{number}.tif", pixels, BANDS, f"EPSG:{epsg}", place, 1e-4, nodata=-32768)
        ground = Ground(
            crs_wkt=pyproj.CRS.from_epsg(epsg).to_wkt(),
            transform=tuple(place)[:6],
            height=SIDE,
            width=SIDE,
            resolution_m=10,  # pyright: ignore[reportArgumentType]
        )
        scene = Scene(id=name, image=str(image), site=site, date=date)
        found.append(MapScene(scene=scene, fingerprint=f"{number:064x}", ground=ground, group=group))
    broken = Scene(id="broken", image=str(folder / "broken.tif"), site="Peel")
    found.append(MapScene(scene=broken, fingerprint="b" * 64, group=5, reason="truncated", detail="strip 7"))
    return sorted(found, key=lambda one: one.scene.id)


def run_config(folder: Path, **mapping: Any) -> RunConfig:
    """Of a map run."""
    values = {
        "model": str(folder / "model"),
        "model_label": "a run: finetune rgb",
        "model_sha256": "a" * 64,
        "modalities": ("rgb",),
    }
    values = MapConfig.model_validate({**values, **mapping})
    return load_run("demo").model_copy(update={"name": "peel-map", "data": config(folder), "map": values})


def make_run(folder: Path, **mapping: Any) -> tuple[RunPaths, Cell]:
    """Write what the merges of a run leave; the cell that publishes it."""
    paths, wanted = RunPaths(folder / "map run"), run_config(folder, **mapping)
    paths.create()
    cells = map_cells(wanted, scenes(folder / "images"))
    for cell in cells:
        if cell.stage != "map":
            paths.cell(cell.id).root.mkdir()
            write_cell(paths.cell(cell.id).config, cell)
        if cell.stage == "merge":
            _merged(cell, paths)
    return paths, cells[-1]


def _merged(cell: Cell, paths: RunPaths) -> None:
    scene, folder = cell.scenes[0], paths.cell(cell.id)
    files: list[dict[str, Any]] = []
    count = 0
    if scene.ground is not None:
        instances = [] if scene.scene.id == "empty" else _instances(scene.scene.id)
        count = len(instances)
        six = scene.ground.transform
        rows, _ = describe(
            instances,
            outlines(instances, six),
            scene.ground.crs_wkt,
            six,
            [scene],
            cell.config.data,
            Origin("a run: finetune rgb", "5eed"),
        )
        write_features(folder.instances, rows)
        files = [
            {
                "file": folder.instances.name,
                "bytes": folder.instances.stat().st_size,
                "sha256": file_sha256(folder.instances),
            }
        ]
        assert write_quicklooks({folder.quicklook(0): scene.scene}, cell.config.data) == []
    state = {
        **{
            key: getattr(scene.scene, name)
            for key, name in (("scene", "id"), ("site", "site"), ("date", "date"), ("image", "image"))
        },
        "ground": None if scene.ground is None else scene.ground.model_dump(mode="json"),
        "state": "rejected" if scene.ground is None else "mapped",
        "reason": scene.reason,
        "detail": scene.detail,
        "valid_px": 0 if scene.ground is None else SIDE * SIDE - 600,
        "instances": count,
    }
    results = {"inputs": {}, "scenes": [state], "instances": count, "notes": [], "files": files}
    record = Record(
        cell=cell.id,
        stage="merge",
        label=cell.label,
        result_version=RESULT_VERSION["merge"],
        started="2031-02-03T04:05:07+00:00",
        seconds=1.0,
        results=results,
    )
    write_record(folder.record, record)


def _instances(name: str) -> list[MapInstance]:
    draw = np.random.default_rng(len(name))
    found = []
    for row, col, size in ((25, 40, 9), (60, 20, 30), (70, 80, 3), (5, 100, 14)):
        mask = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)).astype(bool)
        mask[size // 3 : size // 2, size // 3 : size // 2] = False
        found.append(MapInstance(row, col, mask, float(draw.uniform(0.5, 1)), 0, name, 1))
    return found


def trained(folder: Path, threshold: float) -> None:
    """The folder of the model, with what its validations said."""
    rows = [
        {"kind": "val", "epoch": epoch, "f1": 10.0 * epoch, "threshold": threshold + 0.1 * (epoch - 2)}
        for epoch in (1, 2, 3)
    ]
    (folder / "model").mkdir()
    (folder / "model" / "metrics.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    record = Record(
        cell="model",
        stage="finetune",
        label="m",
        result_version=1,
        started="2031-02-03T04:05:07+00:00",
        seconds=1.0,
        results={"best_epoch": 2},
    )
    write_json(folder / "model" / "record.json", record.model_dump(mode="json"))
