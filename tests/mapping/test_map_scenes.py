"""Which scenes belong together, and their pixels in strips."""

from __future__ import annotations

import threading
import time
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyproj
import pytest
from geo_making import BANDS, PLACE, reflectance, write_tif
from hypothesis import given, settings, strategies as st

from rtshpc.core.config import ChipConfig, DataConfig, MapConfig, ModalityConfig, ScenesConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.mapping.ground import Ground, Seen
from rtshpc.core.scenes import Scene
from rtshpc.geo.scene import open_scene
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.scenes.groups import grouped
from rtshpc.mapping.scenes.strips import ReadFacts, read_ahead, strips
from rtshpc.mapping.scenes.survey import layout_of, survey

DATA = DataConfig(
    name="small",
    scenes=ScenesConfig(glob="*.tif"),
    modalities={"rgb": ModalityConfig(bands=BANDS[:3]), "nir": ModalityConfig(bands=("nir",), required=False)},
    primary="rgb",
    chip=ChipConfig(size_px=16, overlap_px=0),
)

Rect = tuple[int, int, int, int]
RECTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.integers(1, 9)), max_size=14)


@lru_cache
def wkt(code: int) -> str:
    return pyproj.CRS.from_epsg(code).to_wkt()


def on_lattice(rect: Rect, shift: float = 0.0, crs: int = 32608) -> Seen:
    row, col, height, width = rect
    a, b, c, d, e, f = tuple(PLACE)[:6]
    c, f = c + a * (col + shift), f + e * row
    ground = Ground(crs_wkt=wkt(crs), transform=(a, b, c, d, e, f), height=height, width=width, resolution_m=10)
    return Seen(ground=ground)


def touch(one: Rect, two: Rect) -> bool:
    return all(one[axis] <= two[axis] + two[axis + 2] and two[axis] <= one[axis] + one[axis + 2] for axis in (0, 1))


@given(RECTS)
def test_a_group_is_what_meets_over_any_number_of_steps_and_places_are_those_of_the_lattice(rects: list[Rect]) -> None:
    found = grouped([on_lattice(rect) for rect in rects], [""] * len(rects))
    groups = [{number} for number in range(len(rects))]
    for one in range(len(rects)):
        for two in range(one):
            if touch(rects[one], rects[two]):
                joined = next(g for g in groups if one in g) | next(g for g in groups if two in g)
                groups = [g for g in groups if not g & joined] + [joined]
    for group in groups:
        assert {number for number, seen in enumerate(found) if seen.group == found[min(group)].group} == group
        top, left = min(rects[n][0] for n in group), min(rects[n][1] for n in group)
        assert all((found[n].row, found[n].col) == (rects[n][0] - top, rects[n][1] - left) for n in group)


def test_other_dates_other_lattices_other_crss_and_unusable_scenes_are_groups_of_their_own() -> None:
    here = (0, 0, 8, 8)
    seen = [
        on_lattice(here),
        on_lattice(here),
        on_lattice(here, 0.5),
        on_lattice(here, crs=32609),
        Seen(reason="no_crs"),
    ]
    dates = ["2020-07-01", "2021-07-01", "2020-07-01", "2020-07-01", "2020-07-01"]
    assert [one.group for one in grouped(seen, dates)] == [0, 1, 2, 3, 4]
    assert [one.group for one in grouped([*seen, on_lattice((8, 3, 2, 2))], [*dates, dates[0]])] == [0, 1, 2, 3, 4, 0]


