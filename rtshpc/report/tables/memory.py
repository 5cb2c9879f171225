"""Peak memory of one sample, model, forward and backward: the paper's Table 2 beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rtshpc.core.sizing.measured import Measurement, Protocol
from rtshpc.report import paper
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import MIB, Entry, Table, measured, missing, modality_set, printed, signed, sources, words

BACKENDS = {
    "cuda": (
        "CUDA allocator",
        "alloc_peak_fb",
        "the most that the CUDA allocator had handed out in forward and backward",
    ),
    "cpu": (
        "CPU tensors alive",
        "live_peak_fb",
        "the most bytes of tensors alive at once in forward and backward, counted on a CPU; not what a GPU's allocator shows",
    ),
}
"""backend -> (label, the key that is its peak, what that is)."""

FROZEN = {"pretrained": "pretrained backbones", "cached": "stored scales"}
"""Arms that are held against full training -> what they train on."""

PARTS = (("params", "Parameters"), ("grads", "Gradients"), ("activations", "Activations"))

DEVICE = (
    ("alloc_peak_step", "Peak with optimizer, MiB", 1, MIB),
    ("optim_state", "Optimizer's state, MiB", 1, MIB),
    ("reserved_peak", "Reserved by the allocator, MiB", 1, MIB),
    ("device_used_peak_v2", "Used of the device (NVML v2), MiB", 1, MIB),
    ("device_baseline", "Used before (NVML v2), MiB", 1, MIB),
    ("driver_reserved", "Driver's own (NVML v2), MiB", 1, MIB),
    ("process_peak", "Of the process (NVML), MiB", 1, MIB),
    ("rss_peak", "RSS peak, MiB", 1, MIB),
    ("step_seconds", "Step, s", 3, 1.0),
    ("samples_per_second", "Samples/s", 2, 1.0),
    ("data_wait_share", "Waiting for data", 3, 1.0),
    ("gpu_utilisation", "GPU utilisation", 2, 1.0),
    ("energy_joules", "Energy of the steps, J", 1, 1.0),
    ("cpu_seconds", "Processor time of the steps, s", 2, 1.0),
)
"""Figures of whole steps, with the optimizer, and of the device: key, column, decimals, unit."""


@dataclass(frozen=True)
class Measured:
    """One measure cell, done or not."""

    result: CellResult
    modalities: tuple[str, ...]
    arm: str

    @property
    def name(self) -> str:
        return modality_set(self.modalities) + ("" if self.arm == "unimodal" else f" · {self.arm}")

    def peak(self, key: str) -> float | None:
        """Bytes under `key`, or None."""
        value = self.result.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Group:
    """Measurements that may be compared: one backend, one device, one protocol.

    Attributes:
        backend: cpu or cuda.
        protocol: the measured setting in words.
    """

    backend: str
    device: str
    protocol: str
    rows: tuple[Measured, ...]

    @property
    def label(self) -> str:
        return BACKENDS[self.backend][0]

    @property
    def key(self) -> str:
        """Key of the figure that is this backend's peak."""
        return BACKENDS[self.backend][1]

    @property
    def meaning(self) -> str:
        return BACKENDS[self.backend][2]

    def full(self, row: Measured) -> Measured | None:
        """The full training of the same modalities."""
        return next((other for other in self.rows if (other.modalities, other.arm) == (row.modalities, "full")), None)


def groups(records: RunRecords) -> tuple[tuple[Group, ...], tuple[Measured, ...]]:
    """Measurements by what they may be compared with, and the measure cells that have no record."""
    found: dict[tuple[str, str, str], list[Measured]] = {}
    absent: list[Measured] = []
    for result in records.of("measure"):
        names = result.get("modalities")
        modalities = tuple(map(str, names)) if isinstance(names, list) and names else result.cell.modalities
        row = Measured(result, modalities, str(result.get("arm") or result.cell.arm))
        backend = str(result.get("backend"))
        if result.record is None or backend not in BACKENDS:
            absent.append(row)
            continue
        key = (backend, str(result.get("device")), protocol_words(result.get("protocol")))
        found.setdefault(key, []).append(row)
    arms = {"unimodal": 0, "full": 1, "pretrained": 2}
    made = [
        Group(*key, tuple(sorted(rows, key=lambda row: (len(row.modalities), row.modalities, arms.get(row.arm, 3)))))
        for key, rows in sorted(found.items(), key=lambda item: (item[0][0] != "cuda", item[0]))
    ]
    return tuple(made), tuple(absent)


def protocol_words(protocol: Any) -> str:
    """How a record was measured, in words."""
    try:
        return Protocol.model_validate(protocol).words
    except ValidationError:
        return "protocol not recorded"


def ratio(group: Group, row: Measured) -> Entry:
    """Peak of a pretrained or cached cell over that of the full training of the same modalities, percent."""
    if row.arm not in FROZEN:
        return words("–")
    full = group.full(row)
    a, b = row.peak(group.key), full.peak(group.key) if full else None
    if full is None or a is None or not b:
        return missing("the full training of these modalities is not measured")
    source = sources(measured(row.result, group.key), measured(full.result, group.key))
    return Entry(f"{100 * a / b:.1f} %", "number", source, value=a / b)


def paper_ratio(modalities: int, arm: str) -> float | None:
    """The paper's pretrained over full, as a share."""
    full, value = paper.MEMORY_MB.get((modalities, "full")), paper.MEMORY_MB.get((modalities, arm))
    return value / full if arm == "pretrained" and full and value else None


def figure(row: Measured, key: str, places: int = 0, scale: float = 1.0) -> Entry:
    """A figure of a measurement; where the record holds null, its own reason."""
    if row.result.record is not None and row.result.get(key) is None:
        reason = row.result.get(f"reasons.{key}") or "the record holds no value"
        return missing(str(reason), f"{row.result.source}#results.reasons.{key}")
    return measured(row.result, key, places, scale)


