"""T4 and T7: memory of every arm beside the paper's, and frozen backbones against full training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rtshpc.report import figures, paper
from rtshpc.report.allocation.evidence import Evidence, Run
from rtshpc.report.collect import CellResult
from rtshpc.report.content import quiet
from rtshpc.report.entries import MIB, Entry, Table, measured, missing, number, sources, words
from rtshpc.report.tables import memory, scores

_HOUR = 3600.0


def _groups(evidence: Evidence) -> tuple[tuple[memory.Group, ...], list[memory.Measured]]:
    """What was measured, and what was not: of what has been measured anew, a record of an older version is none's loss."""
    made, absent = memory.groups(evidence.records)
    have = {(row.result.run, row.modalities, row.arm) for group in made for row in group.rows}
    return made, [row for row in absent if (row.result.run, row.modalities, row.arm) not in have]


def _not_measured(absent: Sequence[memory.Measured]) -> list[tuple[str, str]]:
    """(what of which run and why, its records), those of one reason together."""
    by_reason: dict[tuple[str, str], list[memory.Measured]] = {}
    for row in absent:
        by_reason.setdefault((row.result.run, row.result.reason or "unknown backend"), []).append(row)
    return [
        (f"run {run}: {', '.join(row.name for row in rows)}: {why}", " | ".join(row.result.source for row in rows))
        for (run, why), rows in by_reason.items()
    ]


def memory_tables(evidence: Evidence) -> tuple[Table, ...]:
    """Table 2 of the paper, and whole steps and the device, for each backend, device and protocol."""
    made, _ = memory.groups(evidence.records)
    makers = (memory.memory_table, memory.device_table)
    found = [make(group, i) for i, group in enumerate(made) for make in makers]
    return tuple(evidence.traced(quiet(replace(table, name=f"T4_{table.name}"))) for table in found)


def memory_words(evidence: Evidence) -> tuple[Entry, ...]:
    """What pretrained backbones save, and what was not measured."""
    made, absent = _groups(evidence)
    told = [*memory.sentences(made)]
    told += [missing(text, sources_of) for text, sources_of in _not_measured(absent)]
    if not made and not absent:
        told.append(missing("memory: no run that is given has a measure cell (`launch measure`)"))
    return tuple(told)


def memory_charts(evidence: Evidence) -> tuple[figures.Picture, ...]:
    """Table 2 as bars, and the paper's own (its Fig. 4)."""
    made, _ = memory.groups(evidence.records)
    return (*(figures.memory_bars(group, i) for i, group in enumerate(made)), figures.paper_memory_bars())


def arms_table(evidence: Evidence) -> Table | None:
    """Frozen against full, for each pair of which one was trained; None where there is none."""
    body: list[tuple[Entry, ...]] = []
    for run in evidence.runs:
        for pair in scores.against_full(scores.scored(run.records)):
            if any(one and one.record for one in (pair.first.trained, pair.second.trained)):
                body += _pair(run, pair)
    if not body:
        return None
    columns = ("Training", "Figure", "Frozen", "Full", "Frozen of full")
    caption = "Pretrained, frozen backbones against full training of the same cell."
    notes = (
        "Memory and energy are those of the measure cells with the same modalities (T4); time, parameters and AP50 are the "
        f"trainings'. The paper's AP50 (residual cross attention): {_printed()}.",
    )
    return evidence.traced(quiet(Table("T7", caption, columns, tuple(body), notes)))


def _printed() -> str:
    found: list[str] = []
    for names in (("rgb", "ndvi"), ("rgb", "ndvi", "nir")):
        pair = [paper.find(paper.CASCADE_MVIT, names, "cross", True, arm) for arm in ("pretrained", "full")]
        found.append(f"{' against '.join(f'{cell.value:.2f}' for cell in pair if cell)} with {len(names)} modalities")
    return ", ".join(found)


