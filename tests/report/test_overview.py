"""The page of a map run: pictures lie where their scenes do, in a real browser too, and it needs no network."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import cv2
import numpy as np
import pytest
from browsing import asked, browse, needs_chromium
from geo_making import BANDS, config, reflectance, write_tif
from publish_making import make_run
from rasterio.transform import Affine

from rtshpc.core.errors import SceneRejected
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT
from rtshpc.core.scenes import Scene
from rtshpc.report.overview.quicklook import picture_size, quicklook, write_quicklooks
from rtshpc.stages import publish

SECTIONS = ("glance", "map", "sites", "scores", "scenes", "absent", "provenance")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths, cell = make_run(tmp_path_factory.mktemp("published"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTSHPC_GDAL_PYTHON", "/nowhere")
        publish.run(cell, paths, SILENT)
    return paths


@pytest.mark.slow
@needs_chromium
def test_chromium_draws_every_map_without_a_console_message(published: RunPaths, tmp_path: Path) -> None:
    shown = browse(published.report_page, tmp_path / "profile", "--dump-dom")
    assert [line for line in shown.stderr.splitlines() if ":CONSOLE" in line] == []
    for name in SECTIONS:
        assert f'<section id="{name}">' in shown.stdout
    page = published.report_page.read_text()
    for mark in ('class="map"', "<use ", "<image ", '<g class="slumps">'):
        assert shown.stdout.count(mark) == page.count(mark) > 0


@pytest.mark.slow
@needs_chromium
def test_pictures_footprints_and_slumps_lie_on_each_other_in_a_browser(published: RunPaths, tmp_path: Path) -> None:
    box = "(e=>{const b=e.getBoundingClientRect();return [b.left,b.top,b.right,b.bottom]})"
    maps = f"[...d.querySelectorAll('svg.map')].map(m=>['use','path.mapped','g.slumps'].map(q=>[...m.querySelectorAll(q)].map({box})))"
    found = json.loads(unescape(asked(published.report_page, tmp_path, f"JSON.stringify({maps})", width=1100)))
    scenes = slumps = 0
    for pictures, outlines, marks in found:
        np.testing.assert_allclose(pictures, outlines, atol=2.5)
        scenes += len(outlines)
        outer = np.array(outlines)
        for left, top, right, bottom in marks:
            slumps += 1
            inside = (
                (left > outer[:, 0] - 4)
                & (top > outer[:, 1] - 4)
                & (right < outer[:, 2] + 4)
                & (bottom < outer[:, 3] + 4)
            )
            assert inside.any()
    assert scenes >= 10 and slumps >= 8


@pytest.mark.slow
@needs_chromium
def test_the_overview_is_no_wider_than_a_phone_and_shows_its_pictures(published: RunPaths, tmp_path: Path) -> None:
    assert int(asked(published.report_page, tmp_path, "d.documentElement.scrollWidth")) <= 360


def test_the_page_asks_no_network_and_runs_no_script(published: RunPaths) -> None:
    page = published.report_page.read_text()
    assert "://" not in page and "<script" not in page
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:href|src)="([^"]*)"', page))


@pytest.mark.parametrize("way", ["north up", "south up", "mirrored"])
def test_a_picture_is_the_scene_the_right_way_up_and_clear_where_it_is_empty(tmp_path: Path, way: str) -> None:
    pixels = reflectance(900, 600)
    pixels[:3, :300], pixels[:3, 300:] = 300, 3000
    pixels[:3, :300, :200] = 2000
    pixels[:, :150, 450:] = -32768
    place = {
        "north up": Affine(10, 0, 500_000, 0, -10, 7_600_000),
        "south up": Affine(10, 0, 500_000, 0, 10, 7_591_000),
        "mirrored": Affine(-10, 0, 506_000, 0, -10, 7_600_000),
    }[way]
    stored = {"north up": pixels, "south up": pixels[:, ::-1], "mirrored": pixels[:, :, ::-1]}[way]
    image = write_tif(tmp_path / "a.tif", np.ascontiguousarray(stored), BANDS, transform=place, nodata=-32768)
    scene = Scene(id="a", image=str(image))
    picture = cv2.imdecode(np.frombuffer(quicklook(scene, config(tmp_path)), np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (*picture_size(900, 600), 4) == (400, 267, 4)
    assert picture[20, 250, 3] == 0 and picture[20, 100, 3] == 255
    assert picture[60, 40, :3].mean() > picture[60, 150, :3].mean() + 50
    assert picture[300, 40, :3].mean() > picture[60, 150, :3].mean() + 50


def test_a_scene_without_a_picture_is_named_and_the_others_have_theirs(tmp_path: Path) -> None:
    image = write_tif(tmp_path / "a.tif", reflectance(), BANDS)
    scenes = {
        tmp_path / "0.webp": Scene(id="lost", image="lost.tif"),
        tmp_path / "1.webp": Scene(id="a", image=str(image)),
    }
    notes = write_quicklooks(scenes, config(tmp_path))
    assert len(notes) == 1 and notes[0].startswith("lost: no picture: missing_file: ")
    assert [path.exists() for path in scenes] == [False, True]
    with pytest.raises(SceneRejected):
        quicklook(Scene(id="lost", image="lost.tif"), config(tmp_path))
