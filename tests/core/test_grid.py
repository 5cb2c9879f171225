from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from rtshpc.core.cell import RESULT_VERSION, SWEEP_STAGES, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.grid import GridError, cells, combinations, finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, write_json, write_record

FINGERPRINT = "f" * 64
GRID: dict[str, Any] = {
    "finetune.modalities": [["rgb", "ndvi"], ["rgb", "ndvi", "nir"]],
    "finetune.backbones": ["pretrained", "full"],
}


def make(grid: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A sweep; `changes` are dotted keys with `__` for the dot."""
    bands = {"rgb": ["red", "green", "blue"], "ndvi": ["ndvi"], "nir": ["nir"]}
    values: dict[str, Any] = {
        "name": "t",
        "data": {
            "name": "d",
            "scenes": {"generated": {}},
            "modalities": {name: {"bands": list(names)} for name, names in bands.items()},
            "primary": "rgb",
        },
        "model": {"name": "m"},
        "finetune": {},
        "grid": GRID if grid is None else grid,
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return RunConfig.model_validate(values)


def ids(config: RunConfig, stage: str | None = None, fingerprint: str = FINGERPRINT) -> list[str]:
    return [cell.id for cell in cells(config, fingerprint) if stage in (None, cell.stage)]


def of(config: RunConfig, stage: str) -> list[Cell]:
    return [cell for cell in cells(config, FINGERPRINT) if cell.stage == stage]


def test_cells_come_in_stage_order_after_what_they_need() -> None:
    found = cells(make(), FINGERPRINT)
    assert [SWEEP_STAGES.index(cell.stage) for cell in found] == sorted(
        SWEEP_STAGES.index(cell.stage) for cell in found
    )
    seen: set[str] = set()
    for cell in found:
        assert set(cell.needs) <= seen
        seen.add(cell.id)
    assert len(seen) == len(found)


def test_the_demo_grid_gives_the_cells_of_the_paper() -> None:
    found = cells(make(), FINGERPRINT)
    counts = {stage: sum(cell.stage == stage for cell in found) for stage in SWEEP_STAGES}
    assert counts == {
        "predict": 0,
        "preprocess": 2,
        "gather": 1,
        "pretrain": 3,
        "features": 0,
        "finetune": 4,
        "evaluate": 7,
        "measure": 5,
        "summarise": 1,
    }


def test_labels_are_for_people_and_tell_cells_apart() -> None:
    labels = [cell.label for cell in cells(make(), FINGERPRINT)]
    assert len(set(labels)) == len(labels)
    assert {"pretrain ndvi", "finetune rgb+ndvi cross residual pretrained", "measure rgb+ndvi full"} <= set(labels)
    varied = of(make({"seed": [1, 2], "finetune.learning_rate": [0.1]}), "finetune")
    assert varied[0].label == "finetune rgb+ndvi cross residual pretrained seed=1 learning_rate=0.1"


def test_frozen_backbones_come_from_pretraining_and_full_training_needs_only_shards() -> None:
    config = make()
    by_label = {cell.label: cell for cell in cells(config, FINGERPRINT)}
    frozen = by_label["finetune rgb+ndvi+nir cross residual pretrained"]
    assert frozen.backbones == {name: by_label[f"pretrain {name}"].id for name in ("rgb", "ndvi", "nir")}
    full = by_label["finetune rgb+ndvi+nir cross residual full"]
    assert full.backbones == {}
    assert full.needs == (by_label["gather"].id,)
    assert by_label[f"evaluate {full.label}"].needs == (full.id, by_label["gather"].id)


def test_the_primary_comes_first() -> None:
    config = make({}, finetune__modalities=["nir", "ndvi", "rgb"], finetune__primary="rgb")
    assert of(config, "finetune")[0].modalities == ("rgb", "nir", "ndvi")


def test_one_modality_has_one_measure_and_no_fusion_in_its_id() -> None:
    grid = {"finetune.modalities": [["rgb"]], "model.fusion.residual": [True, False]}
    assert len(of(make(grid), "finetune")) == 1
    assert [cell.arm for cell in of(make(grid), "measure")] == ["unimodal"]


def test_a_modality_that_a_fusion_builds_on_is_pretrained_though_not_listed() -> None:
    config = make({}, pretrain__modalities=["nir"])
    assert [cell.modalities for cell in of(config, "pretrain")] == [("rgb",), ("ndvi",), ("nir",)]


@settings(max_examples=40, deadline=None)
@given(
    site=st.fixed_dictionaries(
        {
            "name": st.text(max_size=5),
            "max_jobs": st.integers(1, 9),
            "gpus": st.integers(0, 4),
            "image": st.just("x.sif"),
        }
    ),
    workers=st.integers(0, 8),
    root=st.sampled_from([".", "/data", "../shared"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    seconds=st.floats(1, 1e4),
    mib=st.integers(1, 4096),
    name=st.sampled_from(["a", "b"]),
)
def test_site_workers_paths_and_names_never_change_an_id(
    site: dict[str, Any], workers: int, root: str, device: str, seconds: float, mib: int, name: str
) -> None:
    training = {"workers": workers, "device": device, "checkpoint_seconds": seconds}
    changed = make(
        site=site,
        name=name,
        data__root=root,
        data__name=name,
        data__shard={"target_mib": mib, "compression": "gzip"},
        model__name=name,
        pretrain=training,
        finetune=training,
    )
    assert ids(changed) == ids(make())


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"finetune__epochs": 5}, {"preprocess", "gather", "pretrain", "measure"}),
        ({"pretrain__epochs": 5}, {"preprocess", "gather", "measure"}),
        ({"pretrain__threads": 2}, {"preprocess", "gather", "measure"}),
        ({"model__pyramid_channels": 64}, {"preprocess", "gather"}),
        ({"model__fusion__mlp_ratio": 2.0}, {"preprocess", "gather", "pretrain"}),
        ({"data__chip__size_px": 128}, {"measure"}),
        ({"data__split__seed": 1}, {"preprocess", "measure"}),
        ({"data__shard__tasks": 5}, {"gather", "pretrain", "finetune", "evaluate", "measure"}),
        ({"evaluate__gallery": 0}, {"preprocess", "gather", "pretrain", "finetune", "measure"}),
        ({"measure__chip_px": 64}, {"preprocess", "gather", "pretrain", "finetune", "evaluate"}),
        ({"seed": 1}, {"preprocess", "gather"}),
    ],
)
def test_a_change_reaches_exactly_the_stages_it_can_change(change: dict[str, Any], same: set[str]) -> None:
    before, after = make(), make(**change)
    for stage in set(SWEEP_STAGES[:-1]) - {"features", "predict"}:
        if stage in same:
            assert ids(before, stage) == ids(after, stage), stage
        else:
            assert ids(before, stage) != ids(after, stage), stage


def test_other_input_files_change_every_id_but_memory() -> None:
    before, after = make(), make()
    for stage in set(SWEEP_STAGES[:-1]) - {"features", "predict"}:
        differ = ids(before, stage) != ids(after, stage, "e" * 64)
        assert differ == (stage != "measure"), stage


def test_a_new_grid_value_keeps_all_other_ids() -> None:
    more = {**GRID, "finetune.modalities": [*GRID["finetune.modalities"], ["rgb", "nir"]]}
    before, after = ids(make()), ids(make(more))
    assert set(before) < set(after)
    assert len(after) == len(before) + 2 + 2 + 2


def test_a_raised_result_version_reaches_what_builds_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make()
    old = {stage: ids(before, stage) for stage in SWEEP_STAGES}
    monkeypatch.setitem(RESULT_VERSION, "preprocess", 99)
    changed = {stage for stage in SWEEP_STAGES if ids(before, stage) != old[stage]}
    assert changed == {"preprocess", "gather", "pretrain", "finetune", "evaluate"}


def test_combinations_without_a_grid_vary_nothing() -> None:
    assert [varied for varied, _ in combinations(make({}))] == [{}]


@pytest.mark.parametrize("key", ["finetune", "finetune.epoch", "data.chip.size_px", "fine.x", "measure.repeats"])
def test_a_grid_key_that_cannot_be_varied_is_refused(key: str) -> None:
    with pytest.raises(GridError) as caught:
        combinations(make({key: [1]}))
    assert caught.value.key == key


def record_of(cell: Cell, **results: Any) -> Record:
    version = RESULT_VERSION[cell.stage]
    return Record(
        cell=cell.id, stage=cell.stage, label=cell.label, result_version=version, started="", seconds=1, results=results
    )


def test_a_lost_shard_index_or_checkpoint_makes_its_cell_undone(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.create()
    by_label = {cell.label: cell for cell in cells(make(), FINGERPRINT)}
    shard, index, trained = by_label["preprocess 1/2"], by_label["gather"], by_label["pretrain rgb"]
    paths.shard(0, 0).write_bytes(b"12345")
    write_json(paths.index, {"chips": [{}], "shards": {"0000-000.h5": "sha"}})
    write_json(paths.rejected, [])
    paths.cell(trained.id).checkpoints.mkdir(parents=True)
    paths.cell(trained.id).best_checkpoint.write_bytes(b"x")
    write_record(paths.cell(shard.id).record, record_of(shard, shards=[{"file": "0000-000.h5", "bytes": 5}]))
    write_record(paths.cell(index.id).record, record_of(index))
    write_record(
        paths.cell(trained.id).record, record_of(trained, checkpoint="checkpoints/best.pt", checkpoint_bytes=1)
    )
    assert all(finished(cell, paths) for cell in (shard, index, trained))
    paths.shard(0, 0).write_bytes(b"123")
    assert finished(shard, paths) is None
    paths.cell(trained.id).best_checkpoint.write_bytes(b"xx")
    assert finished(trained, paths) is None
    paths.shard(0, 0).unlink()
    paths.cell(trained.id).best_checkpoint.unlink()
    assert not any(finished(cell, paths) for cell in (shard, index, trained))


@pytest.mark.parametrize(
    ("index", "rejected", "done"),
    [
        ({"chips": [{}], "shards": {"0000-000.h5": "sha"}}, [], True),
        ({}, [], False),
        ([], [], False),
        ({"chips": [], "shards": {"0000-000.h5": "sha"}}, [], False),
        ({"chips": [{}], "shards": {}}, [], False),
        ({"chips": [{}], "shards": ["0000-000.h5"]}, [], False),
        ({"chips": [{}], "shards": {"0000-000.h5": "sha"}}, {}, False),
    ],
)
def test_an_index_that_names_no_chip_or_shard_is_not_done(
    tmp_path: Path, index: object, rejected: object, done: bool
) -> None:
    paths = RunPaths(tmp_path)
    paths.create()
    paths.shard(0, 0).touch()
    gather = of(make(), "gather")[0]
    write_json(paths.index, index)
    write_json(paths.rejected, rejected)
    write_record(paths.cell(gather.id).record, record_of(gather))
    assert (finished(gather, paths) is not None) is done


def test_a_record_of_another_version_or_a_torn_one_does_not_count(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    cell = of(make(), "measure")[0]
    path = paths.cell(cell.id).record
    write_record(path, record_of(cell).model_copy(update={"result_version": 0}))
    assert finished(cell, paths) is None
    write_record(path, record_of(cell))
    assert finished(cell, paths) is not None
    path.write_text(path.read_text()[:40])
    assert finished(cell, paths) is None


@pytest.mark.parametrize("stage", ["preprocess", "pretrain"])
@pytest.mark.parametrize("spoilt", [{"shards": 3, "checkpoint": 3}, {"shards": [None], "checkpoint": [1]}])
def test_results_of_another_form_do_not_count(stage: str, spoilt: dict[str, Any], tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    cell = of(make(), stage)[0]
    write_record(paths.cell(cell.id).record, record_of(cell).model_copy(update={"results": spoilt}))
    assert finished(cell, paths) is None


def test_a_summary_is_never_done(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    cell = of(make(), "summarise")[0]
    write_record(paths.cell(cell.id).record, record_of(cell))
    assert finished(cell, paths) is None
