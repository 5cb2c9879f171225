"""The section that says how a scaling study is made, and what one of its cells does."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from rtshpc.core.config.checks import unique
from rtshpc.core.config.section import Section, doc

KINDS = ("strong", "weak", "array", "preprocess", "map")
"""Fixed global batch, fixed batch a GPU, one-node jobs at once, tasks of preprocess, tasks of map."""

TRAINED_KINDS = frozenset({"strong", "weak", "array"})
"""Kinds that time the steps of a training."""

Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(unique)]
"""Counts of which each is 1 or more, and none is given twice."""


class ScaleConfig(Section):
    """A scaling study (docs/scaling.md); `launch scale` makes it, sweeps have no use for it."""

    gpus: Counts = doc("counts of GPUs, of processes where the site has none: strong and weak scaling", (1, 2, 4, 8))
    concurrency: Counts = doc("counts of one-node jobs at once: array throughput", (1, 2, 4))
    tasks: Counts = doc("counts of tasks: preprocess and map", (1, 2, 4))
    repeats: int = doc("measurements at each count, each a job of its own", 3, ge=1)
    steps: int = doc("optimizer steps that are timed", 20, ge=1)
    warmups: int = doc("steps before them, which are not", 5, ge=0)
    batch: int = doc("strong: chips of a step over all GPUs; 0 = finetune.batch_size", 0, ge=0)
    batch_per_gpu: int = doc("weak: chips of a step on each GPU", 4, ge=1)
    waves: int = doc("array: jobs of a measurement, as a multiple of those at once", 2, ge=1)


class ScaleTask(Section):
    """What one cell of a scaling study measures."""

    kind: str = doc("one of KINDS")
    count: int = doc("GPUs or processes (strong, weak), jobs at once (array), tasks (preprocess, map)", ge=1)
    repeat: int = doc("number of the measurement at this count", 0, ge=0)
    batch: int = doc("chips of a step over all processes; 0 = no training", 0, ge=0)
    part: int = doc("array: number of the job in its measurement", 0, ge=0)
    parts: int = doc("cells of the measurement: one, or the jobs of an array", 1, ge=1)
    inputs: str = doc("digest of data, model and training")
