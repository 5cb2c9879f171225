"""AP50 of every trained cell beside the paper's, and how fusion compares with the primary alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rtshpc.core.config import RunConfig
from rtshpc.report import paper
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import (
    Entry,
    Table,
    code,
    measured,
    missing,
    modality_name,
    modality_set,
    printed,
    signed,
    sources,
    words,
)

_SETTINGS = frozenset(
    {"finetune.modalities", "finetune.primary", "finetune.backbones", "model.fusion.mixer", "model.fusion.residual"}
)
LEAKAGE = "the split allows leakage"


@dataclass(frozen=True)
class Scored:
    """One evaluation (done or not) with its setting.

    Attributes:
        trained: the pretrain or finetune cell it scores, where its config is there.
        gather: id of the gather cell whose chips it saw; only cells of one gather are compared.
    """

    result: CellResult
    trained: CellResult | None
    modalities: tuple[str, ...]
    mixer: str | None
    residual: bool | None
    arm: str
    gather: str

    @property
    def config(self) -> RunConfig:
        """Config of the training."""
        return (self.trained or self.result).cell.config

    @property
    def fused(self) -> bool:
        return len(self.modalities) > 1

    @property
    def metric(self) -> str:
        """`mask`, or `box` where the model predicts no masks."""
        return "mask" if self.config.model.roi.mask else "box"

    @property
    def value(self) -> float | None:
        """AP50 in percent, or None."""
        found = self.result.get(f"{self.metric}.AP50")
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    @property
    def leaky(self) -> bool:
        return self.result.get("allow_leakage") is True

    @property
    def entry(self) -> Entry:
        """AP50 as shown, with a word on leakage beside it."""
        return measured(self.result, f"{self.metric}.AP50", 2, note=LEAKAGE if self.leaky else "")

    @property
    def setting(self) -> str:
        """`residual cross, pretrained`; for one modality only the grid values beyond the setting."""
        return ", ".join((*((self.mixer_name, self.arm) if self.fused else ()), *self.extras))

    @property
    def name(self) -> str:
        """`RGB+NDVI fused · residual cross, pretrained`."""
        text = f"{modality_set(self.modalities)} {'fused' if self.fused else 'alone'}"
        return " · ".join(part for part in (text, self.setting) if part)

    @property
    def mixer_name(self) -> str:
        if not self.mixer:
            return "unknown mixer"
        return f"{'residual ' if self.residual else ''}{self.mixer}"

    @property
    def extras(self) -> tuple[str, ...]:
        """Grid values beyond the setting itself, e.g. `finetune.epochs = 12`."""
        varied = (self.trained or self.result).cell.varied
        return tuple(f"{key} = {plain(value)}" for key, value in sorted(varied.items()) if key not in _SETTINGS)

    @property
    def paper(self) -> paper.PaperCell | None:
        """The paper's cell of the same setting."""
        setting = (self.modalities, self.mixer, self.residual, self.arm)
        if self.metric == "mask":
            return paper.find(paper.detector_kind(self.config.model), *setting)
        if "geoimagenet" in self.config.data.name.lower():
            return paper.find_geoimagenet(*setting)
        return None


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same chips; `difference` = first - second, AP50 points, None where one is missing."""

    first: Scored
    second: Scored
    difference: float | None
    sentence: Entry


def plain(value: Any) -> str:
    """A grid value for people: lists joined by +, no quotes."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def scored(records: RunRecords) -> tuple[Scored, ...]:
    """Every evaluation of the run: one modality first, then fused sets by size."""
    found = [_scored(records, result) for result in records.of("evaluate")]
    return tuple(sorted(found, key=lambda row: (row.fused, len(row.modalities))))


def _scored(records: RunRecords, result: CellResult) -> Scored:
    trained = records.by_id.get(result.cell.needs[0]) if result.cell.needs else None
    cell = (trained or result).cell
    names = result.get("modalities")
    modalities = tuple(map(str, names)) if isinstance(names, list) and names else cell.modalities
    fused = len(modalities) > 1
    # The record is the witness; the config only speaks for cells that have none.
    mixer = result.get("mixer") if result.record else cell.config.model.fusion.mixer
    residual = result.get("residual") if result.record else cell.config.model.fusion.residual
    return Scored(
        result,
        trained,
        modalities,
        mixer if fused else None,
        residual if fused else None,
        str(result.get("arm") or cell.arm),
        records.gather_of(result),
    )


