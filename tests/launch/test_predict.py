"""What is predicted of a sweep before it is submitted, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.load import load_run
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.core.sizing.fit import at_once, levers
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.core.sizing.predict import GIB, GUARDED, keep_predicted, read_predicted, specs_of
from rtshpc.launch.launch import predict_first
from rtshpc.launch.plan import Plan, arrays, make_plan
from rtshpc.launch.plan.forecast import Tracer, fits, forecast
from rtshpc.launch.submit import prepare
from rtshpc.stages import predict

from .conftest import Launcher

GPU = ("site.gpus=1", "site.gpu_memory_gb=24")
SLURM = (*GPU, "site.executor=slurm")


def plan_of(launcher: Launcher, *sets: str) -> Plan:
    return make_plan(load_run(launcher.sweep, sets), launcher.runs)


def options(sets: tuple[str, ...]) -> list[str]:
    return [word for one in sets for word in ("--set", one)]


def figures(gib: float, flops: int = 1000) -> dict[str, Any]:
    return {"alloc_peak_step": round(gib * GIB), "live_peak_fb": None, "optim_state": 0, "flops": flops}


def keep(plan: Plan, gib: Callable[[MemorySpec, list[Cell]], float]) -> None:
    """Predictions of a plan's cells, as a trace would leave them."""
    prepare(plan)
    for name, (spec, own) in specs_of(plan.cells, plan.config.site).items():
        keep_predicted(plan.paths, name, figures(gib(spec, own)))


def is_full(own: list[Cell]) -> bool:
    return any(cell.label == "measure rgb+ndvi full" for cell in own)


def test_what_takes_a_gpu_waits_for_the_prediction_and_nothing_else_does(launcher: Launcher) -> None:
    plan = plan_of(launcher, *SLURM)
    found = arrays(plan.todo, {}, 1000)
    (guard,) = [array for array in found if array.stage == "predict"]
    place = {array.number: array for array in found}

    def above(number: int) -> set[int]:
        direct = {job for job, _ in place[number].after if isinstance(job, int)}
        return direct.union(*map(above, direct)) if direct else direct

    for array in found:
        waits = guard.number in above(array.number)
        assert waits == (array.stage in GUARDED or array.stage == "summarise"), array.stage
        assert array.rule in ("afterok", "aftercorr") if array.stage in GUARDED else True
    assert (guard.rule, guard.after) == ("", ())


def test_a_prediction_is_left_out_once_nothing_that_takes_a_gpu_is_left(launcher: Launcher) -> None:
    plan = plan_of(launcher, *SLURM)
    done = {
        cell.id: Record(cell=cell.id, stage=cell.stage, label="", result_version=1, started="", seconds=1, results={})
        for cell in plan.cells
        if cell.stage in GUARDED
    }
    left = Plan(plan.config, plan.paths, plan.fingerprint, plan.cells, done, plan.stages)
    assert "predict" in {cell.stage for cell in plan.todo}
    assert {cell.stage for cell in left.todo} == {"preprocess", "gather", "summarise"}


def test_cells_that_do_not_fit_are_refused_in_one_line_before_anything_is_submitted(launcher: Launcher) -> None:
    plan = plan_of(launcher, *GPU)
    keep(plan, lambda spec, own: 30 if is_full(own) else 1)
    (large,) = [spec for spec, own in specs_of(plan.cells, plan.config.site).values() if is_full(own)]
    for words, lever in levers(large).items():
        keep_predicted(plan.paths, lever.digest, figures(20 if words.startswith("frozen") else 25))
    keep_predicted(plan.paths, at_once(large, 1).digest, figures(30))
    answer = launcher.run("sweep", *options(GPU))
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "error: site here: GPUs of 24 GB are too small for measure rgb+ndvi full (30.0 GiB);"
        " the first would fit with frozen (backbones: pretrained) (20.0 GiB); see `plan --fit`"
    ]
    assert not plan.paths.ledger.exists()


