from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from pyproj import CRS, Transformer

from rtshpc.core.config import SplitConfig
from rtshpc.core.errors import DataError
from rtshpc.data.split import Footprint, overlap_groups, split_chips, split_scenes

ZONE8, ZONE9 = CRS.from_epsg(32608).to_wkt(), CRS.from_epsg(32609).to_wkt()


def square(name: str, x: float, y: float, side: float = 1000, crs: str = ZONE8, **facts: str) -> Footprint:
    corners = ((x, y), (x + side, y), (x + side, y - side), (x, y - side))
    given = {"site": "peel", "split": "", "group": "", **facts}
    return Footprint(name, given["site"], given["split"], given["group"], crs, corners)


def names(scenes: list[Footprint]) -> list[list[str]]:
    return [[scenes[number].scene for number in group] for group in overlap_groups(scenes)]


def test_scenes_that_share_ground_are_one_group_and_neighbours_are_not() -> None:
    scenes = [square("a", 0, 0), square("b", 990, 0), square("c", 1990, 0), square("d", 3000, 0), square("e", 0, -1000)]
    assert names(scenes) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_overlap_is_found_across_utm_zones() -> None:
    x, y = Transformer.from_crs(32608, 32609, always_xy=True).transform(690_000, 7_460_000)
    scenes = [
        square("a", 689_500, 7_460_500),
        square("b", x - 500, y + 500, crs=ZONE9),
        square("c", x + 5000, y, crs=ZONE9),
    ]
    assert names(scenes) == [["a", "b"], ["c"]]


def test_overlap_is_found_across_the_date_line() -> None:
    first, last = CRS.from_epsg(32601).to_wkt(), CRS.from_epsg(32660).to_wkt()
    x1, y1 = Transformer.from_crs(4326, 32601, always_xy=True).transform(-179.999, 70)
    x60, y60 = Transformer.from_crs(4326, 32660, always_xy=True).transform(179.999, 70)
    scenes = [square("a", x1 - 500, y1 + 500, crs=first), square("b", x60 - 500, y60 + 500, crs=last)]
    scenes.append(square("c", x60 - 9000, y60 + 500, crs=last))
    assert names(scenes) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("epsg", "one", "two", "apart", "side"),
    [
        (4326, (179.995, 68.0), (-180.004, 68.0), (-179.9, 68.0), 0.013),
        (4326, (226.0, 69.0), (-134.0, 69.0), (-133.9, 69.0), 0.013),
        (4326, (180.0, 68.0), (-180.0, 68.0), (0.0, 68.0), 0.013),
        (3857, (20_037_000.0, 1e7), (-20_038_000.0, 1e7), (-20_030_000.0, 1e7), 2000.0),
        (32662, (20_037_000.0, 7e6), (-20_038_000.0, 7e6), (-20_030_000.0, 7e6), 2000.0),
    ],
)
def test_overlap_is_found_where_one_crs_names_a_place_twice(
    epsg: int, one: tuple[float, float], two: tuple[float, float], apart: tuple[float, float], side: float
) -> None:
    crs = CRS.from_epsg(epsg).to_wkt()
    scenes = [square(name, *at, side=side, crs=crs) for name, at in zip("abc", (one, two, apart), strict=True)]
    assert names(scenes) == [["a", "b"], ["c"]]
    split = split_scenes(
        [square("a", *one, side=side, crs=crs, site="p"), square("b", *two, side=side, crs=crs, site="q")],
        SplitConfig(rule="site", test_sites=("q",)),
    )
    assert set(split.values()) == {"test"}


def test_neighbours_in_degrees_are_no_overlap() -> None:
    crs = CRS.from_epsg(4326).to_wkt()
    scenes = [square(f"{x}{y}", 100 + 0.5 * x, 68 + 0.25 * y, side=0.5, crs=crs) for x in range(3) for y in (0, 2)]
    assert len(names(scenes)) == 6


def test_a_named_group_joins_scenes_wherever_they_lie() -> None:
    scenes = [
        square("a", 0, 0, group="g"),
        square("b", 9e4, 0, group="g"),
        square("c", 9e4 + 500, 0),
        square("d", 5e5, 0),
    ]
    assert names(scenes) == [["a", "b", "c"], ["d"]]


