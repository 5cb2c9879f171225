"""T1 to T3: strong and weak scaling, and how much gets done with more jobs and tasks at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rtshpc.core.sizing.scaling import ScaleRow
from rtshpc.report.allocation.evidence import Evidence
from rtshpc.report.entries import Entry, Table, missing, number, places_for, words

COUNTS, REPEATS = 4, 3
"""Counts of a scaling study, and repeats at each, below which a report is incomplete."""

GOOD = 0.75
"""Efficiency that a job of this size should at least have."""


@dataclass(frozen=True)
class Kind:
    """One way to scale.

    Attributes:
        name: of ScalePoint.
        table: name of the table (and of its CSV).
        title: heading.
        counted: what is counted, on GPUs and elsewhere.
        caption: what is held fixed.
    """

    name: str
    table: str
    title: str
    counted: str
    caption: str


KINDS = (
    Kind(
        "strong",
        "T1",
        "T1 Strong scaling",
        "GPUs",
        "Strong scaling: one training, the same global batch at each count.",
    ),
    Kind("weak", "T2", "T2 Weak scaling", "GPUs", "Weak scaling: one training, the same batch for each GPU."),
    Kind("array", "T3", "T3 Array throughput", "Jobs at once", "Array throughput: one-node jobs of a grid at once."),
    Kind("preprocess", "T3_preprocess", "Preprocessing", "Tasks", "Preprocessing: the scenes dealt to more tasks."),
    Kind("map", "T3_map", "Mapping", "Tasks", "Mapping: the blocks of the scenes dealt to more tasks."),
)
TRAINING = frozenset({"strong", "weak"})


def by_series(rows: Iterable[ScaleRow]) -> list[list[ScaleRow]]:
    """Rows that may be compared: the same kind, inputs, device and GPU."""
    series: dict[tuple[str, ...], list[ScaleRow]] = {}
    for row in rows:
        series.setdefault((row.kind, row.inputs, row.device, row.gpu), []).append(row)
    return list(series.values())


def of_kind(evidence: Evidence, kind: str) -> list[ScaleRow]:
    """Rows of one way to scale."""
    return [row for row in evidence.rows if row.kind == kind]


def counted(kind: Kind, rows: Sequence[ScaleRow]) -> str:
    """`GPUs`, or `Processes` where there are none."""
    return "Processes" if kind.name in TRAINING and all(row.device != "cuda" for row in rows) else kind.counted


def scaling_table(evidence: Evidence, kind: Kind) -> Table | None:
    """One row a count; None where nothing was measured."""
    rows = of_kind(evidence, kind.name)
    if not rows:
        return None
    several = len(by_series(rows)) > 1
    body = [_row(evidence, row, kind, several) for row in rows]
    columns = (
        counted(kind, rows),
        "Nodes",
        "Repeats",
        "Median rate",
        "Quartiles",
        *_timed(kind),
        "Speed-up",
        "Efficiency",
    )
    notes = [
        "Medians over the repeats, with the first and third quartile; the first steps of each are dropped. Speed-up and "
        f"efficiency are relative to the smallest count ({_bases(rows)})."
    ]
    devices = sorted({row.gpu or row.device for row in rows})
    if all(row.device != "cuda" for row in rows):
        notes.append("Measured on CPUs (processes that talk through gloo): no figure of this table is a GPU's.")
    if several:
        notes.append("Rows with another digest of data, model and training, or another device, are not comparable.")
        columns = (*columns, "Device", "Inputs")
    else:
        notes.append(f"Device: {', '.join(devices)}; digest of data, model and training: {rows[0].inputs}.")
    caption = f"{kind.caption} Rates in {rows[0].unit}."
    return evidence.traced(Table(kind.table, caption, columns, tuple(body), tuple(notes)))


def _timed(kind: Kind) -> tuple[str, ...]:
    if kind.name in TRAINING:
        return "Batch", "Step, s"
    return ("Jobs at work",) if kind.name == "array" else ("Time, s",)


def _row(evidence: Evidence, row: ScaleRow, kind: Kind, several: bool) -> tuple[Entry, ...]:
    source = " | ".join(row.sources)
    seconds = _seconds(evidence, row)
    if kind.name in TRAINING:
        timed = (number(row.batch, source), number(median(seconds), source, 4))
    elif kind.name == "array":
        timed = (number(row.reached, source, 1),)
    else:
        timed = (number(median(seconds), source, 1),)
    return (
        number(row.count, source),
        number(row.nodes, source),
        number(row.repeats, source),
        number(row.rate, source, places_for(row.rate)),
        words(f"{row.low:.{places_for(row.rate)}f} to {row.high:.{places_for(row.rate)}f}", source=source),
        *timed,
        number(row.speed_up, source, 2),
        Entry(f"{100 * row.efficiency:.1f} %", "number", source, value=row.efficiency),
        *((words(row.gpu or row.device), words(row.inputs)) if several else ()),
    )


def _seconds(evidence: Evidence, row: ScaleRow) -> list[float]:
    """Every time that was taken at this count."""
    own = set(row.sources)
    points = (point for run in evidence.runs for point in run.points if own >= set(point.sources))
    return [second for point in points for second in point.seconds]


def _bases(rows: Sequence[ScaleRow]) -> str:
    return ", ".join(map(str, sorted({row.base for row in rows})))


def gaps(evidence: Evidence) -> list[str]:
    """Why T1 to T3 are incomplete."""
    found: list[str] = []
    for kind in KINDS[:3]:
        rows = of_kind(evidence, kind.name)
        if not rows:
            found.append(f"{kind.title}: nothing was measured (`launch scale`).")
            continue
        series = by_series(rows)
        if len({row.inputs for row in rows}) > 1:
            found.append(f"{kind.title}: mixed inputs: the points are of {len(series)} data sets, models or trainings.")
        if len({(row.device, row.gpu) for row in rows}) > 1:
            names = ", ".join(sorted({row.gpu or row.device for row in rows}))
            found.append(f"{kind.title}: mixed devices: {names}.")
        most = max(len(own) for own in series)
        if most < COUNTS:
            found.append(f"{kind.title}: {most} of at least {COUNTS} counts were measured.")
        few = [f"{row.count} ({row.repeats})" for row in rows if row.repeats < REPEATS]
        if few:
            found.append(f"{kind.title}: fewer than {REPEATS} repeats at {', '.join(few)}.")
    return found


def without_gpu(evidence: Evidence) -> list[str]:
    """Tables that hold figures, and none of a GPU."""
    kinds = [(kind, of_kind(evidence, kind.name)) for kind in KINDS[:3]]
    return [kind.title for kind, rows in kinds if rows and all(row.device != "cuda" for row in rows)]


def absent(kind: Kind) -> Entry:
    """In place of a table."""
    return missing(f"{kind.caption} No run that is given holds such points.")
