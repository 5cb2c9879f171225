from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from rtshpc.core.cell import Cell
from rtshpc.core.config import AugmentConfig, ChipConfig, ModelConfig, RunConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.features import (
    VARIANTS,
    Chips,
    cell_bytes,
    chips_per_file,
    chips_to_cache,
    record_bytes,
    scale_shapes,
    variants,
)
from rtshpc.core.grid import GridError, cells
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import write_json
from rtshpc.geo.chips import chip_boxes

from .test_grid import FINGERPRINT, make

PLAIN: dict[str, Any] = {"finetune__modalities": ["rgb", "ndvi"], "finetune__primary": "rgb"}


def of(config: RunConfig, stage: str) -> list[Cell]:
    return [cell for cell in cells(config, FINGERPRINT) if cell.stage == stage]


@pytest.mark.parametrize(
    ("flip", "turns", "wanted"),
    [(True, True, range(8)), (True, False, (0, 2, 4, 6)), (False, True, (0, 1, 2, 3)), (False, False, (0,))],
)
def test_variants_are_those_that_the_augmentation_can_draw(flip: bool, turns: bool, wanted: Any) -> None:
    assert variants(AugmentConfig(flip=flip, quarter_turns=turns)) == tuple(wanted)
    assert len(VARIANTS) == 8


@pytest.mark.parametrize(
    ("key", "value"), [("scale", "[0.9, 1.1]"), ("brightness", "0.1"), ("contrast", "0.2"), ("noise", "0.01")]
)
def test_other_augmentation_is_refused_with_its_reason_on_one_line(key: str, value: str) -> None:
    sets = ["finetune.features=cached", f"finetune.augment.{key}={value}"]
    with pytest.raises(ConfigError, match=rf"finetune\.augment\.{key} = .*draws other pixels in every epoch") as caught:
        load_run("demo", [*sets, "grid={}"])
    assert "\n" not in str(caught.value) and "features: live" in str(caught.value)
    load_run("demo", [f"finetune.augment.{key}={value}", "grid={}"])
    load_run("demo", [*sets, "grid={}", "finetune.backbones=full"])
    load_run("demo", ["finetune.features=cached", "finetune.augment.flip=false", "grid={}"])


def test_a_grid_that_varies_into_a_refused_augmentation_is_refused() -> None:
    with pytest.raises(GridError, match="draws other pixels"):
        cells(make({"finetune.augment.noise": [0.0, 0.1]}, **PLAIN, finetune__features="cached"), FINGERPRINT)


def test_only_cached_cells_have_features_and_they_need_them_beside_their_pretraining() -> None:
    assert not of(make(), "features")
    grid = {"finetune.features": ["live", "cached"], "finetune.backbones": ["pretrained", "full"]}
    config = make(grid, **PLAIN)
    stored = {cell.modalities[0]: cell for cell in of(config, "features")}
    pretrained = {cell.modalities[0]: cell for cell in of(config, "pretrain")}
    gather = of(config, "gather")[0]
    assert set(stored) == {"rgb", "ndvi"}
    for name, cell in stored.items():
        assert cell.needs == (gather.id, pretrained[name].id) and cell.backbones == {name: pretrained[name].id}
    tuned = of(config, "finetune")
    assert [cell.arm for cell in tuned] == ["pretrained", "full", "pretrained"]
    cached = [cell for cell in tuned if cell.features]
    assert len(cached) == 1 and cached[0].features == {name: cell.id for name, cell in stored.items()}
    assert set(cached[0].needs) == {gather.id, *(cell.id for cell in (*pretrained.values(), *stored.values()))} - {
        pretrained["nir"].id
    }
    assert cached[0].label.endswith('features="cached"')


def test_ids_of_live_cells_know_nothing_of_the_cache() -> None:
    plain, other = make({}, **PLAIN), make({}, **PLAIN, finetune__features_dtype="bf16")
    assert [cell.id for cell in cells(plain, "f")] == [cell.id for cell in cells(other, "f")]
    full = [make({}, **PLAIN, finetune__backbones="full", finetune__features=name) for name in ("live", "cached")]
    assert [cell.id for cell in cells(full[0], "f")] == [cell.id for cell in cells(full[1], "f")]


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"seed": [0, 1]}, True),
        ({"model.fusion.residual": [True, False]}, True),
        ({"finetune.epochs": [1, 2]}, True),
        ({"finetune.features_dtype": ["bf16", "fp16"]}, False),
        ({"finetune.precision": ["fp32", "bf16"]}, False),
        ({"finetune.augment.flip": [True, False]}, False),
    ],
)
def test_cells_share_scales_unless_these_differ(change: dict[str, Any], shared: bool) -> None:
    config = make(change, **PLAIN, finetune__features="cached")
    assert len(of(config, "features")) == (2 if shared else 4)
    assert len(of(config, "finetune")) == 2


def test_sizes_follow_from_the_config_alone() -> None:
    base = ModelConfig(name="m")
    assert scale_shapes(base, 256) == ((96, 64, 64), (192, 32, 32), (384, 16, 16), (768, 8, 8))
    assert scale_shapes(base, 225) == scale_shapes(base, 256)
    cell = of(make({}, **PLAIN, finetune__features="cached"), "features")[0]
    values = sum(math.prod(shape) for shape in scale_shapes(cell.config.model, 256))
    assert record_bytes(cell) == 2 * values
    assert cell_bytes(cell, Chips(10, 3, True)) == 2 * values * (10 * 8 + 3)
    assert chips_per_file(cell, "train") == (256 << 20) // (16 * values)


def test_chips_are_counted_where_there_is_an_index_and_estimated_before(tmp_path: Path) -> None:
    config, paths = make(), RunPaths(tmp_path)
    guess = chips_to_cache(config.data, paths, False)
    per_site = config.data.scenes.generated
    assert per_site is not None and not guess.exact
    scenes = len(per_site.sites) * per_site.scenes_per_site
    assert guess.train + guess.val == round(scenes * (1 - config.data.split.test_fraction))
    chips = [{"id": str(n), "split": split} for n, split in enumerate(["train", "train", "val", "test"])]
    write_json(paths.index, {"chips": chips})
    assert chips_to_cache(config.data, paths, True) == Chips(2, 1, True)
    assert chips_to_cache(config.data, paths, False) == guess


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(16, 128), st.integers(0, 15))
def test_the_estimate_counts_chips_as_they_are_cut(width: int, height: int, size: int, overlap: int) -> None:
    from rtshpc.core.features import _positions

    chip = ChipConfig(size_px=size, overlap_px=overlap)
    data = make().data.model_copy(update={"chip": chip})
    assert _positions((width, height), data) == len(chip_boxes(width, height, chip))
