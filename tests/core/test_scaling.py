"""Scaling studies: their cells, what each asks of a site, and the points that records give."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rtshpc.core.config import RunConfig, ScaleTask, SiteConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.load import load_run
from rtshpc.core.sizing.scaling import ScalePoint, scale_points, scale_rows
from rtshpc.core.sizing.studies import batches, measurements, scale_cells, spread

GPUS = SiteConfig(name="big", executor="slurm", gpus=1, node_gpus=4, memory_gb=10)
CPUS = SiteConfig(name="lab", executor="slurm", tasks_per_node=2)


def demo(**scale: Any) -> RunConfig:
    return load_run("demo", [f"scale.{key}={json.dumps(value)}" for key, value in {"batch": 8, **scale}.items()])


def asked(site: SiteConfig, count: int, kind: str = "strong") -> tuple[int, int, int]:
    found = spread(site, ScaleTask(kind=kind, count=count, inputs="x"))
    return found.nodes, found.tasks, found.gpus


@pytest.mark.parametrize(
    ("count", "nodes", "tasks"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (6, 2, 3), (7, 7, 1), (8, 2, 4)]
)
def test_processes_fill_nodes_evenly_with_a_gpu_each(count: int, nodes: int, tasks: int) -> None:
    assert asked(GPUS, count) == (nodes, tasks, tasks)
    assert asked(GPUS, count, "preprocess") == (count, 1, 0)


def test_on_cpus_the_site_says_how_many_tasks_a_node_takes() -> None:
    assert [asked(CPUS, count) for count in (1, 2, 4)] == [(1, 1, 0), (1, 2, 0), (2, 2, 0)]
    assert asked(SiteConfig(executor="slurm"), 4) == (4, 1, 0)


def test_jobs_of_an_array_are_the_sites_own_and_as_many_at_once_as_its_count() -> None:
    found = spread(GPUS.model_copy(update={"nodes": 3}), ScaleTask(kind="array", count=5, parts=10, inputs="x"))
    assert (found.nodes, found.gpus, found.max_jobs) == (1, 1, 5)
    assert spread(GPUS, ScaleTask(kind="weak", count=5, inputs="x")).max_jobs == 1


def test_elsewhere_than_on_slurm_all_processes_are_here_with_a_gpu_each() -> None:
    here = SiteConfig(gpus=1, max_jobs=9)
    assert [
        spread(here, ScaleTask(kind=kind, count=3, inputs="x")).gpus for kind in ("strong", "map", "preprocess")
    ] == [3, 3, 0]
    assert asked(here, 3) == (1, 1, 3)


def test_what_no_node_can_hold_and_batches_without_a_chip_for_everyone_are_refused_in_one_line() -> None:
    small = GPUS.model_copy(update={"node_memory_gb": 30})
    with pytest.raises(ConfigError, match="site big: strong scaling over 4: memory_gb = 10 asks for 40 of a node"):
        asked(small, 4)
    with pytest.raises(ConfigError, match=r"scale.gpus = 16: strong scaling shares a batch of 8 chips, so 8"):
        scale_cells(demo(gpus=[16]), "f")
    with pytest.raises(ConfigError, match=r"scale.concurrency = 600: takes 1200 jobs, site.max_array = 1000"):
        scale_cells(demo(concurrency=[600]), "f")
    with pytest.raises(ConfigError, match="given twice"):
        demo(gpus=[2, 2])


def test_strong_scaling_keeps_the_batch_weak_scaling_keeps_that_of_a_gpu() -> None:
    cells = [cell for cell in scale_cells(demo(gpus=[1, 2, 4], batch_per_gpu=3), "f") if cell.scaling is not None]
    batch = {(cell.scaling.kind, cell.scaling.count): cell.config.finetune.batch_size for cell in cells}
    assert [batch["strong", count] for count in (1, 2, 4)] == [8, 8, 8]
    assert [batch["weak", count] for count in (1, 2, 4)] == [3, 6, 12]
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.scaling.inputs for cell in cells}) == 1


def test_another_site_another_detector_and_other_data_are_other_measurements_but_names_and_paths_are_not() -> None:
    def ids(config: RunConfig, fingerprint: str = "f") -> list[str]:
        return [cell.id for cell in scale_cells(config, fingerprint) if cell.scaling is not None]

    config = demo(gpus=[1], concurrency=[], tasks=[])
    first = ids(config)
    assert first == ids(config.model_copy(update={"name": "other", "grid": {}}))
    others = [
        ids(config.model_copy(update={"site": config.site.model_copy(update={"name": "elsewhere"})})),
        ids(config.model_copy(update={"seed": 7})),
        ids(config, "g"),
        ids(demo(gpus=[1], concurrency=[], tasks=[], steps=7)),
    ]
    assert all(set(first).isdisjoint(other) for other in others)


def test_fewer_chips_at_once_make_only_those_measurements_anew_that_had_more() -> None:
    config = demo(gpus=[1, 2, 4], concurrency=[], tasks=[1], repeats=1)
    less = config.model_copy(update={"site": config.site.model_copy(update={"micro_batch": 4})})
    before, after = ({cell.id: cell.label for cell in scale_cells(one, "f")} for one in (config, less))
    assert {label for id, label in before.items() if id not in after} == {"scale strong 1, repeat 1/1"}


def test_repeats_are_submitted_together_one_at_a_time_and_each_array_measurement_alone() -> None:
    cells = scale_cells(demo(gpus=[1, 2], concurrency=[2], tasks=[2], repeats=3), "f")
    assert [len(batch) for batch in batches(cells)] == [3, 3, 3, 3, 4, 4, 4, 3, 3]
    assert [len(one) for one in measurements(cells)] == [1] * 12 + [4] * 3 + [1] * 6


def test_points_of_a_study_name_their_records_and_jobs_and_rows_are_medians_over_repeats(study: Any) -> None:
    points = scale_points(study(repeats=3))
    assert [(one.kind, one.count, one.repeat) for one in points[:4]] == [
        ("strong", 1, 0), ("strong", 1, 1), ("strong", 1, 2), ("strong", 2, 0),
    ]  # fmt: skip
    assert all(len(one.jobs) == len(one.sources) == (1 if one.kind != "array" else 2 * one.count) for one in points)
    rows = {(row.kind, row.count): row for row in scale_rows(points)}
    assert [rows["strong", count].repeats for count in (1, 2, 4)] == [3, 3, 3]
    assert [rows["strong", count].efficiency for count in (1, 2, 4)] == pytest.approx([1, 0.9, 0.81])
    assert [rows["strong", count].speed_up for count in (1, 2, 4)] == pytest.approx([1, 1.8, 3.24])
    assert rows["strong", 2].rate == pytest.approx(18 * 1.01)
    assert (rows["strong", 2].low, rows["strong", 2].high) == pytest.approx((18 * 1.005, 18 * 1.015))


def test_array_throughput_is_jobs_an_hour_from_the_first_start_to_the_last_end(study: Any) -> None:
    points = {one.count: one for one in scale_points(study(repeats=1, share=0.5)) if one.kind == "array"}
    # Alone a job takes 60 s, two at once 120 s each: two waves of one in 120 s, two waves of two in 240 s.
    assert (points[1].seconds, points[1].rate, points[1].reached) == (
        (pytest.approx(120),),
        pytest.approx(60),
        pytest.approx(1),
    )
    assert (points[2].seconds, points[2].rate, points[2].reached) == (
        (pytest.approx(240),),
        pytest.approx(60),
        pytest.approx(2),
    )
    assert points[2].nodes == 2


def test_a_measurement_of_which_a_job_is_missing_or_of_two_submissions_is_none(study: Any) -> None:
    def pairs(paths: Any) -> list[ScalePoint]:
        return [one for one in scale_points(paths) if (one.kind, one.count) == ("array", 2)]

    assert pairs(study("a", repeats=1, lost="scale array 2, repeat 1/1, job 4")) == []
    paths = study("b", repeats=1)
    chosen = pairs(paths)[0].sources[0]
    record = json.loads((paths.root / chosen).read_text())
    record["results"]["series"] = "another"
    (paths.root / chosen).write_text(json.dumps(record))
    assert pairs(paths) == []


def test_a_folder_that_holds_no_study_has_no_points(tmp_path: Any) -> None:
    from rtshpc.core.paths import RunPaths

    assert scale_points(RunPaths(tmp_path)) == []


def test_devices_and_inputs_are_never_put_together() -> None:
    facts = {"kind": "strong", "unit": "samples/s", "seconds": (1.0,), "sources": ("a",), "device": "cuda"}
    one = ScalePoint(count=1, rate=1.0, gpu="A100", inputs="x", **facts)
    points = [
        one,
        one.model_copy(update={"gpu": "A5000", "count": 2}),
        one.model_copy(update={"inputs": "y", "count": 4}),
    ]
    assert [(row.base, row.efficiency) for row in scale_rows(points)] == [(1, 1.0), (2, 1.0), (4, 1.0)]


def test_a_study_of_nothing_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="all empty: nothing would be measured"):
        scale_cells(demo(gpus=[], concurrency=[], tasks=[]), "f")


def test_a_record_that_holds_no_measurement_counts_as_none_and_takes_no_other_with_it(study: Any) -> None:
    paths = study("c", repeats=1)
    before = scale_points(paths)
    file = paths.root / before[0].sources[0]
    whole = json.loads(file.read_text())
    spoilt: list[dict[str, Any]] = [{"kind": ["strong"]}, {"kind": "sideways"}, {"rate": -1}, {"series": None}]
    for results in [{}, *({**whole["results"], **one} for one in spoilt)]:
        file.write_text(json.dumps({**whole, "results": results}))
        assert scale_points(paths) == before[1:], results