def test_grouping_thousands_of_scenes_takes_a_moment() -> None:
    rects = [(20 * (n // 80), 20 * (n % 80), 10, 10) for n in range(4000)]
    began = time.process_time()
    assert len({one.group for one in grouped([on_lattice(rect) for rect in rects], [""] * 4000)}) == 4000
    assert time.process_time() - began < 5


@pytest.mark.parametrize(("height", "width"), [(40, 50), (16, 16), (9, 70), (5, 6)])
@pytest.mark.parametrize("block_px", [64, 20])
def test_strips_hold_the_chips_of_the_scene_each_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, block_px: int
) -> None:
    monkeypatch.setattr("rtshpc.mapping.scenes.strips.STRIP_PX", 28 * width)
    pixels = reflectance(height, width)
    pixels[:, : height // 2, : width // 3] = -9999
    scene = Scene(id="a", image=str(write_tif(tmp_path / "a.tif", pixels, BANDS, nodata=-9999)))
    seen = survey([scene], DATA, MapConfig(overlap_px=4))[0]
    assert seen.ground is not None
    layout, told = layout_of(seen.ground, DATA, MapConfig(overlap_px=4)), list[int]()
    with open_scene(scene, DATA, False) as opened:
        for chips in layout.blocks(block_px):
            for strip in strips(scene, seen.ground, layout, chips, DATA, ReadFacts()):
                for number, box in strip.chips:
                    mine, theirs = strip.chip(box), opened.read(box)
                    assert box == layout.boxes()[number] and told.append(number) is None
                    for name in DATA.modalities:
                        np.testing.assert_array_equal(mine.pixels[name], theirs.pixels[name])
                        np.testing.assert_array_equal(mine.valid[name], theirs.valid[name])
    assert sorted(told) == list(range(len(layout.boxes())))


def test_a_file_is_decoded_once_with_a_cache_that_is_far_smaller_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtshpc.mapping.scenes.strips.STRIP_PX", 1)
    noise = np.random.default_rng(0).integers(1, 30_000, (5, 3072, 512), dtype=np.int16)
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "interleave": "pixel"}
    path = write_tif(tmp_path / "a.tif", noise, BANDS, nodata=-9999, **tiles)
    data = DATA.model_copy(update={"chip": ChipConfig(size_px=128, overlap_px=0), "min_valid_fraction": 0.0})
    scene, mapping = Scene(id="a", image=str(path)), MapConfig(overlap_px=32)
    ground = survey([scene], data, mapping)[0].ground
    assert ground is not None
    layout = layout_of(ground, data, mapping)
    with open_scene(scene, data, False, 0) as opened:
        needed = opened.decoded_bytes(128, 512)
    began = _bytes_read()
    for _ in strips(scene, ground, layout, range(len(layout.boxes())), data, ReadFacts()):
        pass
    looked_at = 1024 * 512 * 5 * 2  # by opening it, before the first strip
    assert needed is not None and needed < noise.nbytes / 3
    assert noise.nbytes <= _bytes_read() - began < 1.1 * noise.nbytes + looked_at


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_scene_in_a_virtual_file_is_read_as_the_file_itself(tmp_path: Path) -> None:
    write_tif(tmp_path / "a.tif", reflectance(20, 30), BANDS)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.tif", "inside/a.tif")
    names = [str(tmp_path / "a.tif"), f"/vsizip/{tmp_path}/all.zip/inside/a.tif"]
    read: list[np.ndarray] = []
    for name in names:
        scene = Scene(id="a", image=name)
        seen = survey([scene], DATA, MapConfig())[0]
        assert seen.ground is not None, seen.detail
        layout = layout_of(seen.ground, DATA, MapConfig())
        chips = range(len(layout.boxes()))
        read.append(
            np.stack(
                [
                    s.chip(b).pixels["rgb"]
                    for s in strips(scene, seen.ground, layout, chips, DATA, ReadFacts())
                    for _, b in s.chips
                ]
            )
        )
    np.testing.assert_array_equal(*read)


def test_a_scene_that_has_another_grid_than_it_was_submitted_with_is_rejected_by_name(tmp_path: Path) -> None:
    scene = Scene(id="a", image=str(write_tif(tmp_path / "a.tif", reflectance(20, 30), BANDS)))
    ground = survey([scene], DATA, MapConfig())[0].ground
    assert ground is not None
    write_tif(tmp_path / "a.tif", reflectance(30, 30), BANDS)
    with pytest.raises(SceneRejected) as error:
        list(strips(scene, ground, Layout(20, 30, 16, 4), [0], DATA, ReadFacts()))
    assert error.value.reason == "changed"


def numbers(until: int, fail: bool = False) -> Iterator[int]:
    yield from range(until)
    if fail:
        raise KeyError("why")


@given(st.integers(0, 9), st.integers(1, 3))
@settings(max_examples=10)
def test_what_is_read_ahead_comes_in_order_and_its_thread_ends(until: int, ahead: int) -> None:
    with read_ahead(numbers(until), ahead) as items:  # pyright: ignore[reportArgumentType]
        assert list(items) == list(range(until))
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_an_error_of_the_reader_is_raised_where_its_items_are_taken_and_leaving_early_ends_it() -> None:
    with pytest.raises(KeyError, match="why"), read_ahead(numbers(3, True)) as items:  # pyright: ignore[reportArgumentType]
        assert next(items) == 0
        list(items)
    with read_ahead(numbers(1000)) as items:  # pyright: ignore[reportArgumentType]
        assert next(items) == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
