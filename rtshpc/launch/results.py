"""Figures of a run's records for the terminal; a figure that no record holds is a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.table import Table

from rtshpc.core.cell import Cell
from rtshpc.core.grid import finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record

MIB = 1 << 20


def headline(record: Record) -> str:
    """The main figure of a record, in a few words."""
    results = record.results
    if record.stage == "preprocess":
        accepted = sum(int(shard.get("chips", 0)) for shard in results.get("shards", []))
        return f"{accepted} chips, {len(results.get('rejected', []))} scenes rejected"
    if record.stage == "gather":
        return f"{results.get('chips')} chips, {results.get('instances')} instances"
    if record.stage in ("pretrain", "finetune"):
        return f"validation AP50 {number(results.get('best_ap50'))}"
    if record.stage == "features":
        return f"{number(results.get('bytes'), MIB)} MiB of scales"
    if record.stage == "evaluate":
        return f"mask AP50 {number(_deep(results, 'mask', 'AP50'))}"
    if record.stage == "measure":
        return f"{number(results.get('sum_bytes'), MIB)} MiB"
    return ""


def tables(cells: Sequence[Cell], paths: RunPaths) -> list[Table]:
    """AP50 of every scored cell and peak memory of every measured one; only tables with rows."""
    records = [record for cell in cells if (record := finished(cell, paths)) is not None]
    scores = [record.results for record in records if record.stage == "evaluate"]
    peaks = [record for record in records if record.stage == "measure"]
    return [
        table for table in (_scores(scores) if scores else None, _memory(peaks) if peaks else None) if table is not None
    ]


def _scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="AP50 on the test split, %", title_justify="left")
    table.add_column("detector")
    for name in ("mask AP50", "box AP50", "mask AP", "images", "instances"):
        table.add_column(name, justify="right")
    for row in rows:
        leaky = " (leaky split)" if row.get("allow_leakage") else ""
        table.add_row(
            f"{row.get('trained_label')}{leaky}",
            number(_deep(row, "mask", "AP50")),
            number(_deep(row, "box", "AP50")),
            number(_deep(row, "mask", "AP")),
            str(row.get("images", "-")),
            str(row.get("instances", "-")),
        )
    return table


def _memory(records: Sequence[Record]) -> Table:
    table = Table(title="Memory of one sample, forward and backward, MiB", title_justify="left")
    table.add_column("detector")
    names = ("parameters", "gradients", "activations", "sum", "peak", "of")
    for name in names:
        table.add_column(name, justify="right")
    for record in records:
        row = record.results
        on_gpu = row.get("allocator_peak_bytes") is not None
        peak = row.get("allocator_peak_bytes" if on_gpu else "rss_peak_bytes")
        figures = [row.get(f"{name}_bytes") for name in names[:4]]
        source = "CUDA allocator" if on_gpu else "process (RSS)"
        table.add_row(record.label.removeprefix("measure "), *(number(one, MIB) for one in (*figures, peak)), source)
    return table


def number(value: Any, unit: float = 1) -> str:
    """One decimal, or a dash for what is not defined."""
    return f"{value / unit:.1f}" if isinstance(value, int | float) else "-"


def _deep(values: Mapping[str, Any], *keys: str) -> Any:
    found: Any = values
    for key in keys:
        found = cast(dict[str, Any], found).get(key) if isinstance(found, dict) else None
    return found
