"""Merges what the preprocess tasks wrote: split, statistics of the train split, index.json and rejected.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.config import DataConfig
from rtshpc.core.errors import DataError, RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, read_record, write_json
from rtshpc.data.normalise import Statistics, merge
from rtshpc.data.reader import SPLITS
from rtshpc.data.shard import statistics_in
from rtshpc.data.split import Footprint, split_chips

Row = dict[str, Any]


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write `shards/rejected.json` and `shards/index.json`.

    Returns:
        `chips`, `instances`, `splits`, `scenes`, `sites`, `modalities`, `allow_leakage`, `moved`, `bytes`.

    Raises:
        RunError: a preprocess cell has no record, or a shard it names is not there.
        DataError: no scene was accepted, or no chip is left to train on.
    """
    data = cell.config.data
    parts = _parts(cell, paths)
    merged: dict[str, list[Row]] = {
        key: [row for part in parts for row in part[key]]
        for key in ("shards", "chips", "accepted", "rejected", "warned")
    }
    total = sum(part["scenes"] for part in parts)
    if len(merged["accepted"]) + len(merged["rejected"]) != total:
        raise RunError(
            f"{paths.shards}: accepted and rejected scenes are not the {total} of the input; retry preprocess"
        )
    rejected = sorted(merged["rejected"], key=lambda row: row["scene"])
    write_json(paths.rejected, rejected)
    if not merged["chips"]:
        raise DataError(f"{data.name}: no chip is left of {total} scenes{_why(rejected)}; see {paths.rejected}")
    _check_shards(paths, merged["shards"])
    chips = sorted(merged["chips"], key=lambda row: row["id"])
    scenes = sorted(merged["accepted"], key=lambda row: row["scene"])
    splits = split_chips(chips, [_footprint(row) for row in scenes], data.split)
    chips = [{**chip, "split": split} for chip, split in zip(chips, splits, strict=True)]
    if "train" not in splits:
        raise DataError(f"{data.name}: split.rule = {data.split.rule} leaves no chip to train on of {len(chips)}")
    progress("statistics", 0, 1)
    counts = {"accepted": len(scenes), "rejected": len(rejected), "warned": len(merged["warned"])}
    index = {
        "data": data.name,
        "classes": list(data.classes),
        "modalities": _modalities(data, parts, paths, chips),
        "chips": chips,
        "shards": {shard["file"]: shard["sha256"] for shard in merged["shards"]},
        "scenes": counts,
        "split": {"rule": data.split.rule, "allow_leakage": data.split.allow_leakage},
    }
    write_json(paths.index, index)
    progress("statistics", 1, 1)
    return {
        "chips": len(chips),
        "instances": sum(chip["instances"] for chip in chips),
        "splits": {split: _summary(chip for chip in chips if chip["split"] == split) for split in SPLITS},
        "scenes": {"total": total, **counts},
        "sites": {site: _summary(c for c in chips if c["site"] == site) for site in sorted({c["site"] for c in chips})},
        "modalities": list(data.modalities),
        "allow_leakage": data.split.allow_leakage,
        "moved": _moved(scenes, chips, data),
        "bytes": sum(shard["bytes"] for shard in merged["shards"]),
    }


def _parts(cell: Cell, paths: RunPaths) -> list[Row]:
    """Results of the preprocess cells, in the order of their tasks."""
    parts: list[Row] = []
    for need in cell.needs:
        record = read_record(paths.cell(need).record)
        if record is None:
            raise RunError(f"gather needs the preprocess cell {need}, which has no record; retry the run")
        parts.append(record.results)
    return parts


def _why(rejected: list[Row]) -> str:
    """The commonest reasons, for a user whose scenes were all rejected."""
    reasons = Counter(row["reason"] for row in rejected).most_common(3)
    return " (" + ", ".join(f"{reason}: {count}" for reason, count in reasons) + ")" if reasons else ""


def _check_shards(paths: RunPaths, shards: list[Row]) -> None:
    for shard in shards:
        path = paths.shards / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise RunError(f"{path}: not the {shard['bytes']} bytes that preprocess wrote; remove its record and retry")


def _footprint(row: Row) -> Footprint:
    corners = tuple((float(x), float(y)) for x, y in row["corners"])
    return Footprint(row["scene"], row["site"], row["split"], row["group"], row["crs_wkt"], corners)


def _modalities(data: DataConfig, parts: list[Row], paths: RunPaths, chips: list[Row]) -> dict[str, Row]:
    """Each modality's type, scaling and statistics over the valid pixels of the train split.

    Mean, std, min and max are in the modality's unit; `pixels` counts one channel.
    """
    rows: dict[str, list[int]] = {}
    for chip in chips:
        if chip["split"] == "train":
            rows.setdefault(chip["shard"], []).append(chip["row"])
    tables: dict[str, list[Statistics]] = {name: [] for name in data.modalities}
    for shard in sorted(rows):
        for name, statistics in statistics_in(paths.shards / shard, rows[shard]).items():
            tables[name].extend(statistics)
    result: dict[str, Row] = {}
    for name, modality in data.modalities.items():
        known = next((part["modalities"][name] for part in parts if name in part["modalities"]), None)
        total = merge(tables[name], modality.channels)
        if known is None or not total.count.any():
            raise DataError(f"{data.name}: modality {name} has no valid pixel in the train split")
        facts = total.to_json()
        result[name] = {
            **known,
            "mean": facts["mean"],
            "std": [float(value) for value in total.std],
            "min": facts["min"],
            "max": facts["max"],
            "pixels": facts["count"][0],
            "unit": modality.unit,
        }
    return result


def _summary(chips: Iterable[Row]) -> dict[str, int]:
    rows = list(chips)
    return {
        "scenes": len({row["scene"] for row in rows}),
        "chips": len(rows),
        "instances": sum(row["instances"] for row in rows),
    }


def _moved(scenes: list[Row], chips: list[Row], data: DataConfig) -> list[Row]:
    """Scenes that rule `column` or `site` put elsewhere because they overlap scenes of another split."""
    if data.split.rule == "stratified":
        return []
    now = {chip["scene"]: chip["split"] for chip in chips}

    def wanted(row: Row) -> str:
        if data.split.rule == "column":
            return str(row["split"])
        return "test" if row["site"] in data.split.test_sites else "val" if row["site"] in data.split.val_sites else ""

    def odd(row: Row) -> bool:
        want = wanted(row)
        # Train sites give scenes to val by draw; only a move into test is a move there.
        return row["scene"] in now and (now[row["scene"]] != want if want else now[row["scene"]] == "test")

    return [
        {"scene": row["scene"], "from": wanted(row) or "train", "to": now[row["scene"]]} for row in scenes if odd(row)
    ]
