"""What the report says, section by section, before it is HTML or Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from rtshpc.core.cell import Cell
from rtshpc.report import figures
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import Entry, Table, measured, missing, modality_set, words
from rtshpc.report.figures import Picture
from rtshpc.report.gallery import Embedded, embed
from rtshpc.report.tables import data, memory, runs, scores

EMBED_LIMIT_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Pictures:
    """The gallery of one evaluated cell; `reason` where it has no picture."""

    title: str
    pictures: tuple[Embedded, ...]
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """One section of the report.

    Attributes:
        id: anchor.
        paragraphs: sentences, each with its source.
        tables: shown openly.
        folded: shown on a click.
        gallery: pictures by cell.
        preformatted: (title, text) shown on a click as it is.
        maps: shown first; (name, title, caption, SVG of our own).
        sections: (heading, statements) below the paragraphs.
    """

    id: str
    title: str
    paragraphs: tuple[Entry, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Picture, ...] = ()
    folded: tuple[Table, ...] = ()
    gallery: tuple[Pictures, ...] = ()
    preformatted: tuple[tuple[str, str], ...] = ()
    maps: tuple[tuple[str, str, str, str], ...] = ()
    sections: tuple[tuple[str, tuple[Entry, ...]], ...] = ()


@dataclass(frozen=True)
class Content:
    """The whole report: title, a line on the setting, key figures and sections.

    Attributes:
        kind: what it is, above the title.
        files: what lies beside the page.
        pictures: definitions that the maps use, SVG of our own.
    """

    title: str
    setting: str
    dated: str
    cards: tuple[tuple[str, Entry], ...]
    headlines: tuple[Entry, ...]
    warnings: tuple[str, ...]
    parts: tuple[Part, ...]
    files: tuple[str, ...] = ()
    pictures: str = ""
    kind: str = "rtshpc report"


def build(records: RunRecords, cell: Cell, config_text: str) -> Content:
    """Everything the report says of these records.

    Args:
        records: as `collect` read them.
        cell: the summarise cell; gives the run's name and the data's definition, never a result.
        config_text: the run's config.yaml, shown as it is.
    """
    rows = scores.scored(records)
    counts = runs.state_counts(records)
    warnings = [f"{counts[state]} {state}" for state in ("failed", "missing") if counts[state]]
    total = sum(counts.values())
    return Content(
        title=cell.config.name,
        setting=runs.setting_sentence(records, cell),
        dated=runs.last_started(records),
        cards=_cards(records, rows),
        headlines=_headlines(rows),
        warnings=(f"{' and '.join(warnings)} of {total} cells: see “Cells without a result”.",) if warnings else (),
        parts=tuple(_parts(records, cell, rows, config_text)),
    )


def _headlines(rows: tuple[scores.Scored, ...]) -> tuple[Entry, ...]:
    """For each fused set its best cell against the primary alone; every other one is said under Accuracy."""
    found: dict[tuple[str, ...], scores.Comparison] = {}
    for item in scores.against_primary(rows):
        held = found.get(item.first.modalities)
        if held is None or (item.first.value or -1.0) > (held.first.value or -1.0):
            found[item.first.modalities] = item
    return tuple(item.sentence for item in found.values())


def _cards(records: RunRecords, rows: tuple[scores.Scored, ...]) -> tuple[tuple[str, Entry], ...]:
    top = scores.best(rows)
    found: list[tuple[str, Entry]] = []
    if top is None:
        found.append(("Best AP50 on the test split", missing("no cell has been scored")))
    else:
        note = f"{top.name}{'; ' + scores.LEAKAGE if top.leaky else ''}"
        shown = measured(top.result, f"{top.metric}.AP50", 2, note=note)
        found.append((f"Best {top.metric} AP50, test split, %", shown))
        matched = [item for item in scores.against_primary(rows) if item.first is top and item.difference is not None]
        for item in matched:
            shown = scores.signed(item.difference or 0.0, 1, item.sentence.source, f"against {item.second.name}")
            found.append(("Points against the primary alone", shown))
    found.append(_saving(records))
    gather = records.gather
    if gather is None:
        found.append(("Test chips", missing("the gather cell has no record")))
    else:
        found.append(("Test chips", measured(gather, "splits.test.chips")))
        found.append(("Test instances", measured(gather, "splits.test.instances")))
    return tuple(found)


def _saving(records: RunRecords) -> tuple[str, Entry]:
    """Pretrained over full for the largest set, on a GPU where one was measured."""
    label = "Peak memory, pretrained over full"
    for group in memory.groups(records)[0]:
        pairs = [(row, memory.ratio(group, row)) for row in group.rows]
        measured_pairs = [(row, entry) for row, entry in pairs if entry.kind == "number" and row.arm == "pretrained"]
        if measured_pairs:
            row, entry = measured_pairs[-1]
            return label, dataclasses.replace(entry, note=f"{modality_set(row.modalities)}; {group.label}")
    return label, missing("no pair has been measured")


def _parts(records: RunRecords, cell: Cell, rows: tuple[scores.Scored, ...], config_text: str) -> list[Part]:
    absent = runs.absent_cells_table(records)
    parts = [_data(records, cell), _results(records, rows), _memory(records), _training(records), _gallery(rows)]
    if absent:
        parts.append(Part("absent", "Cells without a result", tables=(quiet(absent),)))
    parts.append(
        Part(
            "provenance",
            "Provenance",
            tables=(runs.environment_table(records, cell),),
            folded=(runs.cells_table(records),),
            preformatted=(("The run’s config.yaml", config_text),) if config_text else (),
        )
    )
    return parts


def _data(records: RunRecords, cell: Cell) -> Part:
    gather = records.gather
    config = (gather.cell if gather else cell).config.data
    paragraphs: list[Entry] = [words(f"Data set {config.name}; classes: {', '.join(config.classes)}.")]
    if gather is None:
        found = records.of("gather")
        why = found[0].reason if found else "no gather cell in this run"
        paragraphs.append(missing(f"chips and instances: {why}"))
    else:
        leakage = gather.get("allow_leakage")
        paragraphs.append(
            words(data.split_sentence(config.split, leakage is True), source=f"{gather.source}#results.allow_leakage")
        )
    reasons = data.reason_counts(records)
    if reasons:
        text = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        paragraphs.append(words(f"Refused scenes by reason: {text}.", source=data.REJECTED))
    elif records.rejected is not None:
        paragraphs.append(words("No scene was refused.", source=data.REJECTED))
    tables = (data.count_table(records), data.site_table(records), data.modality_table(records, config))
    folded = (data.rejected_table(records), data.warned_table(records))
    return Part(
        "data",
        "Data",
        tuple(paragraphs),
        tuple(table for table in tables if table),
        folded=tuple(table for table in folded if table),
    )


def _results(records: RunRecords, rows: tuple[scores.Scored, ...]) -> Part:
    paragraphs = [item.sentence for item in (*scores.against_primary(rows), *scores.against_full(rows))]
    seed = runs.seed_sentence(records)
    if seed:
        paragraphs.append(words(seed))
    if not rows:
        paragraphs.append(missing("no evaluate cell in this run"))
    tables = [scores.results_table(records, rows)] if rows else []
    sites = scores.sites_table(rows)
    chart = figures.ap50_bars(rows)
    return Part(
        "results",
        "Accuracy",
        tuple(paragraphs),
        tuple(quiet(table) for table in (*tables, *([sites] if sites else []))),
        (chart,) if chart else (),
        (scores.absent_table(rows),),
    )


def _memory(records: RunRecords) -> Part:
    made, absent = memory.groups(records)
    paragraphs = list(memory.sentences(made))
    if not made:
        why = absent[0].result.reason if absent else "no measure cell in this run"
        paragraphs.append(missing(f"memory: {why}"))
    paragraphs += [missing(f"{row.name}: {row.result.reason or 'unknown backend'}") for row in absent if made]
    if len({group.backend for group in made}) > 1:
        paragraphs.append(
            words("Figures of a CUDA allocator and of a CPU are different things and stand in tables of their own.")
        )
    charts = [figures.memory_bars(group, i) for i, group in enumerate(made)]
    return Part(
        "memory",
        "Memory",
        tuple(paragraphs),
        tuple(
            quiet(make(group, i)) for i, group in enumerate(made) for make in (memory.memory_table, memory.device_table)
        ),
        (*charts, figures.paper_memory_bars()),
    )


def _training(records: RunRecords) -> Part:
    if not records.of("pretrain", "finetune"):
        return Part("training", "Training", (missing("no training cell in this run"),))
    charts = figures.curves(records)
    paragraphs = () if charts else (missing("training curves: no metrics.jsonl holds a row"),)
    return Part("training", "Training", paragraphs, (quiet(runs.training_table(records)),), charts)


def _gallery(rows: tuple[scores.Scored, ...]) -> Part:
    # Fused cells first, the best on top: what a reader opens the gallery for.
    ordered = sorted(rows, key=lambda row: (not row.fused, -(row.value if row.value is not None else -1.0)))
    found = embed([row.result for row in ordered], EMBED_LIMIT_BYTES)
    shown = tuple(_pictures(row.name, row.result, found) for row in ordered)
    text = "Ground truth red, predictions blue, on test chips; numbers in brackets count the outlined instances."
    paragraphs = (
        (words(text),) if any(item.pictures for item in shown) else (missing("no evaluation has drawn a picture"),)
    )
    return Part("gallery", "Gallery", paragraphs, gallery=shown)


def _pictures(name: str, result: CellResult, found: Mapping[str, tuple[Embedded, ...]]) -> Pictures:
    pictures = found.get(result.cell.id, ())
    return Pictures(name, pictures, "" if pictures else result.reason or "the record lists no picture")


def quiet(table: Table) -> Table:
    """Say each reason once a row: a cell without a record would repeat it in every column."""
    rows: list[tuple[Entry, ...]] = []
    for row in table.rows:
        seen: set[str] = set()
        line: list[Entry] = []
        for entry in row:
            repeated = entry.kind == "missing" and entry.note in seen
            line.append(dataclasses.replace(entry, note="") if repeated else entry)
            if entry.kind == "missing":
                seen.add(entry.note)
        rows.append(tuple(line))
    return dataclasses.replace(table, rows=tuple(rows))