def alone(rows: tuple[Scored, ...], fused: Scored) -> Scored | None:
    """The unimodal evaluation a fused one is held against: the primary's own backbone, else the best of the primary."""
    primary = fused.modalities[0]
    found = [row for row in rows if row.modalities == (primary,) and row.gather == fused.gather]
    wanted = fused.trained.cell.backbones.get(primary) if fused.trained else None
    for row in found:
        if row.trained is not None and row.trained.cell.id == wanted:
            return row
    return max(found, key=lambda row: row.value if row.value is not None else -1.0, default=None)


def against_primary(rows: tuple[Scored, ...]) -> tuple[Comparison, ...]:
    """Each fused cell against its primary alone, in one sentence, whichever way it went."""
    found: list[Comparison] = []
    for row in rows:
        other = alone(rows, row) if row.fused else None
        if other is not None:
            name, primary = f"{modality_set(row.modalities)} fused", f"{modality_name(row.modalities[0])} alone"
            found.append(compare(row, other, name, primary, row.setting))
    return tuple(found)


def against_full(rows: tuple[Scored, ...]) -> tuple[Comparison, ...]:
    """Each fused cell on pretrained frozen backbones against the same cell trained in full."""
    pairs: list[Comparison] = []
    for row in rows:
        if not row.fused or row.arm != "pretrained":
            continue
        setting = (row.modalities, row.mixer, row.residual, row.extras, row.gather, "full")
        for other in rows:
            if (other.modalities, other.mixer, other.residual, other.extras, other.gather, other.arm) == setting:
                name = f"{modality_set(row.modalities)} fused on pretrained, frozen backbones"
                setting_words = ", ".join((row.mixer_name, *row.extras))
                pairs.append(compare(row, other, name, "the same trained in full", setting_words))
    return tuple(pairs)


def compare(first: Scored, second: Scored, first_name: str, second_name: str, setting: str = "") -> Comparison:
    """Say in one sentence how `first` compares with `second`, whichever is higher."""
    a, b = first.value, second.value
    metric = f"{first.metric} AP50"
    source = sources(first.entry, second.entry)
    prefix = f"{setting}; " if setting else ""
    if a is None or b is None:
        name, absent = (first_name, first) if a is None else (second_name, second)
        why = absent.entry.note or "no value"
        sentence = f"{first_name} is not compared with {second_name} ({prefix}{metric} of {name} not measured: {why})."
        return Comparison(first, second, None, Entry(sentence, "missing", source))
    points = f"{abs(a - b):.1f}"
    verdict = f"{points} points {'above' if a > b else 'below'}" if float(points) else "within 0.05 points of"
    leak = f"; {LEAKAGE}" if first.leaky or second.leaky else ""
    sentence = f"{first_name} is {verdict} {second_name} ({prefix}{metric} {a:.2f} against {b:.2f}{leak})."
    return Comparison(first, second, a - b, Entry(sentence, "text", source))


def best(rows: tuple[Scored, ...]) -> Scored | None:
    """The evaluation with the highest AP50; the first of equals."""
    found = [row for row in rows if row.value is not None]
    return max(found, key=lambda row: row.value or 0.0, default=None)


def results_table(records: RunRecords, rows: tuple[Scored, ...]) -> Table:
    """AP50 per cell, the paper's figure for the same cell, and the difference to the primary alone."""
    comparisons = {item.first.result.cell.id: item for item in against_primary(rows)}
    several = len({row.gather for row in rows}) > 1
    body: list[tuple[Entry, ...]] = []
    for row in rows:
        comparison = comparisons.get(row.result.cell.id)
        line = [
            words(modality_set(row.modalities), row.setting),
            row.entry,
            printed(row.paper.value if row.paper else None, 2, row.paper.note if row.paper else ""),
            _difference(row, comparison),
            measured(row.result, f"{row.metric}.AP", 2),
            measured(row.result, f"{row.metric}.AP75", 2),
            measured(row.result, "box.AP50", 2),
            measured(row.result, "images"),
            measured(row.result, "instances"),
        ]
        body.append((*line, code(row.gather)) if several else tuple(line))
    metric = "Mask" if all(row.metric == "mask" for row in rows) else "Mask (box for models without masks)"
    notes = [
        f"Paper: {paper.SOURCE}, {paper.SETTING}. Where model, data or epochs differ (see the provenance below) "
        "its figures are for orientation, not a target.",
    ]
    if several:
        notes.append(
            "The run folder holds results on more than one data set or split; column “chips” tells them apart."
        )
    columns = (
        "Cell",
        "AP50",
        "AP50, paper",
        "vs primary alone",
        "AP",
        "AP75",
        "Box AP50",
        "Test chips",
        "Test instances",
    )
    return Table(
        "results",
        f"{metric} AP on the test split, percent, one row for each trained cell.",
        (*columns, "Chips") if several else columns,
        tuple(body),
        tuple(notes),
    )


