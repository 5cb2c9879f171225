from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.records import read_plan, read_record
from rtshpc.launch.display import headline, tables
from rtshpc.launch.plan import make_plan, measure_plan
from rtshpc.launch.submit import prepare

from .conftest import Launcher
from .test_plan import finish

SETS = ("measure.modality_sets=[[rgb], [rgb, ndvi]]", "measure.arms=[pretrained, full, cached]")


def test_measuring_does_a_sweep_s_measure_cells_and_leaves_the_others_for_later(launcher: Launcher) -> None:
    config = load_run(launcher.sweep, SETS)
    plan = measure_plan(config, launcher.runs)
    assert [cell.label for cell in plan.todo] == [
        "measure rgb",
        *(f"measure rgb+ndvi {arm}" for arm in config.measure.arms),
    ]
    prepare(plan)
    listed = read_plan(plan.paths.plan)
    assert listed is not None and {cell["id"] for cell in listed["cells"]} == {cell.id for cell in plan.cells}
    assert not any(plan.paths.cell(cell.id).config.exists() for cell in plan.cells if cell.stage != "measure")
    finish(plan, "measure")
    assert measure_plan(config, launcher.runs).todo == []
    left = make_plan(config, launcher.runs).todo
    assert left and not any(cell.stage == "measure" for cell in left)


def test_a_plan_of_measuring_shows_its_cells_alone_and_writes_nothing(launcher: Launcher) -> None:
    sets = [word for one in SETS for word in ("--set", one)]
    answer = launcher.run("measure", "--plan", "--json", *sets)
    assert answer.returncode == 0, answer.stderr
    assert {cell["stage"] for cell in json.loads(answer.stdout)["cells"]} == {"measure"}
    assert not launcher.runs.exists()


@pytest.mark.full
def test_a_measurement_on_a_fake_driver_is_done_but_shown_nowhere(
    launcher: Launcher, fake_nvml: dict[str, Path]
) -> None:
    values = ("measure.modality_sets=[[rgb]]", "measure.chip_px=64", "measure.precision=fp32", "site.gpus=1")
    sets = [word for one in values for word in ("--set", one)]
    answer = launcher.run("measure", *sets, LD_LIBRARY_PATH=str(fake_nvml["current"]))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "protocol: 64 px chip, fp32, batch 1, 1 warm-up, caches emptied, 1 measured, seed 0" in answer.stdout
    assert "refused: backend = fake" in answer.stdout and "Memory of a training step" not in answer.stdout
    plan = measure_plan(load_run(launcher.sweep, values), launcher.runs)
    record = read_record(plan.paths.cell(plan.measured[0].id).record)
    assert plan.todo == [] and record is not None and record.results["energy_joules"] > 0
    assert headline(record).startswith("refused") and tables(plan.cells, plan.paths) == []
