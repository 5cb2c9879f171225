"""A prediction as a job, where the login node cannot make it."""

from __future__ import annotations

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.records import read_json, read_record
from rtshpc.core.sizing.fit import at_once, levers
from rtshpc.core.sizing.predict import GIB, GUARDED, keep_predicted, specs_of
from rtshpc.launch.plan import make_plan
from rtshpc.launch.submit import Ledger, prepare, submit_arrays

from .conftest import ROOT, Login
from .lab import wait_for

SETS = ("site=lab", "site.partition=low", "site.gpu_type=''", "site.gpus=1", "site.gpu_memory_gb=24")


@pytest.mark.full
def test_a_job_predicts_and_what_waits_for_it_never_begins_where_a_cell_does_not_fit(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (login.lab.environment | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    plan = make_plan(load_run(login.sweep, SETS), login.runs)
    prepare(plan)
    for spec, own in specs_of(plan.cells, plan.config.site).values():
        size = 30 if own[0].stage == "measure" else 1
        for one in (spec, at_once(spec, 1), *levers(spec).values()):
            keep_predicted(plan.paths, one.digest, {"alloc_peak_step": size * GIB})
    submit_arrays(plan, Ledger(plan.paths))
    predict = next(cell for cell in plan.cells if cell.stage == "predict")
    wait_for("the prediction is over", plan.paths.cell(predict.id).failure.exists, 120)
    wait_for("the shards are there", lambda: read_record(plan.paths.cell(plan.gather.id).record) is not None, 120)
    guarded = [cell for cell in plan.cells if cell.stage in GUARDED]
    pending = {cell.id for cell in guarded}
    wait_for("all else has ended", lambda: set(login.lab.queue().values()) <= {"PENDING"}, 60)
    assert pending and not any(plan.paths.cell(name).attempts.exists() for name in pending)
    said = read_json(plan.paths.cell(predict.id).failure)["error"]
    assert said.startswith("site lab: GPUs of 24 GB are too small for measure rgb (30.0 GiB); take a larger GPU")
    login.lab("scancel", "--me", check=False)
