"""What fits a GPU, what a site adds, and what measurements say of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from hypothesis import given, strategies as st

from rtshpc.core.cell import Cell
from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.features import CHIPS_AT_ONCE
from rtshpc.core.grid import cells
from rtshpc.core.load import load_run
from rtshpc.core.records import Record
from rtshpc.core.sizing.calibrate import overhead, pace, timed_steps, usable_records
from rtshpc.core.sizing.fit import fit, levers
from rtshpc.core.sizing.memory import MemorySpec, memory_spec
from rtshpc.core.sizing.predict import GIB, Overhead, predict_cell, specs_of

FINGERPRINT = "f" * 64
GPU = {"gpus": 1, "gpu_memory_gb": 24}


def demo(**site: Any) -> RunConfig:
    return load_run("demo", [f"site.{name}={value}" for name, value in site.items()])


def trained(config: RunConfig, arm: str = "full") -> Cell:
    return next(cell for cell in cells(config, FINGERPRINT) if cell.stage == "finetune" and cell.arm == arm)


def spec_of(config: RunConfig, **changed: Any) -> MemorySpec:
    spec = memory_spec(trained(config), config.site)
    assert spec is not None
    return spec.model_copy(update=changed)


SPEC = spec_of(demo())


def test_only_where_the_memory_of_gpus_is_known_is_there_a_cell_that_predicts() -> None:
    for site in ({}, {"gpus": 1}, {"gpu_memory_gb": 24}):
        assert not [cell for cell in cells(demo(**site), FINGERPRINT) if cell.stage == "predict"]
    assert cells(demo(**GPU), FINGERPRINT)[0].stage == "predict"


def test_a_prediction_is_another_one_where_memory_or_what_lies_in_it_differs() -> None:
    def name(**site: Any) -> str:
        return cells(demo(**site), FINGERPRINT)[0].id

    first = name(**GPU)
    assert first == name(**GPU, cpus=7, partition="x") == cells(demo(**GPU), "e" * 64)[0].id
    assert len({first, name(**GPU, micro_batch=1), name(gpus=1, gpu_memory_gb=40)}) == 3


def test_a_prediction_changes_no_other_cell() -> None:
    plain, guarded = cells(demo(), FINGERPRINT), cells(demo(**GPU), FINGERPRINT)
    assert [(cell.id, cell.needs) for cell in plain] == [(cell.id, cell.needs) for cell in guarded[1:]]


def test_a_batch_is_parted_over_the_processes_of_a_training() -> None:
    config = demo()
    cell = trained(config)
    batch = cell.config.finetune.batch_size
    over_nodes = SiteConfig(name="s", executor="slurm", nodes=3, gpus=2)
    assert [memory_spec(cell, site).batch for site in (config.site, over_nodes)] == [batch, -(-batch // 6)]  # type: ignore[union-attr]


def test_what_is_measured_or_named_otherwise_is_the_same_in_memory() -> None:
    spec = spec_of(demo())
    model = spec.model.model_copy(update={"name": "another"})
    same = spec.model_copy(update={"seed": 5, "repeats": 9, "warmups": 0, "threads": 2, "model": model})
    assert spec.digest == same.digest
    others: list[dict[str, Any]] = [{"batch": 9}, {"rois": 3}, {"device": "cuda"}, {"arm": "cached"}]
    assert len({spec.digest, *(spec.model_copy(update=one).digest for one in others)}) == 5


@given(st.integers(1, 64), st.integers(1, 60))
def test_the_most_chips_at_a_time_that_fit_are_taken(batch: int, size: int) -> None:
    spec = SPEC.model_copy(update={"batch": batch})
    asked: list[MemorySpec] = []

    def trace(one: MemorySpec) -> Mapping[str, Any]:
        asked.append(one)
        return {"alloc_peak_step": one.micro_batch or one.batch}

    found = fit(spec, size, Overhead(), trace)
    assert all(one.batch == batch for one in asked)
    assert found.at_once == found.need == min(size, batch) and not found.advice
    assert len(asked) <= 5  # of what grows evenly: all, one, all but one, as many as fit, and one more


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.data())
def test_however_bytes_grow_the_most_chips_at_a_time_that_fit_are_found(grows: list[int], data: st.DataObject) -> None:
    needs = list(accumulate(grows))
    size = data.draw(st.integers(needs[0], needs[-1] + 1))
    spec = SPEC.model_copy(update={"batch": len(needs)})
    found = fit(spec, size, Overhead(), lambda one: {"alloc_peak_step": needs[(one.micro_batch or one.batch) - 1]})
    most = sum(need <= size for need in needs)
    assert (found.at_once, found.need) == (most, needs[most - 1])


def test_what_does_not_fit_comes_with_what_would_and_each_of_it_was_traced() -> None:
    spec = spec_of(demo(), precision="fp32", batch=4)
    small = {words for words, one in levers(spec).items() if one.precision == "bf16"}
    found = fit(spec, 10, Overhead(), lambda one: {"alloc_peak_step": 9 if one.precision == "bf16" else 11})
    assert (found.at_once, found.need, found.advice) == (None, 11, dict.fromkeys(small, 9)) and len(small) == 2
    assert {"frozen", "cached", "smaller", "checkpointing", "precision:"} <= {
        words.split()[0] for words in levers(spec)
    }
    assert all(one.micro_batch == 1 for one in levers(spec).values())


def test_what_runs_a_detector_without_training_it_is_sized_by_the_chips_it_takes_at_once() -> None:
    config = load_run("demo", ["finetune.features=cached", "pretrain.precision=bf16", "site.micro_batch=1"])
    found = {
        (cell.stage, cell.arm): spec
        for cell in cells(config, FINGERPRINT)
        if (spec := memory_spec(cell, config.site)) is not None
    }
    scored, alone, stored = (
        found["evaluate", "pretrained"],
        found["evaluate", "unimodal"],
        found["features", "pretrained"],
    )
    assert {(one.work, one.batch, one.micro_batch) for one in (scored, alone)} == {("detect", CHIPS_AT_ONCE, 0)}
    assert (stored.work, stored.batch, len(stored.channels)) == ("scales", CHIPS_AT_ONCE, 1)
    assert (scored.arm, scored.precision, alone.precision) == ("pretrained", "fp32", "bf16")
    assert found["finetune", "pretrained"].arm == "cached"  # its evaluation runs the backbones themselves


def test_one_band_is_like_another_in_memory() -> None:
    spec = spec_of(demo())
    assert spec.digest == spec.model_copy(update={"channels": {"a": 3, "b": 1, "c": 1}}).digest
    assert spec.digest != spec.model_copy(update={"channels": {"rgb": 1, "ndvi": 1, "nir": 3}}).digest


def test_what_does_not_train_is_not_parted_to_make_it_fit() -> None:
    spec = spec_of(demo(), work="detect", precision="fp32", batch=8)
    found = fit(spec, 10, Overhead(), lambda one: {"alloc_peak_step": 9 if one.precision == "bf16" else 11})
    assert (found.at_once, found.need, found.advice) == (None, 11, {"precision: bf16": 9})
    assert all(lever.micro_batch == 0 and lever.work == "detect" for lever in levers(spec).values())


def test_nothing_is_said_to_fit_that_cannot_be_predicted() -> None:
    found = fit(spec_of(demo()), 10, Overhead(), lambda _: {"reason": "no trace"})
    assert (found.at_once, found.need, found.advice) == (None, None, {})


def record(cell: Cell, **results: Any) -> Record:
    environment = {"cpu": "a processor"}
    return Record(
        cell=cell.id,
        stage=cell.stage,
        label=cell.label,
        result_version=1,
        started="",
        seconds=1,
        environment=environment,
        results=results,
    )


def measured(config: RunConfig) -> Cell:
    return next(cell for cell in cells(config, FINGERPRINT) if cell.stage == "measure")


def test_the_overhead_is_the_largest_that_was_measured_on_such_gpus() -> None:
    config = demo(**GPU, gpu_type="a100")
    cell, other = measured(config), next(c for c in cells(config, FINGERPRINT) if c.label == "measure rgb+ndvi full")
    predicted = {"alloc_peak_step": 1000}
    first = record(
        cell, device="NVIDIA A100-SXM4", backend="cuda", reserved_peak=1200, process_peak=1500, predicted=predicted
    )
    second = record(
        other, device="NVIDIA A100-SXM4", backend="cuda", reserved_peak=1100, process_peak=1900, predicted=predicted
    )
    found = overhead([(cell, first), (other, second)], config.site)
    assert (found.factor, found.context, found.records) == (1.2, 800, 2)
    assert found.need({"alloc_peak_step": 2000}) == 3200 and "from 2 measurements" in found.words
    for unlike in ({"device": "NVIDIA RTX A5000"}, {"device": "cpu"}, {"predicted": None}, {"reserved_peak": None}):
        row = record(cell, **{**first.results, **unlike})
        assert overhead([(cell, row)], config.site) == Overhead()
    assert "no measurement" in Overhead().words and Overhead().need({}) is None


def test_figures_of_a_fake_driver_calibrate_nothing() -> None:
    cell = measured(demo(**GPU))
    fake, real = (record(cell, device="NVIDIA A100", backend=backend) for backend in ("fake", "cuda"))
    assert not usable_records([cell], {cell.id: fake}) and usable_records([cell], {cell.id: real})


def test_time_is_told_only_by_steps_that_were_timed_on_such_a_device() -> None:
    config = demo()
    cell = trained(config)
    (name, (spec, _)), *_ = specs_of([cell], config.site).items()
    known = {name: {"flops": 100}}
    row = record(cell, device="cpu", seconds_per_step=2.0)
    steps = timed_steps([(cell, row)], config.site, known)
    assert pace(spec, known[name], steps).seconds == 2.0  # type: ignore[union-attr]
    other = spec.model_copy(update={"batch": 9})
    scaled = pace(other, {"flops": 300}, steps)
    assert scaled is not None and scaled.seconds == 6.0 and cell.label in scaled.source
    assert pace(spec.model_copy(update={"precision": "bf16"}), {"flops": 300}, steps) is None
    assert pace(other, {}, steps) is None and pace(other, {"flops": 300}, []) is None
    assert not timed_steps([(cell, row)], demo(**GPU).site, known)
    assert not timed_steps([(cell, row)], config.site, {})


def test_the_cell_holds_all_that_its_stage_needs() -> None:
    config = demo(**GPU)
    found = cells(config, FINGERPRINT)
    again = cells(found[0].config, found[0].data_fingerprint)
    assert [cell.id for cell in again] == [cell.id for cell in found]
    assert predict_cell(config, found[1:], FINGERPRINT)[0].id == found[0].id
    assert Overhead(1.0, GIB).need({"alloc_peak_step": GIB}) == 2 * GIB
