"""Points of a scaling study: what `launch scale` measured, for who reports it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any

from rtshpc.core.config.scale import KINDS
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import RunError
from rtshpc.core.grid import valid_record
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_plan

HOUR = 3600.0


class ScalePoint(Section):
    """One measured repeat at one count."""

    kind: str = doc("one of KINDS")
    count: int = doc(
        "GPUs (processes where there are none) of strong and weak; jobs or tasks at once of the others", ge=1
    )
    nodes: int = doc("nodes they were on; of an array, different nodes its jobs were on", 1, ge=1)
    repeat: int = doc("number of the repeat", 0, ge=0)
    rate: float = doc("work done per unit of time; larger is faster", gt=0)
    unit: str = doc("of rate: samples/s (strong, weak), cells/h (array), chips/s (preprocess, map)")
    seconds: tuple[float, ...] = doc("steps that were timed, s (strong, weak); the wall time of the whole (others)")
    batch: int = doc("global batch of strong and weak, of each job of an array; 0 = of the others", 0, ge=0)
    reached: float = doc("array: jobs at work at once, on average; below `count` where nodes were short", 0.0, ge=0)
    device: str = doc("cuda, cpu or fake")
    gpu: str = doc("name of the GPU; empty on CPUs", "")
    inputs: str = doc("digest of data, model and training: points with another are not to be compared")
    jobs: tuple[str, ...] = doc("Slurm's numbers of the jobs, or host:pid here", ())
    sources: tuple[str, ...] = doc("records it was read from, relative to the run folder")


class ScaleRow(Section):
    """The repeats at one count together."""

    kind: str = doc("one of KINDS")
    count: int = doc("see ScalePoint", ge=1)
    nodes: int = doc("most nodes of a repeat", ge=1)
    repeats: int = doc("how many", ge=1)
    rate: float = doc("median of their rates")
    low: float = doc("first quartile of the rates (the smallest of fewer than three)")
    high: float = doc("third quartile (the largest of fewer than three)")
    unit: str = doc("of the rates")
    batch: int = doc("see ScalePoint")
    reached: float = doc("smallest of the repeats, see ScalePoint")
    base: int = doc("smallest count of the same kind, inputs and device: what speed-up is relative to")
    speed_up: float = doc("rate / rate of base, times base")
    efficiency: float = doc("speed_up / count")
    device: str = doc("see ScalePoint")
    gpu: str = doc("see ScalePoint")
    inputs: str = doc("see ScalePoint")
    jobs: tuple[str, ...] = doc("of all repeats", ())
    sources: tuple[str, ...] = doc("of all repeats")


def scale_points(paths: RunPaths) -> list[ScalePoint]:
    """What a scaling study has measured, by kind, count and repeat; nothing for a folder that holds none.

    A measurement of array throughput counts when all its jobs have a record and were submitted together; a record
    that holds no measurement, or cannot be read, counts as none.

    Raises:
        RunError: plan.json cannot be read.
    """
    plan = read_plan(paths.plan)
    rows: list[dict[str, Any]] = plan["cells"] if plan is not None else []
    records = [_record(str(row["id"]), paths) for row in rows if row["stage"] == "scale"]
    together: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record is not None and is_measurement(record):
            told = record.results
            key = (told["kind"], told["count"], told["repeat"], told["batch"], told["inputs"])
            together.setdefault(key, []).append(record)
    points = [_point(members) for members in together.values() if whole(members)]
    return sorted(points, key=lambda one: (KINDS.index(one.kind), one.inputs, one.count, one.repeat))


def _record(cell: str, paths: RunPaths) -> Record | None:
    try:
        return valid_record(cell, "scale", paths)
    except RunError:
        return None


def whole(records: Sequence[Record]) -> bool:
    """Whether the records of a measurement are all there, hold what they should, and are of one submission."""
    if not all(map(is_measurement, records)):
        return False
    return len(records) == records[0].results["parts"] and len({one.results["series"] for one in records}) == 1


def is_measurement(record: Record) -> bool:
    """Whether a record of stage `scale` holds what a study writes: its cell is to be done again otherwise."""
    try:
        point, told = _point([record]), record.results
        return point.kind in KINDS and isinstance(told["parts"], int) and isinstance(told["series"], str)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False


def _point(records: Sequence[Record]) -> ScalePoint:
    told = records[0].results
    facts = {name: told[name] for name in ("kind", "count", "repeat", "unit", "batch", "device", "gpu", "inputs")}
    facts["jobs"] = tuple(dict.fromkeys(str(one.results["job"]) for one in records))
    facts["sources"] = tuple(sorted(f"cells/{one.cell}/record.json" for one in records))
    if told["kind"] != "array":
        return ScalePoint(**facts, nodes=told["nodes"], rate=told["rate"], seconds=tuple(told["seconds"]))
    ends = [float(one.results["ended"]) for one in records]
    wall = max(ends) - min(end - one.seconds for end, one in zip(ends, records, strict=True))
    hosts = {str(one.environment.get("host", "")) for one in records}
    worked = sum(one.seconds for one in records)
    rate, reached = len(records) / wall * HOUR, worked / wall
    return ScalePoint(**facts, nodes=len(hosts), rate=rate, seconds=(wall,), reached=reached)


def scale_rows(points: Iterable[ScalePoint]) -> list[ScaleRow]:
    """Repeats at one count together, in the points' order; what differs in inputs or device is never put together."""
    series: dict[tuple[str, ...], dict[int, list[ScalePoint]]] = {}
    for point in points:
        own = series.setdefault((point.kind, point.inputs, point.device, point.gpu), {})
        own.setdefault(point.count, []).append(point)
    rows: list[ScaleRow] = []
    for counts in series.values():
        base = min(counts)
        unit_rate = median(one.rate for one in counts[base]) / base
        rows += [_row(members, base, unit_rate) for members in counts.values()]
    return rows


def _row(members: Sequence[ScalePoint], base: int, unit_rate: float) -> ScaleRow:
    first, rates = members[0], [one.rate for one in members]
    low, high = _quartiles(rates)
    speed_up = median(rates) / unit_rate
    return ScaleRow(
        kind=first.kind,
        count=first.count,
        nodes=max(one.nodes for one in members),
        repeats=len(members),
        rate=median(rates),
        low=low,
        high=high,
        unit=first.unit,
        batch=first.batch,
        reached=min(one.reached for one in members),
        base=base,
        speed_up=speed_up,
        efficiency=speed_up / first.count,
        device=first.device,
        gpu=first.gpu,
        inputs=first.inputs,
        jobs=tuple(job for one in members for job in one.jobs),
        sources=tuple(source for one in members for source in one.sources),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 3:
        return min(values), max(values)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
