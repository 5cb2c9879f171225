"""T5: how fast data are read while training, and what is stored for how long."""

from __future__ import annotations

from collections.abc import Iterable

from rtshpc.core.sizing.request import LIFETIMES
from rtshpc.report.allocation.evidence import Evidence, Run
from rtshpc.report.collect import CellResult
from rtshpc.report.entries import Entry, Table, measured, missing, modality_set, number, places_for, sources, words

GB = 1e9


def storage_table(evidence: Evidence) -> Table:
    """One row a kind of file and run; what the request names on top; the sums by lifetime."""
    body: list[tuple[Entry, ...]] = []
    for run in evidence.runs:
        body += _of_run(run)
    for number_of, item in enumerate(evidence.request.storage):
        source = f"request.yaml#storage.{number_of}.gb"
        amount = _size(item.gb * GB, source, note="as the request says")
        body.append((words(item.name), words("–"), words(LIFETIMES[item.lifetime]), words("–"), amount))
    for lifetime in LIFETIMES.values():
        amounts = [row[4] for row in body if row[2].text == lifetime and row[4].value is not None]
        if amounts:
            total = _size(sum(amount.value or 0.0 for amount in amounts), sources(*amounts))
            body.append((words("Sum"), words(""), words(lifetime), words(""), total))
    columns = ("What", "Run", "Wanted", "Cells", "Size, GB")
    notes = ("GB are 1e9 bytes. Sizes are those of the runs as they are; the request's own files are a person's word.",)
    return evidence.traced(Table("T5", "Storage by lifetime.", columns, tuple(body), notes))


def _size(value: float, source: str, note: str = "") -> Entry:
    """Bytes in GB: of a small one as many decimals as show it."""
    return number(value, source, max(2, places_for(value / GB, 3)), GB, note=note)


def _of_run(run: Run) -> list[tuple[Entry, ...]]:
    """What the records of a run tell that it has written."""
    records = run.records
    checkpoints = [result for result in records.of("pretrain", "finetune") if result.record]
    kinds = (
        ("shards (chips of all scenes)", "project", [records.gather] if records.gather else [], "bytes"),
        ("features (scales of frozen backbones)", "stage", _done(records.of("features")), "bytes"),
        ("checkpoints (best of each training)", "project", checkpoints, "checkpoint_bytes"),
        ("blocks of map scenes", "stage", _done(records.of("map")), "files"),
        ("merged scenes", "project", _done(records.of("merge")), "files"),
        ("layers of the map", "archive", _done(records.of("publish")), "files"),
    )
    return [_row(run, name, lifetime, found, key) for name, lifetime, found, key in kinds if found]


def _done(results: Iterable[CellResult]) -> list[CellResult]:
    return [result for result in results if result.record]


def _row(run: Run, name: str, lifetime: str, found: list[CellResult], key: str) -> tuple[Entry, ...]:
    sizes = [_bytes(result, key) for result in found]
    where = " | ".join(result.source for result in found)
    source = " | ".join(f"{result.source}#results.{key}" for result in found)
    known = [size for size in sizes if size is not None]
    amount = _size(sum(known), source) if known else missing("its records tell no size", source)
    return words(name), words(run.name), words(LIFETIMES[lifetime]), number(len(found), where), amount


def _bytes(result: CellResult, key: str) -> float | None:
    value = result.get(key)
    if isinstance(value, list):
        sizes = [row.get("bytes") for row in value if isinstance(row, dict)]
        return float(sum(size for size in sizes if isinstance(size, int | float)))
    return float(value) if isinstance(value, int | float) else None


def reading_table(evidence: Evidence) -> Table | None:
    """What each training reads per second; None without a training."""
    body: list[tuple[Entry, ...]] = []
    for run in evidence.runs:
        gather = run.records.gather
        for result in _done(run.records.of("pretrain", "finetune")):
            live = result.get("features") != "cached"
            body.append(
                (
                    words(modality_set(result.cell.modalities), note=result.cell.arm),
                    words("shards" if live else "stored scales"),
                    measured(result, "samples_per_second", 2),
                    *_rate(run, result, gather if live else None),
                    words(f"{result.get('device')}, {result.get('precision')}", source=result.source),
                )
            )
    if not body:
        return None
    columns = ("Training", "Reads", "Samples/s", "A sample, MB", "MB/s", "Device")
    notes = ("A sample: bytes of the files over the chips in them, as stored (compressed).",)
    return evidence.traced(Table("T5_reading", "Reading while training.", columns, tuple(body), notes))


def _rate(run: Run, result: CellResult, gather: CellResult | None) -> tuple[Entry, Entry]:
    speed = result.get("samples_per_second")
    read = [gather] if gather else [run.records.by_id.get(name) for name in result.cell.features.values()]
    sizes = [_of_sample(one) for one in read if one is not None]
    if not sizes or None in sizes or not isinstance(speed, int | float):
        absent = missing("the records do not tell the size of a sample")
        return absent, absent
    source = " | ".join(f"{one.source}#results.bytes" for one in read if one is not None)
    size = sum(one or 0.0 for one in sizes)
    return number(size, source, 3, 1e6), number(
        size * speed, f"{source} | {result.source}#results.samples_per_second", 2, 1e6
    )


def _of_sample(result: CellResult) -> float | None:
    """Bytes of one chip in the files of a gather or features cell."""
    total, chips = result.get("bytes"), result.get("chips")
    if isinstance(chips, dict):  # of features: by split, and each once a variant
        variants = result.get("variants") or {}
        chips = sum(count * len(variants.get(split, [1])) for split, count in chips.items())
    if not isinstance(total, int | float) or not isinstance(chips, int | float) or not chips:
        return None
    return total / chips


def gaps(evidence: Evidence) -> list[str]:
    """Why T5 is incomplete."""
    if any(run.records.gather for run in evidence.runs):
        return []
    return ["T5: no run that is given has a gather record, so the size of the shards is not known."]
