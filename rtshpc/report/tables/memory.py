"""Peak memory of one sample, model, forward and backward: the paper's Table 2 beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rtshpc.report import paper
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import MIB, Entry, Table, measured, missing, modality_set, printed, sources, words

BACKENDS = {
    "cuda": ("CUDA allocator", "allocator_peak_bytes", "peak of the CUDA allocator"),
    "cpu": (
        "CPU saved tensors",
        "sum_bytes",
        "parameters + gradients + tensors saved for backward, counted on a CPU; not what a GPU's allocator would show",
    ),
}
"""backend -> (label, the key that is its peak, what that is)."""

PARTS = (("parameters_bytes", "Parameters"), ("gradients_bytes", "Gradients"), ("activations_bytes", "Activations"))


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
    """`256 px chip, bf16, batch 1, 1 warm-up, 3 measured, seed 0`, of what the record says."""
    if not isinstance(protocol, dict):
        return "protocol not recorded"
    forms = (
        ("chip_px", "{} px chip"),
        ("precision", "{}"),
        ("batch", "batch {}"),
        ("warmups", "{} warm-up"),
        ("repeats", "{} measured"),
        ("seed", "seed {}"),
    )
    return ", ".join(form.format(protocol[key]) for key, form in forms if protocol.get(key) is not None)


def ratio(group: Group, row: Measured) -> Entry:
    """Peak of a pretrained cell over that of the full training of the same modalities, percent."""
    if row.arm != "pretrained":
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
                measured(row.result, group.key, 1, MIB),
                ratio(group, row),
                printed(paper.MEMORY_MB.get((count, row.arm)), 0),
                printed(100 * printed_ratio if printed_ratio else None, 1, unit=" %"),
                *(measured(row.result, key, 1, MIB) for key, _ in PARTS),
                _nvml(row),
                measured(row.result, "rss_peak_bytes", 1, MIB),
                measured(row.result, "step_seconds", 3),
            )
        )
    return Table(
        "memory" if position == 0 else f"memory_{position + 1}",
        f"{group.label}, {group.device}: {group.protocol}. MiB; the paper's figures in MB as printed.",
        (
            "Modalities",
            "Training",
            f"Peak ({group.label})",
            "of full",
            "Peak, paper",
            "of full, paper",
            *(name for _, name in PARTS),
            "NVML peak",
            "RSS peak",
            "Step, s",
        ),
        tuple(body),
        (
            f"Peak is the {group.meaning}." if group.backend == "cuda" else f"Peak is {group.meaning}.",
            "The paper measured MViTv2-B on an RTX A5000; its figures are matched by the number of modalities. "
            "“of full” is the peak on pretrained, frozen backbones over the peak of full training.",
        ),
    )


def _nvml(row: Measured) -> Entry:
    if row.result.get("nvml_peak_bytes") is None:
        return missing(str(row.result.get("nvml_reason") or "the record gives no reason"), row.result.source)
    return measured(row.result, "nvml_peak_bytes", 1, MIB)


def sentences(all_groups: tuple[Group, ...]) -> tuple[Entry, ...]:
    """What pretrained backbones save, one sentence for each pair that was measured."""
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
                    f"{modality_set(row.modalities)} on pretrained backbones needs {entry.text} of the memory of full "
                    f"training ({group.label}{beside}).",
                    "text",
                    entry.source,
                )
            )
    return tuple(found)


_CSV = (
    "device",
    "backend",
    "arm",
    "parameters_bytes",
    "trainable_parameters",
    "total_parameters",
    "gradients_bytes",
    "activations_bytes",
    "sum_bytes",
    "allocator_peak_bytes",
    "reserved_peak_bytes",
    "rss_peak_bytes",
    "nvml_peak_bytes",
    "nvml_reason",
    "step_seconds",
)


def memory_csv(records: RunRecords) -> tuple[list[str], list[list[Any]]]:
    """Everything the measure records hold, one row a cell, bytes as recorded."""
    made, absent = groups(records)
    body: list[list[Any]] = []
    for row in (*(row for group in made for row in group.rows), *absent):
        count = len(row.modalities)
        body.append(
            [
                row.result.cell.id,
                "+".join(row.modalities),
                row.arm,
                *(row.result.get(key) for key in _CSV if key != "arm"),
                protocol_words(row.result.get("protocol")) if row.result.record else None,
                paper.MEMORY_MB.get((count, row.arm)),
                row.result.reason or "done",
            ]
        )
    columns = ["cell", "modalities", "arm", *(key for key in _CSV if key != "arm"), "protocol", "paper_MB", "status"]
    return columns, body
