"""One measurement of a scaling study: training steps, preprocess or map, by all processes of the job together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from rtshpc.core.cell import Cell
from rtshpc.core.config import MapConfig, NormalConfig
from rtshpc.core.config.scale import TRAINED_KINDS
from rtshpc.core.errors import DataError, RunError, SceneRejected
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Progress
from rtshpc.core.scenes import list_scenes
from rtshpc.data.reader import read_index
from rtshpc.engine.detectors import channels_of, fresh
from rtshpc.engine.distributed import Group, run_group
from rtshpc.engine.feed import batches, full_steps
from rtshpc.engine.loop import Training, computing
from rtshpc.engine.nearby import near
from rtshpc.hpc import books
from rtshpc.mapping.pieces import write_pieces
from rtshpc.mapping.scenes.strips import ReadFacts
from rtshpc.mapping.scenes.survey import survey
from rtshpc.stages import preprocess
from rtshpc.stages.map import detecting, map_block

Measured = dict[str, Any]


def run(cell: Cell, paths: RunPaths, progress: Progress) -> Measured:
    """Measure what the cell's task says.

    Returns:
        `kind`, `count`, `repeat`, `part`, `parts`, `batch`, `inputs` (as its task says), `nodes`, `rate`, `unit`, `seconds`
        (steps of the slowest process, or the wall time of the slowest task; s), `processes`, `device`, `gpu`, `job`,
        `series` (what was submitted together), `ended` (s since 1970); of a training `warmups`, `data_wait_share`; of the
        others `chips`, `scenes`, `task_seconds`.

    Raises:
        DataError: there is nothing to measure with.
        RunError: a process failed, or the detector makes no masks (map).
    """
    task, config = cell.scaling, cell.config
    if task is None:
        raise RunError(f"cells/{cell.id}: says nothing to measure; it is no cell of `launch scale`")
    if task.kind in TRAINED_KINDS:
        paths = near(cell, paths, progress)
        processes = config.finetune.processes
    else:
        processes = task.count
    work, device = {
        "preprocess": (_preprocess, "cpu"),
        "map": (_map, config.map.device),
    }.get(task.kind, (_train, config.finetune.device))
    progress("scale", 0, 1, f"{task.kind} {task.count}")
    found = run_group(work, processes, device, (cell, paths, progress))
    if found["processes"] != processes and task.kind != "array":
        raise RunError(
            f"{cell.label}: {found['processes']} processes came, not {processes}; submit it by `launch scale`"
        )
    job, series = books.submission()
    return {
        **task.model_dump(mode="json"),
        **found,
        "nodes": int(os.environ.get("SLURM_JOB_NUM_NODES", "1")),
        "job": job,
        "series": series,
        "ended": time.time(),
    }


def _train(group: Group, cell: Cell, paths: RunPaths, progress: Progress) -> Measured:
    """Real steps on real shards: reading, augmenting, forward, backward, optimizer; the slowest process counts."""
    config, asked = cell.config.finetune, cell.config.scale
    told = progress if group.leads else SILENT
    with computing(config, group.device):
        told("load", 0, 1)
        training = Training(group, cell.model_copy(update={"stage": "finetune"}), paths, fresh, SILENT, lambda: 0)
        total = asked.warmups + asked.steps
        given = len(training.train_set), config.batch_size, cell.config.seed, total, group.rank, group.size
        took: list[float] = []
        waited: list[float] = []
        try:
            group.wait()
            before = time.perf_counter()
            pin = group.device.type == "cuda"
            for batch in batches(training.train_set, config, cell.config.seed, full_steps(*given), pin):
                came = time.perf_counter()
                training.step(batch)
                now = time.perf_counter()
                took.append(now - before)
                waited.append(came - before)
                before = now
                told("scale", len(took), total)
        finally:
            training.close()
        every = group.gather((took, waited))
    steps = [max(own[0][number] for own in every) for number in range(asked.warmups, total)]
    waits = [max(own[1][number] for own in every) for number in range(asked.warmups, total)]
    throughput = config.batch_size / median(steps)
    of_array = cell.scaling is not None and cell.scaling.kind == "array"
    return {
        # Of an array, all its jobs together have a rate.
        "rate": None if of_array else throughput,
        "unit": "cells/h" if of_array else "samples/s",
        "samples_per_second": throughput,
        "seconds": steps,
        "warmups": asked.warmups,
        "data_wait_share": sum(waits) / sum(steps),
        **_where(group),
    }


def _preprocess(group: Group, cell: Cell, paths: RunPaths, progress: Progress) -> Measured:
    """The sweep's scenes into shards that are thrown away, dealt out to the tasks as preprocess deals them."""
    work = RunPaths(paths.cell(cell.id).root / "work")
    if group.leads:
        shutil.rmtree(work.root, ignore_errors=True)  # of an attempt that was killed
        work.create()
        if cell.config.data.scenes.generated is not None:
            work.scenes.symlink_to(paths.scenes.absolute())
    part = {"id": f"{cell.id}-{group.rank}", "stage": "preprocess", "task": group.rank, "tasks": group.size}

    def share() -> tuple[int, int]:
        made = preprocess.run(cell.model_copy(update=part), work, SILENT)
        return len(made["chips"]), made["scenes"]

    found = _timed(group, share)  # returns when all tasks are through
    if group.leads:
        shutil.rmtree(work.root)
    return found


