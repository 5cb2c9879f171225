"""Texts: what records can say of a programme's questions, where a person must write, and the formulas."""

from __future__ import annotations

from collections.abc import Callable

from rtshpc.core.errors import ConfigError, unknown
from rtshpc.core.sizing.request import Field
from rtshpc.core.sizing.scaling import ScaleRow
from rtshpc.report.allocation import demand
from rtshpc.report.allocation.evidence import Evidence
from rtshpc.report.allocation.scaling import GOOD, of_kind
from rtshpc.report.entries import MIB, Entry, Table, duration, missing, modality_set, thousands, words
from rtshpc.report.tables import memory

TO_WRITE = "To be written"
"""Mark of what a person must write."""


def answers(evidence: Evidence) -> tuple[tuple[str, tuple[Entry, ...]], ...]:
    """(heading, paragraphs) of every field of the programme, in its order.

    Raises:
        ConfigError: the request's texts name a field that the programme has not.
    """
    fields = {field.id: field for field in evidence.programme.fields}
    for name in evidence.request.texts:
        if name not in fields:
            raise ConfigError(unknown("texts", name, fields))
    return tuple((field.title, _answer(evidence, field)) for field in fields.values())


def _answer(evidence: Evidence, field: Field) -> tuple[Entry, ...]:
    asked = field.asks + (f" (demanded by {field.source}, read {field.date})" if field.source else "")
    found = [words(f"Asked: {asked}")]
    for name in field.answered_by:
        found += _TEXTS[name](evidence) if name in _TEXTS else []
    tables = [name for name in field.answered_by if name not in _TEXTS]
    if tables:
        found.append(words(f"See {', '.join(tables)}."))
    written = evidence.request.texts.get(field.id, "").strip()
    if written:
        found += [words(" ".join(part.split()), source="request.yaml") for part in written.split("\n\n")]
    elif field.person:
        limit = f" (at most {field.words} words)" if field.words else ""
        found.append(Entry(TO_WRITE, "missing", "", f"{field.person}{limit}"))
    return tuple(found)


def _parallelisation(evidence: Evidence) -> list[Entry]:
    found = [
        words(
            "A training is data-parallel: one process for each GPU, each with its share of every batch; gradients and batch "
            "norms are averaged over the processes (NCCL on GPUs, gloo on CPUs), so that the batch, and with it the weights, "
            "are the same within rounding whatever the number of GPUs. The cells of a grid are independent jobs, submitted as Slurm arrays "
            "that are chained by dependencies; preprocessing and mapping are split over tasks by scenes and blocks."
        )
    ]
    for run in evidence.runs:
        site, cells = run.config.site, len(run.records.cells)
        found.append(
            words(
                f"Run {run.name}: {cells} cells, at most {site.max_jobs} jobs of an array at once; a training has"
                f" {site.nodes} node{'' if site.nodes == 1 else 's'} with {max(site.gpus, site.tasks)} "
                f"{'GPU' if site.gpus else 'process'}{'es' if not site.gpus and site.tasks > 1 else 's' if site.gpus > 1 else ''} each.",
                source=f"{run.name}/config.yaml",
            )
        )
    for kind in ("strong", "weak"):
        rows = of_kind(evidence, kind)
        if rows:
            found.append(_largest(kind, rows))
    return found


def _largest(kind: str, rows: list[ScaleRow]) -> Entry:
    """The speed-up at the largest count, and the largest count that is still efficient."""
    last = max(rows, key=lambda row: row.count)
    good = [row for row in rows if row.efficiency >= GOOD]
    most = max(good, key=lambda row: row.count, default=None)
    what = "GPUs" if last.device == "cuda" else "processes on CPUs"
    text = f"{kind.capitalize()} scaling, {last.count} {what}: speed-up {last.speed_up:.2f}, efficiency {100 * last.efficiency:.1f} %"
    text += (
        f"; at least {GOOD:.0%} efficiency up to {most.count}."
        if most
        else f"; no count reaches {GOOD:.0%} efficiency."
    )
    return words(text, source=" | ".join((*last.sources, *(most.sources if most else ()))))


def _job_size(evidence: Evidence) -> list[Entry]:
    made, _ = memory.groups(evidence.records)
    site, found = evidence.site, list[Entry]()
    for group in made:
        peaks = [(row, row.peak("alloc_peak_step") or row.peak(group.key)) for row in group.rows]
        told = [f"{row.name} {thousands(peak / MIB)}" for row, peak in peaks if peak is not None]
        if group.backend == "cuda" and told:
            room = f" A GPU of {site.name} has {site.gpu_memory_gb} GB." if site.gpu_memory_gb else ""
            text = f"MiB that a step takes on a {group.device}: {', '.join(told)} ({group.protocol}).{room}"
            found.append(words(text, source=" | ".join(row.result.source for row, _ in peaks)))
    if not found:
        found.append(missing("no memory of a GPU: no measure record of these runs is of one"))
    rows = [row for row in of_kind(evidence, "strong") if row.efficiency >= GOOD]
    if rows:
        best = max(rows, key=lambda row: row.count)
        one, more, where = (
            ("GPU", "GPUs", "")
            if best.device == "cuda"
            else ("process", "processes", " (on CPUs: no GPU was measured)")
        )
        text = f"Jobs of {best.count} {one if best.count == 1 else more}{where} are the largest with at least {GOOD:.0%} efficiency ({100 * best.efficiency:.1f} %)."
        found.append(words(text, source=" | ".join(best.sources)))
    return found