def test_cells_that_fit_are_noted_with_what_they_need_and_traced_once(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(launcher, *GPU)
    prepare(plan)
    asked: list[str] = []

    def trace(spec: MemorySpec) -> dict[str, Any]:
        if len(asked) == 3:
            raise KeyboardInterrupt  # told to stop in mid-work
        asked.append(spec.digest)
        return figures(1)

    monkeypatch.setattr(predict, "traced", trace)
    cell = plan.todo[0]
    with pytest.raises(KeyboardInterrupt):
        predict.run(cell, plan.paths, SILENT)
    kept = read_predicted(plan.paths)
    assert list(kept) == asked and len(asked) == 3
    asked.clear()
    monkeypatch.setattr(predict, "traced", lambda spec: asked.append(spec.digest) or figures(1))
    found = predict.run(cell, plan.paths, SILENT)
    assert not set(kept) & set(asked)
    assert set(found["predicted"]) == set(kept) | set(asked) == set(specs_of(plan.cells, plan.config.site))
    assert (found["gpu_bytes"], found["overhead"]["records"]) == (24 * GIB, 0)


def test_what_cannot_be_traced_is_named_and_stops_nothing(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(launcher, *GPU)
    prepare(plan)
    monkeypatch.setattr(predict, "traced", lambda spec: {"reason": "its heads cannot be traced"})
    found = predict.run(plan.todo[0], plan.paths, SILENT)
    assert {one["reason"] for one in found["predicted"].values()} == {"its heads cannot be traced"}


def test_a_plan_shows_what_is_kept_and_guesses_nothing(launcher: Launcher) -> None:
    answer = launcher.run("plan", *options(GPU))
    lines = [line for line in answer.stdout.splitlines() if line.startswith("  ")]
    guarded = [line for line in lines if any(f"  {stage} " in line for stage in GUARDED)]
    assert any("  evaluate " in line for line in guarded)
    assert all(line.endswith(": not predicted (not traced yet, see --predict)") for line in guarded)
    assert all(line.endswith(": not predicted (runs no detector)") for line in lines if line not in guarded)
    plan = plan_of(launcher, *GPU)
    keep(plan, lambda spec, own: 2)
    (cell,) = [cell for cell in plan.cells if cell.stage == "finetune"]
    results = {"device": "NVIDIA A100", "seconds_per_step": 3.6, "checkpoint": "x", "checkpoint_bytes": None}
    folder = plan.paths.cell(cell.id)
    record = Record(
        cell=cell.id, stage="finetune", label=cell.label, result_version=1, started="", seconds=1, results=results
    )
    write_record(folder.record, record)
    (folder.root / "x").touch()
    found = json.loads(launcher.run("plan", "--json", *options(GPU)).stdout)["expected"]
    row = found["cells"][cell.id]
    assert row["peak_bytes"] == 2 * GIB and row["seconds_per_step"] == 3.6
    # Four scenes of one chip each are less than a batch: an epoch is one step.
    assert row["seconds_per_epoch"] == 3.6 and row["gpu_hours"] == pytest.approx(0.001)
    assert "timed" in row["timed"] and "no measurement" in found["memory"]
    measured = [found["cells"][one.id] for one in plan.cells if one.stage == "measure"]
    assert all((one["peak_bytes"], one["seconds_per_epoch"]) == (2 * GIB, None) for one in measured)
    text = launcher.run("plan", *options(GPU)).stdout
    assert "peak 2.00 GiB, 3.6 s an epoch, 0.001 GPU-hours, timed: finetune" in text
    assert f"  evaluate {cell.label}: peak 2.00 GiB, time not predicted" in text


def test_detectors_of_another_engine_are_told_as_not_predicted_with_the_reason_and_never_refused(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtshpc.core.config.ModelConfig.require_engine", lambda self: None)
    plan = plan_of(launcher, *GPU, "model.engine=detectron2")
    prepare(plan)
    rows = forecast(plan)["cells"]
    told = {rows[cell.id]["reason"] for cell in plan.cells if cell.stage in GUARDED}
    assert told == {"model.engine = detectron2: its heads cannot be traced; take engine: native"}
    cell = next(cell for cell in plan.cells if cell.stage == "predict")
    assert set(predict.run(cell, plan.paths, SILENT)["cells"]) == set(specs_of(plan.cells, plan.config.site))


def test_what_is_kept_but_is_no_prediction_is_traced_again(launcher: Launcher) -> None:
    plan = plan_of(launcher, *GPU)
    prepare(plan)
    assert read_predicted(plan.paths) == {}
    junk: list[Any] = [{}, [], None, {"alloc_peak_step": "2 GiB"}, {"alloc_peak_step": True}, {"flops": 1}]
    for number, figures_ in enumerate(junk):
        keep_predicted(plan.paths, str(number), figures_)
    keep_predicted(plan.paths, "good", figures(2))
    with plan.paths.predicted.open("ab") as file:
        file.write(b'{"digest": "torn", "figu')
    assert list(read_predicted(plan.paths)) == ["good"]
    keep_predicted(plan.paths, "after", figures(3))
    assert list(read_predicted(plan.paths)) == ["good", "after"]
    plan.paths.predicted.unlink()
    plan.paths.predicted.mkdir()
    answer = launcher.run("plan", *options(GPU))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: {plan.paths.predicted}: cannot be read: Is a directory\n"


@pytest.mark.full
def test_predictions_are_made_where_torch_is_and_kept(launcher: Launcher) -> None:
    sets = ("measure.chip_px=64",)
    plan = plan_of(launcher, *sets)
    specs = specs_of(plan.cells, plan.config.site)
    name = next(name for name, (_, own) in specs.items() if own[0].label == "measure rgb")
    prepare(plan)
    for other in set(specs) - {name}:
        keep_predicted(plan.paths, other, figures(1))
    before = plan.paths.predicted.read_text()
    answer = launcher.run("plan", "--predict", "--json", *options(sets))
    assert answer.returncode == 0, answer.stderr
    made = read_predicted(plan.paths)[name]
    cell = specs[name][1][0]
    assert (
        json.loads(answer.stdout)["expected"]["cells"][cell.id]["peak_bytes"]
        == made["live_peak_fb"] + made["optim_state"]
    )
    after = plan.paths.predicted.read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 1


def test_where_nothing_can_be_traced_it_says_so(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(launcher)
    monkeypatch.setattr("rtshpc.launch.plan.forecast.can_trace", lambda site: False)
    with pytest.raises(RunError, match="nothing can be predicted on this machine: torch is not installed"):
        fits(plan, Tracer(plan.config.site, plan.paths))
    assert not plan.paths.root.exists()


def test_the_largest_micro_batch_of_every_partition_is_told(launcher: Launcher) -> None:
    """Of a training whose peak is 3 GiB and 4 for each chip at a time: 5 on 24 GB, 9 on 40, all 16 on 80, none on 5."""
    sets = ("site.gpus=1", "site.gpu_memory_gb=5", "pretrain.modalities=[]")
    plan = plan_of(launcher, *sets)
    prepare(plan)
    for spec, _ in specs_of(plan.cells, plan.config.site).values():
        for count in range(1, spec.batch + 1):
            part = at_once(spec.model_copy(update={"micro_batch": 0}), count)
            keep_predicted(plan.paths, part.digest, figures(3 + 4 * count))
        for words, lever in levers(spec).items():
            keep_predicted(plan.paths, at_once(lever, lever.batch).digest, figures(10))
            keep_predicted(plan.paths, lever.digest, figures(4 if words.startswith("smaller") else 6))
    answer = launcher.run("plan", "--fit", *options(sets))
    assert answer.returncode == 0, answer.stderr
    told = answer.stdout.splitlines()
    start = told.index("finetune rgb+ndvi cross residual pretrained")
    assert told[start + 1 : start + 4] == [
        "  A5000 24 GB: site.micro_batch: 5, 23.00 GiB",
        "  A100 40 GB: site.micro_batch: 9, 39.00 GiB",
        "  A100 80 GB: site.micro_batch: 16, 67.00 GiB",
    ]
    assert told[start + 4].startswith("  site here 5 GB: one chip at a time takes 7.00 GiB; smaller chips")


def test_a_prediction_that_is_made_is_not_submitted(launcher: Launcher) -> None:
    plan = plan_of(launcher, *SLURM)
    keep(plan, lambda spec, own: 1)
    assert predict_first(Console(quiet=True), plan)
    again = plan_of(launcher, *SLURM)
    assert [cell.stage for cell in plan.todo if cell not in again.todo] == ["predict"]
    assert not predict_first(Console(quiet=True), again)


def test_where_nothing_can_be_traced_a_job_predicts(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(launcher, *SLURM)
    monkeypatch.setattr("rtshpc.launch.launch.can_trace", lambda site: False)
    assert not predict_first(Console(quiet=True), plan)
    assert next(array.stage for array in arrays(plan.todo, {}, 1000)) == "predict"
