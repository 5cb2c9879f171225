"""The cells of a scaling study: each measurement is one job, but that of array throughput, which is an array of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from rtshpc.core.cell import RESULT_VERSION, Cell, digest
from rtshpc.core.config import RunConfig, ScaleTask, SiteConfig
from rtshpc.core.config.scale import TRAINED_KINDS
from rtshpc.core.errors import ConfigError
from rtshpc.core.grid import numbered, plain_of, shard_cells

_SITE = ("name", "partition", "constraint", "gpu_type", "gpus", "nodes", "tasks_per_node", "cpus")
"""Keys of a site that can change how long something takes; the same study elsewhere is another one."""

_FREE = {"batch_size", "epochs", "device", "checkpoint_seconds", "features", "features_dtype", "validate_every"}
"""Keys of a training that change no step of a study, or are said by its tasks."""


def scale_cells(config: RunConfig, fingerprint: str) -> list[Cell]:
    """All cells of a study: the shards it reads, then measurement after measurement, in the order they run.

    Args:
        config: the sweep whose data, detector and training are measured; its grid is left out.
        fingerprint: of the input data.

    Raises:
        ConfigError: nothing is to be measured, a batch is smaller than the processes that share it, or the site cannot hold
            a measurement.
    """
    plain = plain_of(config)
    shards = shard_cells(plain, fingerprint)
    tasks = _tasks(plain, _inputs(plain, fingerprint))
    return numbered([*shards, *(_cell(plain, task, shards[-1]) for task in tasks)])


def measurements(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """The scale cells of a study by measurement, in order."""
    scaled = [cell for cell in cells if cell.scaling is not None]
    return [tuple(members) for _, members in groupby(scaled, _measurement)]


def batches(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """The scale cells that are submitted together, in order; nothing of the next begins before one is over.

    An array measurement is one, with `count` jobs at once; repeats of the others are one, a job at a time.
    """
    scaled = [cell for cell in cells if cell.scaling is not None]
    return [tuple(members) for _, members in groupby(scaled, batch_of)]


def batch_of(cell: Cell) -> tuple[str, int, int]:
    """Cells of the same one are submitted together."""
    assert cell.scaling is not None
    return cell.scaling.kind, cell.scaling.count, cell.scaling.repeat if cell.scaling.kind == "array" else 0


def _measurement(cell: Cell) -> tuple[str, int, int]:
    assert cell.scaling is not None
    return cell.scaling.kind, cell.scaling.count, cell.scaling.repeat


def _tasks(config: RunConfig, inputs: str) -> list[ScaleTask]:
    asked = config.scale
    if not (asked.gpus or asked.concurrency or asked.tasks):
        raise ConfigError("scale.gpus, scale.concurrency and scale.tasks are all empty: nothing would be measured")
    whole = asked.batch or config.finetune.batch_size
    counts: list[tuple[str, int, int, int]] = [  # kind, count, batch, parts
        *(("strong", count, whole, 1) for count in sorted(asked.gpus)),
        *(("weak", count, asked.batch_per_gpu * count, 1) for count in sorted(asked.gpus)),
        *(("array", count, whole, asked.waves * count) for count in sorted(asked.concurrency)),
        *((kind, count, 0, 1) for kind in ("preprocess", "map") for count in sorted(asked.tasks)),
    ]
    for kind, count, batch, _ in counts:
        if kind == "strong" and batch < count:
            raise ConfigError(
                f"scale.gpus = {count}: strong scaling shares a batch of {batch} chips, so {count - batch} would have"
                " none; give a larger scale.batch, or fewer GPUs"
            )
    return [
        ScaleTask(kind=kind, count=count, repeat=repeat, batch=batch, part=part, parts=parts, inputs=inputs)
        for kind, count, batch, parts in counts
        for repeat in range(asked.repeats)
        for part in range(parts)
    ]


def _cell(plain: RunConfig, task: ScaleTask, gather: Cell) -> Cell:
    tuning = plain.finetune
    modalities = (tuning.primary, *(name for name in tuning.modalities if name != tuning.primary))
    site = spread(plain.site, task)
    timed: dict[str, Any] = {"features": "live", "batch_size": task.batch or tuning.batch_size}
    if task.kind in ("strong", "weak"):
        timed["processes"] = task.count
    hashed: dict[str, Any] = {
        "task": task.model_dump(mode="json"),
        "steps": _steps(plain, task) if task.kind in TRAINED_KINDS else [],
        "site": site.model_dump(mode="json", include=set(_SITE)),
        "needs": [gather.id],
        "stage": "scale",
        "version": RESULT_VERSION["scale"],
    }
    part = f", job {task.part + 1}/{task.parts}" if task.parts > 1 else ""
    return Cell(
        id=digest(hashed),
        stage="scale",
        label=f"scale {task.kind} {task.count}, repeat {task.repeat + 1}/{plain.scale.repeats}{part}",
        needs=(gather.id,),
        modalities=modalities,
        arm=tuning.backbones,
        scaling=task,
        data_fingerprint=gather.data_fingerprint,
        config=plain.model_copy(update={"site": site, "finetune": tuning.model_copy(update=timed)}),
    )


def _steps(plain: RunConfig, task: ScaleTask) -> list[int]:
    """What a timed training hashes of its steps: how many, and the chips that a process has at once."""
    share = -(-task.batch // (1 if task.kind == "array" else task.count))
    return [plain.scale.steps, plain.scale.warmups, min(share, plain.site.micro_batch or share)]


def _inputs(config: RunConfig, fingerprint: str) -> str:
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "data": config.data.model_dump(mode="json", exclude={"shard", "root", "name"}),
        "model": config.model.model_dump(mode="json", exclude={"name"}),
        "training": config.finetune.model_dump(mode="json", exclude=_FREE),
        "map": config.map.model_dump(mode="json", include={"overlap_px", "batch_size", "precision", "threads"}),
        "seed": config.seed,
    }
    return digest(values)


def spread(site: SiteConfig, task: ScaleTask) -> SiteConfig:
    """The site as a job of one measurement asks for it: its nodes, the tasks and GPUs of each, and jobs at once.

    Tasks fill nodes evenly: as many on each as the site has GPUs there (`node_gpus`, else `gpus`), on CPUs
    `tasks_per_node`. Elsewhere than on Slurm all processes are here.

    Raises:
        ConfigError: such a job does not fit the site's nodes.
    """
    if task.parts > site.max_array:
        raise ConfigError(
            f"scale.concurrency = {task.count}: takes {task.parts} jobs, site.max_array = {site.max_array}"
        )
    at_once = task.count if task.kind == "array" else 1
    if task.kind == "array":
        return site.model_copy(update={"max_jobs": at_once, "nodes": 1})
    on_gpus = site.gpus > 0 and task.kind != "preprocess"
    if site.executor != "slurm":
        return site.model_copy(update={"max_jobs": at_once, "gpus": task.count if on_gpus else 0})
    most = (site.node_gpus or site.gpus) if on_gpus else site.tasks_per_node or 1
    on_each = max(number for number in range(1, most + 1) if task.count % number == 0)
    changed = {
        "max_jobs": at_once,
        "nodes": task.count // on_each,
        "tasks_per_node": on_each,
        "gpus": on_each if on_gpus else 0,
    }
    try:
        return SiteConfig.model_validate({**site.model_dump(), **changed})
    except ValidationError as error:
        why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"site {site.name}: {task.kind} scaling over {task.count}: {why}") from None