scene_lists = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 12),
        st.sampled_from("pqr"),
        st.sampled_from(["", "", "", "g1", "g2"]),
        st.sampled_from(["train", "val", "test"]),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(drawn=scene_lists, rule=st.sampled_from(["stratified", "column", "site"]), seed=st.integers(0, 9))
def test_overlapping_scenes_stay_together_under_every_rule(drawn: list[tuple], rule: str, seed: int) -> None:
    scenes = [
        square(f"s{i}", 700 * x, -700 * y, site=site, group=group, split=split)
        for i, (x, y, site, group, split) in enumerate(drawn)
    ]
    config = SplitConfig(rule=rule, test_sites=(scenes[0].site,), seed=seed)
    result = split_scenes(scenes, config)
    assert set(result) == {scene.scene for scene in scenes}
    for group in names(sorted(scenes, key=lambda scene: scene.scene)):
        ordered = sorted(scenes, key=lambda scene: scene.scene)
        assert group and ordered
        assert len({result[name] for name in group}) == 1
    chips = [{"id": f"{s.scene}-{i}", "scene": s.scene, "site": s.site} for s in scenes for i in range(2)]
    splits = split_chips(chips, scenes, config)
    assert [result[chip["scene"]] for chip in chips] == splits


def test_stratified_takes_its_share_inside_every_site() -> None:
    scenes = [
        square(f"{site}{i:02d}", 2000 * i, -5000 * k, site=site) for k, site in enumerate("pqr") for i in range(20)
    ]
    result = split_scenes(scenes, SplitConfig(test_fraction=0.2, val_fraction=0.1))
    for site in "pqr":
        assert Counter(result[f"{site}{i:02d}"] for i in range(20)) == {"train": 14, "test": 4, "val": 2}
    assert result != split_scenes(scenes, SplitConfig(test_fraction=0.2, val_fraction=0.1, seed=1))
    assert result == split_scenes(scenes[::-1], SplitConfig(test_fraction=0.2, val_fraction=0.1))


def test_a_site_of_one_scene_trains() -> None:
    assert split_scenes([square("a", 0, 0)], SplitConfig()) == {"a": "train"}


def test_site_holds_sites_out_and_draws_val_from_the_rest() -> None:
    scenes = [square(f"{site}{i}", 2000 * i, -5000 * k, site=site) for k, site in enumerate("pqr") for i in range(10)]
    result = split_scenes(scenes, SplitConfig(rule="site", test_sites=("q",), val_fraction=0.1))
    assert {name for name, split in result.items() if split == "test"} == {f"q{i}" for i in range(10)}
    assert Counter(result.values()) == {"train": 18, "test": 10, "val": 2}
    named = split_scenes(scenes, SplitConfig(rule="site", test_sites=("q",), val_sites=("r",)))
    assert Counter(named.values()) == {"train": 10, "test": 10, "val": 10}
    with pytest.raises(DataError, match=r'split.test_sites = "zz" is unknown'):
        split_scenes(scenes, SplitConfig(rule="site", test_sites=("zz",)))


def test_a_group_that_the_column_tears_apart_leaves_training() -> None:
    scenes = [square("a", 0, 0, split="train"), square("b", 500, 0, split="test"), square("c", 9000, 0, split="train")]
    assert split_scenes(scenes, SplitConfig(rule="column")) == {"a": "test", "b": "test", "c": "train"}
    leaky = SplitConfig(rule="column", allow_leakage=True)
    assert split_scenes(scenes, leaky) == {"a": "train", "b": "test", "c": "train"}
    with pytest.raises(DataError, match=r'scene a: split = "tran" is unknown.*Did you mean "train"'):
        split_scenes([square("a", 0, 0, split="tran")], SplitConfig(rule="column"))


def test_allowed_leakage_splits_chip_by_chip_as_in_the_paper() -> None:
    scenes = [square("a", 0, 0), square("b", 500, 0)]
    chips = [{"id": f"{s.scene}{i:02d}", "scene": s.scene, "site": "peel"} for s in scenes for i in range(25)]
    splits = split_chips(chips, scenes, SplitConfig(test_fraction=0.16, val_fraction=0.1, allow_leakage=True))
    assert Counter(splits) == {"train": 38, "test": 8, "val": 4}
    assert len({split for split, chip in zip(splits, chips, strict=True) if chip["scene"] == "a"}) > 1