def _difference(row: Scored, comparison: Comparison | None) -> Entry:
    if not row.fused:
        return words("–")
    if comparison is None:
        return missing(f"{modality_name(row.modalities[0])} alone is not in this run")
    if comparison.difference is None:
        return missing("one of the two is not measured", comparison.sentence.source)
    return signed(comparison.difference, 2, comparison.sentence.source)


def absent_table(rows: tuple[Scored, ...]) -> Table:
    """The paper's cells of the RTS comparison that no cell of this run has the setting of."""
    seen = {id(row.paper) for row in rows if row.paper}
    order = ("rgb", "ndvi", "nir")
    body = tuple(
        (
            words(cell.detector),
            words(modality_set(sorted(cell.modalities, key=order.index))),
            words(f"{'residual ' if cell.residual else ''}{cell.mixer}" if cell.mixer else "–"),
            words(cell.arm),
            printed(cell.value, 2, cell.note),
            missing("no cell of this run has this setting"),
        )
        for cell in paper.CELLS
        if id(cell) not in seen
    )
    return Table(
        "paper_cells_not_in_run",
        "Cells of the paper's comparison that this run does not contain, AP50 in percent.",
        ("Detector", "Modalities", "Mixer", "Training", "AP50, paper", "AP50, here"),
        body,
    )


def sites_table(rows: tuple[Scored, ...]) -> Table | None:
    """AP50 per site of the test split, one row for each trained cell."""
    sites = sorted({site for row in rows for site in (row.result.get("per_site") or {})})
    if not sites:
        return None
    body: list[tuple[Entry, ...]] = []
    for row in rows:
        found = row.result.get("per_site") or {}
        body.append((words(row.name), *(_site_entry(row, found, site) for site in sites)))
    return Table(
        "sites",
        "AP50 on the test split per site, percent; below each figure what it is computed from.",
        ("Cell", *sites),
        tuple(body),
    )


def _site_entry(row: Scored, found: dict[str, Any], site: str) -> Entry:
    if row.result.record is None:
        return missing(row.result.reason)
    if site not in found:
        return missing("no test chip of this site")
    values, source = found[site], f"{row.result.source}#results.per_site.{site}"
    value = values.get(f"{row.metric}_AP50")
    scope = f"{values.get('images')} chips, {values.get('instances')} instances"
    if value is None:
        return Entry("undefined", "missing", source, scope)
    return Entry(f"{value:.2f}", "number", f"{source}.{row.metric}_AP50", scope, value)


_FLAT = ("AP", "AP50", "AP75", "AR", "AR_small", "AR_medium", "AR_large")


def results_csv(rows: tuple[Scored, ...]) -> tuple[list[str], list[list[Any]]]:
    """Everything the evaluations hold, one row a cell, numbers at full precision."""
    columns = [
        "evaluate_cell",
        "trained_cell",
        "modalities",
        "mixer",
        "residual",
        "arm",
        "varied",
        "gather_cell",
        "allow_leakage",
        "images",
        "instances",
        *(f"{kind}_{key}" for kind in ("mask", "box") for key in _FLAT),
        "paper_AP50",
        "points_above_primary_alone",
        "status",
    ]
    comparisons = {item.first.result.cell.id: item.difference for item in against_primary(rows)}
    body: list[list[Any]] = []
    for row in rows:
        result = row.result
        body.append(
            [
                result.cell.id,
                row.trained.cell.id if row.trained else None,
                "+".join(row.modalities),
                row.mixer,
                row.residual,
                row.arm,
                "; ".join(row.extras),
                row.gather,
                result.get("allow_leakage"),
                result.get("images"),
                result.get("instances"),
                *(result.get(f"{kind}.{key}") for kind in ("mask", "box") for key in _FLAT),
                row.paper.value if row.paper else None,
                comparisons.get(result.cell.id),
                result.reason or "done",
            ]
        )
    return columns, body


def sites_csv(rows: tuple[Scored, ...]) -> tuple[list[str], list[list[Any]]]:
    """AP50 per site in long form, one row for each cell and site."""
    columns = ["evaluate_cell", "cell", "site", "images", "instances", "mask_AP50", "box_AP50", "allow_leakage"]
    body: list[list[Any]] = []
    for row in rows:
        for site, values in sorted((row.result.get("per_site") or {}).items()):
            found = (values.get(key) for key in columns[3:7])
            body.append([row.result.cell.id, row.name, site, *found, row.result.get("allow_leakage")])
    return columns, body
