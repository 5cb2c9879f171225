"""Points of a scaling study: what `launch scale` measured, for who reports it."""

from __future__ import annotations

from rtshpc.core.config.section import Section, doc

KINDS = ("strong", "weak", "array", "preprocess", "map")
"""Fixed global batch, fixed batch a GPU, one-node jobs at once, tasks of preprocess, tasks of map."""


class ScalePoint(Section):
    """One measured repeat at one count."""

    kind: str = doc("one of KINDS")
    count: int = doc(
        "GPUs (processes where there are none) of strong and weak; jobs or tasks at once of the others", ge=1
    )
    nodes: int = doc("nodes they were on", 1, ge=1)
    repeat: int = doc("number of the repeat", 0, ge=0)
    rate: float = doc("work done per unit of time; larger is faster", gt=0)
    unit: str = doc("of rate: samples/s, cells/h, chips/s, scenes/h")
    seconds: tuple[float, ...] = doc("steps that were timed, s (strong, weak); the wall time of the whole (others)")
    batch: int = doc("global batch of strong and weak; 0 = of the others", 0, ge=0)
    device: str = doc("cuda, cpu or fake")
    gpu: str = doc("name of the GPU; empty on CPUs", "")
    inputs: str = doc("digest of data, model and training: points with another are not to be compared")
    jobs: tuple[str, ...] = doc("Slurm's numbers of the jobs, or host:pid here", ())
    sources: tuple[str, ...] = doc("records it was read from, relative to the run folder")
