"""What the data are: scenes taken and refused with reasons, chips and instances per split and site, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rtshpc.core.config import DataConfig, SplitConfig
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import Entry, Table, code, measured, missing, modality_name, number, words

SPLITS = ("train", "val", "test")
INDEX = "shards/index.json"
REJECTED = "shards/rejected.json"


def split_sentence(split: SplitConfig, allow_leakage: bool) -> str:
    """The split rule and whether chips of one scene may be on both sides, in words."""
    rules = {
        "column": "Scenes are split by a column of the index.",
        "site": f"Whole sites are held out (test: {', '.join(split.test_sites)}).",
        "stratified": "Scenes are split inside every site.",
    }
    if allow_leakage:
        kept = "Leakage is allowed, the paper's own rule: chips of one scene may train and be scored."
    else:
        kept = "Chips of one scene, and scenes that overlap on the ground, stay in one split."
    return f"{rules[split.rule]} {kept}"


def count_table(records: RunRecords) -> Table | None:
    """Scenes, chips and instances per split, from the gather record."""
    gather = records.gather
    if gather is None:
        return None
    splits = gather.get("splits") or {}
    body = [
        (words(name), *(measured(gather, f"splits.{name}.{key}") for key in ("scenes", "chips", "instances")))
        for name in (*SPLITS, *sorted(set(splits) - set(SPLITS)))
    ]
    total = (measured(gather, "scenes.accepted"), measured(gather, "chips"), measured(gather, "instances"))
    body.append((words("all"), *total))
    notes = tuple(filter(None, (_balance(gather),)))
    return Table(
        "splits",
        "Scenes, chips and instances per split.",
        ("Split", "Scenes", "Chips", "Instances"),
        tuple(body),
        notes,
    )


def _balance(gather: CellResult) -> str:
    """Accepted + rejected = input, or a plain statement that it is not so."""
    total, accepted, rejected = (gather.get(f"scenes.{key}") for key in ("total", "accepted", "rejected"))
    if total is None or accepted is None or rejected is None:
        return "The gather record does not say how many scenes were accepted and rejected."
    verdict = "" if accepted + rejected == total else " These do not add up."
    return f"Scenes: {accepted} accepted + {rejected} rejected of {total} given.{verdict}"


def site_table(records: RunRecords) -> Table | None:
    """Chips and instances per site and split, counted from the index, with the totals of the gather record."""
    gather = records.gather
    if gather is None:
        return None
    sites = sorted(gather.get("sites") or {})
    counts = _crossed(records.index)
    body: list[tuple[Entry, ...]] = []
    for site in sites:
        crossed = [
            number(counts[site, split][what], f"{INDEX}#chips") if counts is not None else missing(f"no {INDEX}")
            for what in ("chips", "instances")
            for split in SPLITS
        ]
        scenes = _of_site(gather, site, "scenes")
        body.append(
            (
                words(site),
                scenes,
                *crossed[:3],
                _of_site(gather, site, "chips"),
                *crossed[3:],
                _of_site(gather, site, "instances"),
            )
        )
    columns = (
        "Site",
        "Scenes",
        *(f"Chips {split}" for split in SPLITS),
        "Chips",
        *(f"Instances {split}" for split in SPLITS),
        "Instances",
    )
    caption = "Chips and instances per site and split; an instance cut by two chips counts in both."
    return Table("data_sites", caption, columns, tuple(body), tuple(filter(None, (_disagreement(records),))))


def _of_site(gather: CellResult, site: str, key: str) -> Entry:
    values = (gather.get("sites") or {}).get(site)
    value = values.get(key) if isinstance(values, Mapping) else None
    return number(value, f"{gather.source}#results.sites.{site}.{key}")


def _crossed(index: Mapping[str, Any] | None) -> dict[tuple[str, str], Counter[str]] | None:
    """(site, split) -> chips and instances."""
    if index is None or not isinstance(index.get("chips"), list):
        return None
    counts: dict[tuple[str, str], Counter[str]] = _Counts()
    for chip in index["chips"]:
        counts[str(chip.get("site")), str(chip.get("split"))].update(
            {"chips": 1, "instances": int(chip.get("instances") or 0)}
        )
    return counts


class _Counts(dict[tuple[str, str], "Counter[str]"]):
    def __missing__(self, key: tuple[str, str]) -> Counter[str]:
        self[key] = Counter()
        return self[key]


def _disagreement(records: RunRecords) -> str:
    """A warning where the index on disk is not the one that the gather record was made with."""
    gather, index = records.gather, records.index
    if gather is None or index is None or not isinstance(index.get("chips"), list):
        return ""
    chips, recorded = len(index["chips"]), gather.get("chips")
    if chips == recorded:
        return ""
    return f"{INDEX} lists {chips} chips, the gather record {recorded}: they are not of the same gathering."


def rejected_rows(records: RunRecords) -> tuple[tuple[Mapping[str, Any], str], ...]:
    """(row, source) of every rejected scene: rejected.json, else the preprocess records."""
    if records.rejected is not None:
        return tuple((row, f"{REJECTED}#{i}") for i, row in enumerate(records.rejected) if isinstance(row, Mapping))
    return tuple(
        (row, f"{result.source}#results.rejected")
        for result in records.of("preprocess")
        for row in result.get("rejected") or []
        if isinstance(row, Mapping)
    )


def rejected_table(records: RunRecords) -> Table | None:
    """Every rejected scene by name and reason; None where none was rejected."""
    rows = rejected_rows(records)
    if not rows:
        return None
    body = tuple(
        (
            words(row.get("scene"), source=source),
            words(row.get("reason"), source=source),
            words(row.get("detail"), source=source),
        )
        for row, source in rows
    )
    return Table("rejected", "Scenes that were refused, by name and reason.", ("Scene", "Reason", "Detail"), body)


def warned_table(records: RunRecords) -> Table | None:
    """Scenes used with a warning, from the preprocess records; None where there is none."""
    body = tuple(
        (words(row.get("scene"), source=source), words("; ".join(map(str, row.get("warnings") or [])), source=source))
        for result in records.of("preprocess")
        for row in result.get("warned") or []
        if isinstance(row, Mapping)
        for source in [f"{result.source}#results.warned"]
    )
    if not body:
        return None
    return Table(
        "warned",
        "Scenes that were used with a warning.",
        ("Scene", "Warnings"),
        tuple(sorted(body, key=lambda row: row[0].text)),
    )


def reason_counts(records: RunRecords) -> tuple[tuple[str, int], ...]:
    """(reason, scenes) of the rejections, most frequent first."""
    counts = Counter(str(row.get("reason")) for row, _ in rejected_rows(records))
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def modality_table(records: RunRecords, data: DataConfig) -> Table:
    """Definition of each modality and its statistics over valid pixels, one line a channel."""
    found: Mapping[str, Any] = (records.index or {}).get("modalities") or {}
    body: list[tuple[Entry, ...]] = []
    for name, config in data.modalities.items():
        values = found.get(name)
        definition = code(config.expression or ", ".join(config.bands))
        own = words(config.file or "the image")
        if not isinstance(values, Mapping):
            absent = missing(f"not in {INDEX}" if records.index else f"no {INDEX}")
            body.append((words(modality_name(name)), definition, own, *([absent] * 4)))
            continue
        source = f"{INDEX}#modalities.{name}"
        channels = [_channels(values, key, source) for key in ("mean", "std", "min", "max")]
        for i in range(max(len(column) for column in channels)):
            head = (words(modality_name(name)), definition, own) if i == 0 else (words(""), words(""), words(""))
            body.append((*head, *(column[i] if i < len(column) else missing("") for column in channels)))
    caption = f"Modalities (primary: {modality_name(data.primary)}) with statistics of the stored values of valid pixels, one line a band."
    return Table(
        "modalities", caption, ("Modality", "Bands or expression", "Raster", "Mean", "SD", "Min", "Max"), tuple(body)
    )


def _channels(values: Mapping[str, Any], key: str, source: str) -> list[Entry]:
    found = values.get(key)
    each = found if isinstance(found, list) else [found]
    return [_statistic(value, f"{source}.{key}") for value in each]


def _statistic(value: Any, source: str) -> Entry:
    """Four significant figures: the unit may be anything from reflectance to metres."""
    plain = number(value, source)
    return (
        plain
        if plain.value is None
        else Entry(f"{plain.value:.4g}".replace("-", "−"), "number", source, value=plain.value)
    )
