"""How the run went: trainings, cells without a result, and what everything was made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.report import paper
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import Entry, Table, code, duration, measured, modality_set, printed, words
from rtshpc.report.tables.scores import Scored, scored

_MILLION = 1e6


def training_name(result: CellResult) -> str:
    """The training in the words of the AP50 table, e.g. `RGB+NDVI fused · residual cross, pretrained`."""
    cell = result.cell
    fused = len(cell.modalities) > 1
    fusion = cell.config.model.fusion
    row = Scored(
        result, None, cell.modalities, fusion.mixer if fused else None, fusion.residual if fused else None, cell.arm, ""
    )
    return row.name


def training_table(records: RunRecords) -> Table:
    """One line a training: epochs, best validation, parameters, speed, device."""
    body: list[tuple[Entry, ...]] = []
    for result in records.of("pretrain", "finetune"):
        total, trainable = paper.PARAMETERS_M.get((len(result.cell.modalities), result.cell.arm), (None, None))
        body.append(
            (
                words(training_name(result)),
                measured(result, "epochs"),
                measured(result, "steps"),
                measured(result, "best_epoch"),
                measured(result, "best_ap50", 2),
                measured(result, "final_loss", 3),
                measured(result, "parameters.total", 2, _MILLION),
                measured(result, "parameters.trainable", 2, _MILLION),
                printed(total, 0, f"{trainable} trainable" if trainable else ""),
                measured(result, "seconds_per_step", 3),
                measured(result, "samples_per_second", 1),
                _setting(result),
                measured(result, "resumed"),
            )
        )
    return Table(
        "training",
        "Trainings. Parameters in millions; the paper's are of MViTv2-B detectors.",
        (
            "Training",
            "Epochs",
            "Steps",
            "Best epoch",
            "Best val AP50",
            "Final loss",
            "Parameters, M",
            "Trainable, M",
            "Parameters, paper, M",
            "Step, s",
            "Samples/s",
            "Device",
            "Resumed",
        ),
        tuple(body),
    )


def _setting(result: CellResult) -> Entry:
    stored = "stored scales" if result.get("features") == "cached" else None
    parts = (result.get("device"), result.get("precision"), stored)
    return words(", ".join(str(part) for part in parts if part) or "–", source=result.source)


def seed_sentence(records: RunRecords) -> str:
    """A warning where each setting was trained once, so that no spread is known."""
    trained = [result for result in records.of("pretrain", "finetune") if result.record]
    seeds = {result.cell.config.seed for result in trained}
    if not trained or len(seeds) > 1:
        return ""
    return (
        f"Each figure is one training with one seed ({seeds.pop()}); the spread between seeds was not measured, "
        "so small differences may be chance."
    )


def absent_cells_table(records: RunRecords) -> Table | None:
    """Cells without a record and why; None where every cell has one."""
    body = [
        (
            words(result.cell.stage),
            words(result.cell.label),
            code(result.cell.id),
            words("failed" if result.failed else "missing"),
            words(result.reason.removeprefix("failed: ")),
        )
        for result in records.cells
        if result.record is None
    ]
    body += [(words("?"), words(""), code(name), words("unreadable"), words(why)) for name, why in records.unreadable]
    if not body:
        return None
    caption = "Cells without a result; nothing of theirs is in the tables."
    return Table("cells_without_result", caption, ("Stage", "Cell", "Id", "State", "Reason"), tuple(body))


def cells_table(records: RunRecords) -> Table:
    """Every finished cell: when, how long, in how many attempts."""
    body = tuple(
        (
            words(result.cell.stage),
            words(result.cell.label),
            code(result.cell.id, result.source),
            words(_date(result.record.started), source=f"{result.source}#started"),
            Entry(duration(result.record.seconds), "number", f"{result.source}#seconds", value=result.record.seconds),
            Entry(str(result.record.attempts), "number", f"{result.source}#attempts", value=result.record.attempts),
        )
        for result in records.cells
        if result.record is not None
    )
    return Table(
        "cells",
        "Finished cells. Each one's config and record lie in cells/<id>/.",
        ("Stage", "Cell", "Id", "Started, UTC", "Time", "Attempts"),
        body,
    )


def _date(text: str) -> str:
    return text[:19].replace("T", " ")


def last_started(records: RunRecords) -> str:
    """When the last cell of these records was started; empty where there is no record."""
    return _date(max((result.record.started for result in records.cells if result.record), default=""))


def environment_table(records: RunRecords, cell: Cell) -> Table:
    """Commit, data, hardware and versions; where records differ, each value with its number of cells."""
    done = records.done
    fingerprints = Counter(result.cell.data_fingerprint for result in done if result.cell.data_fingerprint)
    body: list[tuple[Entry, ...]] = [
        (words("run"), words(cell.config.name)),
        (
            words("data set"),
            words(", ".join(sorted({result.cell.config.data.name for result in done})) or cell.config.data.name),
        ),
        (
            words("model"),
            words(", ".join(sorted({result.cell.config.model.name for result in done})) or cell.config.model.name),
        ),
        (words("data fingerprint"), _distinct(fingerprints, len(done))),
    ]
    seen: dict[str, Counter[str]] = {}
    for result in done:
        assert result.record is not None
        for key, value in _flat(result.record.environment):
            seen.setdefault(key, Counter())[value] += 1
    for key in sorted(seen, key=_rank):
        body.append((words(key), _distinct(seen[key], len(done))))
    if not seen:
        body.append((words("environment"), Entry("not recorded", "missing")))
    caption = "From the records' own environment; a number in brackets is the count of cells."
    return Table("provenance", caption, ("What", "Value"), tuple(body))


_FIRST = ("commit", "dirty", "version", "image", "host", "cpu", "cores", "gpu", "python")


def _rank(key: str) -> tuple[int, str]:
    head = key.split(".")[0]
    return (_FIRST.index(head) if head in _FIRST else len(_FIRST), key)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key in sorted(value, key=str):
        item, name = value[key], f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}.")
        elif isinstance(item, list):
            yield name, ", ".join(map(str, item)) or "none"
        else:
            yield name, "none" if item is None or item == "" else str(item)


def _distinct(counts: Counter[str], cells: int) -> Entry:
    if not counts:
        return Entry("not recorded", "missing")
    if len(counts) > 1 and "none" in counts:
        # A stage that never loads torch records no version of it; that says nothing about the others.
        counts = Counter({value: count for value, count in counts.items() if value != "none"})
        cells = sum(counts.values())
    if len(counts) == 1 and sum(counts.values()) == cells:
        return code(next(iter(counts)))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return code("; ".join(f"{value} ({count})" for value, count in ordered))


def state_counts(records: RunRecords) -> dict[str, int]:
    """Cells that are done, failed and missing."""
    done = len(records.done)
    failed = sum(result.failed for result in records.cells)
    return {"done": done, "failed": failed, "missing": len(records.cells) - done - failed + len(records.unreadable)}


def setting_sentence(records: RunRecords, cell: Cell) -> str:
    """What was trained on what, in a sentence, so that nobody takes the figures for more than they are."""
    trained = [row for row in scored(records) if row.value is not None]
    if not trained:
        return "No trained cell has been scored."
    models = sorted({row.config.model.name for row in trained})
    names = sorted({row.config.data.name for row in trained})
    generated = any(row.config.data.scenes.generated for row in trained)
    found = {row.trained.get("epochs") for row in trained if row.trained}
    epochs = sorted(int(value) for value in found if value)
    text = f"Model “{', '.join(models)}” on data set “{', '.join(names)}”"
    text += " (generated scenes: they show that the pipeline works, not how well slumps are found)" if generated else ""
    if epochs:
        span = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
        text += f", {span} epochs"
    return f"{text}; modalities {modality_set(cell.config.data.modalities)}."