def _map(group: Group, cell: Cell, paths: RunPaths, progress: Progress) -> Measured:
    """The sweep's scenes through a detector with drawn weights, block by block, dealt out to the tasks."""
    config = _mapping(cell, paths)
    torch.set_num_threads(config.map.threads)
    scenes = list_scenes(config.data, paths.scenes)
    seen = survey(scenes, config.data, config.map)
    usable = [
        MapScene(scene=scene, fingerprint="", **dict(one))
        for scene, one in zip(scenes, seen, strict=True)
        if one.ground is not None
    ]
    own = [(scene, block) for scene in usable for block in range(scene.blocks)][group.rank :: group.size]
    detector = fresh(cell.model_copy(update={"arm": "full"})).to(group.device).eval()
    detect = detecting(detector, group.device, config.map.precision)
    side = config.data.chip.size_px * config.data.chip.enlarge
    empty = {name: torch.zeros(1, bands, side, side) for name, bands in channels_of(config, cell.modalities).items()}
    detect(empty)  # the warm-up: kernels are chosen and memory is taken once
    out = paths.cell(cell.id).pieces

    def share() -> tuple[int, int]:
        chips, done = 0, 0
        for scene, block in own:
            try:
                found = map_block(scene, block, config, detect, ReadFacts())
            except SceneRejected:
                continue
            write_pieces(out.with_name(f"{out.stem}-{group.rank}{out.suffix}"), found.pieces)
            chips, done = chips + found.mapped + found.empty, done + (block == 0)
        return chips, done

    try:
        return _timed(group, share)
    finally:
        out.with_name(f"{out.stem}-{group.rank}{out.suffix}").unlink(missing_ok=True)


def _mapping(cell: Cell, paths: RunPaths) -> Any:
    """The cell's config as `launch map` makes it of a trained cell: what it takes, and how that is normalised."""
    config, table = cell.config, read_index(paths.index)["modalities"]
    if not config.model.roi.mask:
        raise RunError(f"{cell.label}: detects boxes without masks (roi.mask = false), which make no map")
    statistics = {name: NormalConfig(mean=table[name]["mean"], std=table[name]["std"]) for name in cell.modalities}
    changed = {"modalities": cell.modalities, "statistics": statistics, "precision": config.finetune.precision}
    return config.model_copy(update={"map": MapConfig(**{**dict(config.map), **changed})})


def _timed(group: Group, share: Callable[[], tuple[int, int]]) -> Measured:
    """Every task's share, begun together; `share` gives (chips, scenes), and the slowest task counts."""
    group.wait()
    began = time.perf_counter()
    chips, scenes = share()
    every = group.gather((time.perf_counter() - began, chips, scenes))
    total = sum(one[1] for one in every)
    if not total:
        raise DataError("no chip came out of any scene, so there is nothing to measure; see shards/rejected.json")
    slowest = max(one[0] for one in every)
    return {
        "rate": total / slowest,
        "unit": "chips/s",
        "seconds": [slowest],
        "task_seconds": [one[0] for one in every],
        "chips": total,
        "scenes": sum(one[2] for one in every),
        **_where(group),
    }


def _where(group: Group) -> Measured:
    on_gpu = group.device.type == "cuda"
    name = torch.cuda.get_device_name(group.device) if on_gpu else ""
    return {"processes": group.size, "device": group.device.type, "gpu": name}
