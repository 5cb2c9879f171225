"""Cells -> arrays and what they wait for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rtshpc.core.cell import Cell
from rtshpc.core.load import load_run
from rtshpc.launch.plan import Array, Plan, arrays, make_plan

from .conftest import Launcher

THREE = (
    "data.modalities={rgb: {bands: [red, green, blue]}, ndvi: {bands: [ndvi]}, nir: {bands: [nir]}}",
    "grid.finetune.modalities=[[rgb, ndvi], [rgb, nir]]",
    "grid.finetune.backbones=[pretrained, full]",
    "grid.seed=[0, 1]",
)


def plan_of(launcher: Launcher, *sets: str) -> Plan:
    return make_plan(load_run(launcher.sweep, sets), launcher.runs)


def by_stage(found: Sequence[Array], stage: str) -> list[Array]:
    return [array for array in found if array.stage == stage]


def waits_for(array: Array, found: Sequence[Array]) -> list[str]:
    """Labels of the cells an array waits for; a whole array counts with all its cells."""
    labels: list[str] = []
    for job, element in array.after:
        assert isinstance(job, int)
        cells = found[job].cells
        labels += [cell.label for cell in (cells if element is None else cells[element : element + 1])]
    return labels


def all_met(found: Sequence[Array], todo: Sequence[Cell]) -> None:
    """Every need of every cell to do is waited for, by way of others or directly, and comes before it."""
    place = {cell.id: (array.number, element) for array in found for element, cell in enumerate(array.cells)}
    before: dict[str, set[str]] = {}
    for array in found:
        for element, cell in enumerate(array.cells):
            direct: set[str] = set()
            for job, part in array.after:
                assert isinstance(job, int) and job < array.number
                part = element if array.rule == "aftercorr" else part
                direct |= {one.id for at, one in enumerate(found[job].cells) if part in (None, at)}
            before[cell.id] = direct.union(*(before[name] for name in direct)) if direct else direct
            assert {need for need in cell.needs if need in place} <= before[cell.id], cell.label


def test_cells_are_grouped_by_the_backbones_they_need_and_wait_for_those_alone(launcher: Launcher) -> None:
    plan = plan_of(launcher, *THREE)
    found = arrays(plan.todo, {}, 1000)
    all_met(found, plan.todo)
    groups = {frozenset(waits_for(array, found)): array for array in by_stage(found, "finetune")}
    assert {needs: len(array.cells) for needs, array in groups.items()} == {
        frozenset({"gather"}): 4,
        frozenset({"pretrain rgb", "pretrain ndvi"}): 2,
        frozenset({"pretrain rgb", "pretrain nir"}): 2,
    }
    assert {array.rule for array in groups.values()} == {"afterok"}


def test_evaluations_wait_element_by_element_index_and_summary_for_the_end(launcher: Launcher) -> None:
    plan = plan_of(launcher, *THREE)
    found = arrays(plan.todo, {}, 1000)
    scores = by_stage(found, "evaluate")
    assert {array.rule for array in scores} == {"aftercorr"}
    assert sum(len(array.cells) for array in scores) == 11
    for array in scores:
        (job, element), *more = array.after
        assert isinstance(job, int) and element is None and not more
        assert [cell.needs[0] for cell in array.cells] == [cell.id for cell in found[job].cells]
    gather, summary = by_stage(found, "gather")[0], by_stage(found, "summarise")[0]
    assert (gather.rule, waits_for(gather, found)) == ("afterany", ["preprocess 1/2", "preprocess 2/2"])
    assert summary.rule == "afterany" and len(waits_for(summary, found)) == len(plan.todo) - 1
    assert [array.rule for array in by_stage(found, "measure")] == [""]


def test_stored_scales_stand_between_backbones_and_fusion(launcher: Launcher) -> None:
    plan = plan_of(launcher, "finetune.features=cached")
    found = arrays(plan.todo, {}, 1000)
    all_met(found, plan.todo)
    (stored,) = by_stage(found, "features")
    assert stored.rule == "aftercorr" and set(waits_for(stored, found)) == {"pretrain rgb", "pretrain ndvi"}
    (fused,) = by_stage(found, "finetune")
    assert all(label.startswith("features") for label in waits_for(fused, found))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_arrays_are_cut_at_what_slurm_takes_and_nothing_is_lost(launcher: Launcher, most: int) -> None:
    plan = plan_of(launcher, *THREE)
    found = arrays(plan.todo, {}, most)
    assert max(len(array.cells) for array in found) == most
    assert sorted(cell.id for array in found for cell in array.cells) == sorted(cell.id for cell in plan.todo)
    all_met(found, plan.todo)


def test_what_slurm_has_already_is_waited_for_by_its_number_and_not_submitted_again(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    ids = {cell.label: cell.id for cell in plan.todo}
    queued = {ids["gather"]: "7", ids["pretrain rgb"]: "8_0", ids["pretrain ndvi"]: "8_1"}
    found = arrays([cell for cell in plan.todo if cell.stage != "preprocess"], queued, 1000)
    assert not by_stage(found, "gather") and not by_stage(found, "pretrain")
    (fused,) = by_stage(found, "finetune")
    assert fused.dependency({}) == "afterok:8_0:8_1"
    scores = {array.dependency({fused.number: "9"}): len(array.cells) for array in by_stage(found, "evaluate")}
    assert scores == {"aftercorr:8": 2, "afterok:9": 1}
    (summary,) = by_stage(found, "summarise")
    numbers = {array.number: str(100 + array.number) for array in found}
    assert set(summary.dependency(numbers).split(":")) == {"afterany", "7", "8", *numbers.values()} - {
        numbers[summary.number]
    }


def test_a_summary_in_the_queue_is_left_alone_until_something_is_submitted_that_it_does_not_wait_for(
    launcher: Launcher,
) -> None:
    plan = plan_of(launcher)
    everything = {cell.id: str(number) for number, cell in enumerate(plan.todo)}
    assert arrays(plan.todo, everything, 1000) == []
    lost = next(cell for cell in plan.todo if cell.stage == "evaluate")
    rest = {name: job for name, job in everything.items() if name != lost.id}
    again, summary = arrays(plan.todo, rest, 1000)
    assert (again.cells, summary.stage) == ((lost,), "summarise")
    assert set(summary.dependency({0: "new"}).split(":")) == {"afterany", "new", *rest.values()}


def test_evaluations_of_a_part_of_an_array_still_pair_with_its_elements(launcher: Launcher) -> None:
    plan = plan_of(launcher, "grid.seed=[0, 1, 2]", "finetune.backbones=full")
    first = next(cell for cell in plan.todo if cell.stage == "finetune")
    todo = [cell for cell in plan.todo if not (cell.stage == "evaluate" and first.id in cell.needs)]
    found = arrays(todo, {}, 1000)
    all_met(found, todo)
    (trained,) = by_stage(found, "finetune")
    assert trained.cells[-1] == first
    scores = next(array for array in by_stage(found, "evaluate") if array.after[0][0] == trained.number)
    assert (scores.rule, len(scores.cells)) == ("aftercorr", 2)