def _checkpointing(evidence: Evidence) -> list[Entry]:
    found: list[Entry] = []
    for run in evidence.runs:
        config, site = run.config, run.config.site
        spans = sorted({config.pretrain.checkpoint_seconds, config.finetune.checkpoint_seconds})
        every = " or ".join(duration(span) for span in spans)
        text = f"Run {run.name}: a training saves its state at the end of each epoch and after {every}"
        if site.executor == "slurm":
            again = {
                "never": "nothing queues itself again",
                "stopped": "what was stopped or lost its node queues itself again",
            }
            text += f", and {site.warn_seconds} s before its time limit or when it is preempted; "
            text += again.get(site.requeue, "what was stopped or killed queues itself again")
            text += f", up to {site.max_attempts} attempts"
        text += ". A training that goes on gives the weights of one that was never interrupted (tested to the byte on CPUs)."
        found.append(words(text, source=f"{run.name}/config.yaml"))
        trained = [one for one in run.records.of("pretrain", "finetune") if one.record]
        resumed = [one for one in trained if isinstance(one.get("resumed"), int) and one.get("resumed")]
        if trained:
            source = " | ".join(f"{one.source}#results.resumed" for one in trained)
            found.append(words(f"{len(resumed)} of its {len(trained)} trainings were taken up again.", source=source))
    for line in demand.lines(evidence):
        if line.cost is not None and line.rerun > 1.0005:
            text = f"{line.item.name}: reruns cost {100 * (line.rerun - 1):.1f} % on top ({line.unit}, T6)."
            found.append(words(text, source=line.source))
    return found


def _bottleneck(evidence: Evidence) -> list[Entry]:
    found: list[Entry] = []
    for result in evidence.done("scale"):
        waits, task = result.get("data_wait_share"), result.cell.scaling
        if isinstance(waits, int | float) and task is not None and task.kind == "strong" and task.repeat == 0:
            text = f"Strong scaling at {task.count}: {100 * waits:.1f} % of a step is spent waiting for samples."
            found.append(words(text, source=f"{result.source}#results.data_wait_share"))
    for key, text in (("data_wait_share", "Share of a step that waits for samples"), ("gpu_utilisation", "GPU busy")):
        known = [(one, one.get(key)) for one in evidence.done("measure") if isinstance(one.get(key), int | float)]
        shares = [f"{modality_set(one.cell.modalities)} {one.cell.arm} {100 * share:.1f} %" for one, share in known]
        if shares:
            source = " | ".join(f"{one.source}#results.{key}" for one, _ in known)
            found.append(words(f"{text}: {', '.join(shares)}.", source=source))
    for kind in ("strong", "weak"):
        rows = of_kind(evidence, kind)
        if len(rows) > 1:
            last = max(rows, key=lambda row: row.count)
            text = f"{kind.capitalize()} scaling: {100 * last.efficiency:.1f} % of the ideal speed is left at {last.count}."
            found.append(words(text, source=" | ".join(last.sources)))
    return found or [missing("no record tells how long a step waits for its samples or how busy a GPU is")]


_TEXTS: dict[str, Callable[[Evidence], list[Entry]]] = {
    "parallelisation": _parallelisation,
    "job_size": _job_size,
    "checkpointing": _checkpointing,
    "bottleneck": _bottleneck,
}


def unwritten(evidence: Evidence) -> list[str]:
    """Fields that a person must still write, or has written too much for."""
    found: list[str] = []
    for field in evidence.programme.fields:
        written = evidence.request.texts.get(field.id, "").split()
        if field.person and not written:
            found.append(f"{field.title}: {field.person}.")
        if field.words and len(written) > field.words:
            found.append(f"{field.title}: {len(written)} words, at most {field.words} are taken.")
    return found


def formulas() -> Table:
    """The formulas behind the figures."""
    rows = (
        (
            "speed-up",
            "S(n) = n₀ · r(n) / r(n₀)",
            "r(n): median rate at count n; n₀: the smallest count that was measured",
        ),
        ("efficiency", "E(n) = S(n) / n", "1 is ideal; 75 % is the broken line of the figures"),
        (
            "quartiles",
            "Q₁, Q₃ of the repeats",
            "linear interpolation, ends included; of fewer than three the smallest and the largest",
        ),
        ("GPU-hours", "H = Σ GPUs held · hours", "over all attempts of a job, failed and requeued ones too"),
        (
            "cost of a job",
            "c = mean of H over jobs done in one attempt",
            "where none was: H of all attempts / jobs done",
        ),
        ("rerun factor", "f = H of all attempts / (c · jobs done)", "1 where nothing was ever run twice or in vain"),
        ("growth", "g = E(measured GPUs) / E(asked GPUs)", "1 where a job has as many GPUs as were measured"),
        (
            "worth",
            "w = hours at the site asked / hours measured",
            "gpu_equivalents of the site's file; 1 at the same site",
        ),
        ("subtotal", "T = c · f · jobs · work · g · w", "work: of one job over that of a measured one"),
        ("charge, by GPU", "C = T · charge_per_gpu_hour", "of the site's file"),
        (
            "charge, by node",
            "C = job hours · nodes held · charge_per_node_hour",
            "nodes held: the largest share of a node's GPUs, cores or memory",
        ),
        ("period", "Tₚ = T · weight of p / sum of weights", "weights of the request; equal without"),
        (
            "frozen of full",
            "value on frozen backbones / value of full training",
            "same modalities, mixer, data and protocol",
        ),
    )
    body = tuple((words(name), Entry(text, "code"), words(told)) for name, text, told in rows)
    return Table("formulas", "How figures are worked out.", ("Figure", "Formula", "Where"), body)