def memory_table(group: Group, position: int) -> Table:
    """Table 2 of the paper for one backend: never two backends in one table."""
    body: list[tuple[Entry, ...]] = []
    for row in group.rows:
        count = len(row.modalities)
        printed_ratio = paper_ratio(count, row.arm)
        body.append(
            (
                words(modality_set(row.modalities)),
                words(row.arm),
                figure(row, group.key, 1, MIB),
                ratio(group, row),
                printed(paper.MEMORY_MB.get((count, row.arm)), 0),
                printed(100 * printed_ratio if printed_ratio else None, 1, unit=" %"),
                *(figure(row, key, 1, MIB) for key, _ in PARTS),
                *predicted(group, row),
                *(figure(row, f"counts.{key}") for key in ("rois_per_image", "foreground_per_image.mask")),
            )
        )
    return Table(
        _name("memory", position),
        f"{group.label}, {group.device}: {group.protocol}. MiB; the paper's figures in MB as printed.",
        (
            "Modalities",
            "Training",
            f"Peak ({group.label})",
            "of full",
            "Peak, paper",
            "of full, paper",
            *(name for _, name in PARTS),
            "Peak, predicted",
            "Error, %",
            "RoIs an image",
            "Masks an image",
        ),
        tuple(body),
        (
            f"Peak is {group.meaning}.",
            "The paper measured MViTv2-B on an RTX A5000; its figures are matched by the number of modalities. "
            "“of full” is the peak on frozen backbones, or on their stored scales, over the peak of full training. "
            "The paper does not say how many RoIs its sample had: here they are as many as the last columns say.",
        ),
    )


def predicted(group: Group, row: Measured) -> tuple[Entry, Entry]:
    """What the peak was expected to be, MiB, and by how much of the measured one that is wrong, percent."""
    if row.result.record is not None and row.result.get("predicted") is None:
        absent = figure(row, "predicted")
        return absent, absent
    error = measured(row.result, f"predicted.error.{group.key}", 1, 0.01)
    if error.value is not None:
        error = signed(100 * error.value, 1, error.source)
    return measured(row.result, f"predicted.{group.key}", 1, MIB), error


def device_table(group: Group, position: int) -> Table:
    """Whole steps, with the optimizer, and what the driver says of the device: a figure each that is never mixed."""
    columns = [(name, [figure(row, key, *form) for row in group.rows]) for key, name, *form in DEVICE]
    reasons: dict[str, list[str]] = {}
    for name, entries in columns:
        notes = {entry.note for entry in entries}
        if len(notes) == 1 and all(entry.kind == "missing" for entry in entries):
            reasons.setdefault(notes.pop(), []).append(name.split(",")[0])
    silent = {name for names in reasons.values() for name in names}
    shown = [(name, entries) for name, entries in columns if name.split(",")[0] not in silent]
    body = [
        (words(modality_set(row.modalities)), words(row.arm), *(entries[i] for _, entries in shown))
        for i, row in enumerate(group.rows)
    ]
    return Table(
        _name("steps", position),
        f"Steps with the optimizer on {group.device}, median; the driver's figures are of the whole device.",
        ("Modalities", "Training", *(name for name, _ in shown)),
        tuple(body),
        tuple(f"Not measured ({reason}): {', '.join(names)}." for reason, names in reasons.items()),
    )


def _name(name: str, position: int) -> str:
    return name if position == 0 else f"{name}_{position + 1}"


def sentences(all_groups: tuple[Group, ...]) -> tuple[Entry, ...]:
    """What frozen backbones save, one sentence for each pair that was measured."""
    found: list[Entry] = []
    for group in all_groups:
        for row in group.rows:
            entry = ratio(group, row)
            if entry.kind != "number":
                continue
            printed_ratio = paper_ratio(len(row.modalities), row.arm)
            beside = f"; the paper printed {100 * printed_ratio:.1f} %" if printed_ratio else ""
            found.append(
                Entry(
                    f"{modality_set(row.modalities)} on {FROZEN[row.arm]} needs {entry.text} of the memory of full "
                    f"training ({group.label}{beside}).",
                    "text",
                    entry.source,
                )
            )
    return tuple(found)


_CSV = tuple(
    name
    for name in Measurement.model_fields
    if name not in ("arm", "modalities", "protocol", "step_seconds_each", "reasons", "counts", "predicted")
)
_COUNTS = ("rois_per_image", "foreground_per_image.stage0", "foreground_per_image.mask")


def memory_csv(records: RunRecords) -> tuple[list[str], list[list[Any]]]:
    """Everything the measure records hold, one row a cell, bytes as recorded."""
    made, absent = groups(records)
    body: list[list[Any]] = []
    counts = [f"counts.{key}" for key in _COUNTS]
    peaks = [f"predicted.{key}" for _, key, _ in BACKENDS.values()]
    for row in (*(row for group in made for row in group.rows), *absent):
        reasons = row.result.get("reasons")
        body.append(
            [
                row.result.cell.id,
                "+".join(row.modalities),
                row.arm,
                *(row.result.get(key) for key in (*_CSV, *counts, *peaks)),
                "; ".join(f"{key}: {why}" for key, why in reasons.items()) if isinstance(reasons, dict) else None,
                protocol_words(row.result.get("protocol")) if row.result.record else None,
                paper.MEMORY_MB.get((len(row.modalities), row.arm)),
                row.result.reason or "done",
            ]
        )
    given = ("cell", "modalities", "arm", *_CSV, *counts, *peaks, "reasons", "protocol", "paper_MB", "status")
    return list(given), body
