"""Rasters behind a web server: read piece by piece, and named when the server fails in the middle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from ideal_making import config, ideal
from rasterio.transform import Affine

from rtshpc.core.errors import RunError
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.scenes import Scene
from rtshpc.mapping.pieces import read_pieces
from rtshpc.mapping.scenes.survey import survey
from rtshpc.stages.map import run

HEIGHT, WIDTH = 300, 500
MADE = config(overlap_px=6)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """GDAL's name of a folder behind a server."""
    line = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"/vsicurl/http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def sent(folder: Path, name: str) -> int:
    """Bytes that were sent of a file."""
    lines = [line.split() for line in (folder / "sent").read_text().splitlines()]
    return sum(int(count) for file, count in lines if file == name)


def ids() -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), np.int16)
    found[20:260, 40:60], found[100:110, 60:400], found[280:300, 480:500] = 1, 2, 3
    return found


def make(folder: Path) -> None:
    """A COG, and a VRT beside it."""
    place = {"crs": "EPSG:32608", "transform": Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 7_600_000.0), "nodata": -9999}
    profile = {"count": 1, "height": HEIGHT, "width": WIDTH, "dtype": "int16", **place}
    with rasterio.open(folder / "plain.tif", "w", driver="GTiff", **profile) as file:
        file.write(ids(), 1)
    rasterio.shutil.copy(folder / "plain.tif", folder / "cog.tif", driver="COG", blocksize=128, compress="none")
    rasterio.shutil.copy(folder / "cog.tif", folder / "scene.vrt", driver="VRT")


def cell_of(image: str) -> Any:
    scene = Scene(id=image.rsplit("/", 1)[-1], image=image)
    known = MapScene(scene=scene, fingerprint="", **dict(survey([scene], MADE.data, MADE.map)[0]))
    assert known.ground is not None, known.detail
    return SimpleNamespace(id=scene.id, scenes=[known], block=0, config=MADE)


def mapped(image: str, paths: RunPaths) -> list[tuple[Any, ...]]:
    found = run(cell_of(image), paths, lambda *_: None)
    assert found["rejected"] is None and found["mapped"] == found["chips"]
    pieces = read_pieces(paths.cell(image.rsplit("/", 1)[-1]).pieces)
    return [(one.chip, one.row, one.col, one.score, one.mask.tobytes()) for one in pieces]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("rtshpc.stages.map._detect", lambda *_: ideal)
    return RunPaths(tmp_path / "run")


def test_a_cog_and_a_vrt_behind_a_server_are_mapped_as_the_files_themselves(tmp_path: Path, paths: RunPaths) -> None:
    make(tmp_path)
    expected = mapped(str(tmp_path / "plain.tif"), paths)
    with served(tmp_path) as address:
        assert mapped(f"{address}/cog.tif", paths) == expected
        shutil.copy(tmp_path / "cog.tif", tmp_path / "behind.tif")
        text = (tmp_path / "scene.vrt").read_text()
        (tmp_path / "scene.vrt").write_text(text.replace(">cog.tif<", ">behind.tif<"))
        assert mapped(f"{address}/scene.vrt", paths) == expected
    assert sent(tmp_path, "behind.tif") > HEIGHT * WIDTH


def test_a_server_that_fails_in_the_middle_fails_its_scene_by_name_and_no_other(
    tmp_path: Path, paths: RunPaths
) -> None:
    make(tmp_path)
    shutil.copy(tmp_path / "cog.tif", tmp_path / "lost.tif")
    with served(tmp_path) as address:
        cell = cell_of(f"{address}/lost.tif")
        (tmp_path / "left").write_text(str(HEIGHT * WIDTH))
        with pytest.raises(RunError, match=r"lost\.tif.*`retry` reads it again"):
            run(cell, paths, lambda *_: None)
        assert not paths.cell(cell.id).pieces.exists() and sent(tmp_path, "lost.tif") > HEIGHT * WIDTH // 4
        (tmp_path / "left").unlink()
        assert mapped(f"{address}/cog.tif", paths) == mapped(str(tmp_path / "plain.tif"), paths)
        assert mapped(f"{address}/lost.tif", paths)  # what failed is read again