def _pair(run: Run, pair: scores.Comparison) -> list[tuple[Entry, ...]]:
    """The rows of one pair."""
    frozen, full = pair.first, pair.second
    name = ", ".join(filter(None, (scores.modality_set(frozen.modalities), frozen.setting)))
    trained = [row.trained for row in (frozen, full)]
    figures_of = [
        ("Step, s", [_of(one, "seconds_per_step", 4) for one in trained], True),
        ("Training, h (last attempt)", [_hours(one) for one in trained], True),
        *_measured(run, frozen.modalities),
        ("Trained parameters, M", [_of(one, "parameters.trainable", 2, 1e6) for one in trained], False),
        (f"{frozen.metric.capitalize()} AP50, %", [frozen.entry, full.entry], False),
    ]
    alike = _hardware(trained[0]) == _hardware(trained[1])
    rows: list[tuple[Entry, ...]] = []
    for label, (a, b), timed in figures_of:
        share = _share(a, b) if alike or not timed else missing("they ran on different hardware")
        rows.append((words(name), words(label), a, b, share))
    return rows


def _of(result: CellResult | None, key: str, places: int, scale: float = 1.0) -> Entry:
    return measured(result, key, places, scale) if result else missing("its training is not in this run")


def _hours(result: CellResult | None) -> Entry:
    if result is None or result.record is None:
        return missing(result.reason if result else "its training is not in this run")
    note = f"of {result.record.attempts} attempts" if result.record.attempts > 1 else ""
    return number(result.record.seconds, f"{result.source}#seconds", 3, _HOUR, note)


def _hardware(result: CellResult | None) -> tuple[object, ...]:
    known: Mapping[str, object] = result.record.environment if result and result.record else {}
    return tuple(known.get(key) for key in ("gpu", "cpu"))


def _measured(run: Run, modalities: tuple[str, ...]) -> list[tuple[str, list[Entry], bool]]:
    """Memory and energy of both arms, where both were measured alike."""
    for group in memory.groups(run.records)[0]:
        arms = {row.arm: row for row in group.rows if row.modalities == modalities}
        if {"pretrained", "full"} <= set(arms):
            both = [arms["pretrained"], arms["full"]]
            return [
                (f"Peak, MiB ({group.label})", [memory.figure(row, group.key, 1, MIB) for row in both], False),
                ("Energy of the measured steps, J", [memory.figure(row, "energy_joules", 1) for row in both], False),
            ]
    absent = [missing("not both arms were measured alike (T4)")] * 2
    return [("Peak, MiB", absent, False), ("Energy of the measured steps, J", absent, False)]


def _share(a: Entry, b: Entry) -> Entry:
    """One over the other, percent."""
    if a.value is None or not b.value:
        return words("–")
    return Entry(f"{100 * a.value / b.value:.1f} %", "number", sources(a, b), value=a.value / b.value)


def gaps(evidence: Evidence) -> list[str]:
    """Why T4 and T7 are incomplete."""
    made, absent = _groups(evidence)
    found: list[str] = []
    if not made:
        found.append("T4: no memory was measured (`launch measure`).")
    found += [f"T4: {text}." for text, _ in _not_measured(absent)]
    have = {row.arm for group in made for row in group.rows}
    if made and (lacking := [arm for arm in ("pretrained", "full", "cached") if arm not in have]):
        found.append(f"T4: not measured: {', '.join(lacking)}.")
    if len({group.device for group in made if group.backend == "cuda"}) > 1:
        found.append("T4: mixed GPU models.")
    if not any(scores.against_full(scores.scored(run.records)) for run in evidence.runs):
        found.append("T7: no cell was trained both on frozen backbones and in full.")
    return found


def without_gpu(evidence: Evidence) -> list[str]:
    """Tables that hold figures, and none of a GPU."""
    made, _ = memory.groups(evidence.records)
    found = (
        [
            "T4 Memory (alloc_peak_fb, alloc_peak_step, reserved_peak, device_used_peak_v2, energy_joules, gpu_utilisation)"
        ]
        if made and not any(group.backend == "cuda" for group in made)
        else []
    )
    trained = evidence.done("pretrain", "finetune")
    if trained and not any(result.get("device") == "cuda" for result in trained):
        found.append("T7 Frozen against full")
    return found
