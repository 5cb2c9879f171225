"""Figures as SVG: AP50 bars, memory bars, training curves. The same records give the same bytes.

Each figure is drawn once with marker colours for ink and grid; `standalone` turns them into a light SVG file,
`inline` into CSS variables, so that the page's figures follow light and dark. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; hatches, line styles and marker shapes carry the same distinction in grey.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rtshpc.report import paper
from rtshpc.report.collect import CellResult, RunRecords
from rtshpc.report.entries import MIB, thousands
from rtshpc.report.tables.memory import PARTS, Group
from rtshpc.report.tables.runs import training_name
from rtshpc.report.tables.scores import LEAKAGE, Scored

INK, GRID, PAPER = "#010203", "#010204", "#010205"
_LIGHT = {INK: "#1f2328", GRID: "#d0d7de", PAPER: "#57606a"}
_CSS = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--muted)"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Dark, hatched and light: apart in grey too.
PART_COLOURS = (PALETTE[0], PALETTE[5], PALETTE[4])
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 2, 1, 1, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....")
LINES_A_FIGURE = len(PALETTE)
_WIDTH_IN = 4.7
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "rtshpc",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure with its name (of the file) and words.

    Attributes:
        title: heading.
        caption: what is drawn, with units; also the text for readers who do not see it.
        svg: as matplotlib wrote it, with marker colours.
    """

    name: str
    title: str
    caption: str
    svg: str

    def standalone(self) -> str:
        """An SVG file with light colours."""
        return _coloured(self.svg, _LIGHT)

    def inline(self) -> str:
        """For the page: no namespaces, ids of its own, colours by CSS variables."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'\bid="([^"]*)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r'href="#([^"]*)"', rf'href="#{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]*)\)", rf"url(#{self.name}-\1)", text)
        size = f'class="chart" role="img" aria-labelledby="{self.name}-caption"'
        text = re.sub(
            r'<svg height="[^"]*" version="1.1" (viewBox="[^"]*") width="[^"]*"', rf"<svg {size} \1", text, count=1
        )
        text = re.sub(
            r'<svg width="[^"]*" height="[^"]*" (viewBox="[^"]*") version="1.1"', rf"<svg {size} \1", text, count=1
        )
        return _coloured(text, _CSS)


def printed(page: str) -> str:
    """A page for paper: its figures in the light colours that the page takes there, for readers that know no variables."""
    return _coloured(page, {name: _LIGHT[marker] for marker, name in _CSS.items()})


def _coloured(svg: str, colours: Mapping[str, str]) -> str:
    for marker, colour in colours.items():
        svg = svg.replace(marker, colour)
    return svg


def axes_of(height_in: float) -> tuple[Figure, Axes]:
    """A figure of the page's width with one pair of axes; to be drawn in within `STYLE`."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def saved(figure: Figure) -> str:
    """The figure as SVG, without date and maker."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.DOTALL)


def ap50_bars(rows: Sequence[Scored]) -> Picture | None:
    """AP50 of every scored cell as a bar, the paper's figure for the same cell as a diamond."""
    shown = [row for row in rows if row.value is not None]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = axes_of(0.62 + 0.46 * len(shown))
        for i, row in enumerate(shown):
            colour = PALETTE[0] if row.fused else PALETTE[4]
            axes.barh(
                i,
                row.value or 0,
                height=0.42,
                color=colour,
                hatch="////" if row.arm == "full" else "",
                edgecolor=INK,
                linewidth=0.6,
            )
            axes.text(
                0,
                i - 0.29,
                _short(row.name, 58 if not row.leaky else 38) + (f" ({LEAKAGE})" if row.leaky else ""),
                va="bottom",
                ha="left",
                fontsize=8.5,
            )
            _value(axes, row.value or 0, i, f"{row.value:.1f}")
        figures = [(row.paper.value, i) for i, row in enumerate(shown) if row.paper]
        if figures:
            axes.plot(
                [x for x, _ in figures],
                [y for _, y in figures],
                "D",
                color="white",
                markeredgecolor=PALETTE[1],
                markeredgewidth=1.8,
                markersize=6.5,
                label="the paper's figure for this cell",
            )
        axes.set_ylim(len(shown) - 0.55, -0.85)
        top = max([row.value or 0 for row in shown] + [x for x, _ in figures])
        axes.set_xlim(0, min(108.0, max(10.0, top * 1.15)))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("AP50 on the test split, %")
        if figures:
            figure.legend(loc="outside lower left", fontsize=8.5)
        svg = saved(figure)
    caption = (
        "AP50 on the test split, percent. Light bars: one modality; dark: fused; hatched: full training. "
        "Diamonds: what the paper printed for the same cell, on its own data."
    )
    return Picture("ap50", "AP50 per cell", caption, svg)


def memory_bars(group: Group, position: int) -> Picture:
    """The parts of the peak as stacked bars, one for each modality set and arm; the peak as a line."""
    with mpl.rc_context(STYLE):
        figure, axes = axes_of(0.9 + 0.46 * len(group.rows))
        for i, row in enumerate(group.rows):
            left = 0.0
            for part, ((key, _), hatch) in enumerate(zip(PARTS, _HATCHES, strict=True)):
                width = (row.peak(key) or 0.0) / MIB
                axes.barh(
                    i,
                    width,
                    left=left,
                    height=0.42,
                    color=PART_COLOURS[part],
                    hatch=hatch,
                    edgecolor=INK,
                    linewidth=0.6,
                )
                left += width
            axes.text(0, i - 0.29, _short(row.name, 48), va="bottom", ha="left", fontsize=8.5)
            peak = (row.peak(group.key) or 0.0) / MIB
            axes.plot([peak, peak], [i - 0.29, i + 0.29], color=INK, linewidth=2)
            _value(axes, max(left, peak), i, thousands(peak, 0 if peak >= 10 else 1))
        top = max(
            [sum(row.peak(key) or 0 for key, _ in PARTS) for row in group.rows]
            + [row.peak(group.key) or 0 for row in group.rows]
        )
        _bar_axes(axes, len(group.rows), max(top / MIB, 1e-6), f"MiB ({group.label})")
        _part_legend(figure)
        svg = saved(figure)
    caption = (
        f"{group.label}, {group.device}, {group.protocol}. Parameters, gradients and activations of a step, MiB; bold, "
        f"with a black line: {group.meaning}."
    )
    name = "memory" if position == 0 else f"memory_{position + 1}"
    return Picture(name, f"Memory here: {group.label}", caption, svg)


def paper_memory_bars() -> Picture:
    """The paper's Table 2 and Fig. 4, on an axis of their own."""
    words = {1: "one modality", 2: "two modalities", 3: "three modalities"}
    with mpl.rc_context(STYLE):
        figure, axes = axes_of(0.62 + 0.46 * len(paper.MEMORY_MB))
        for i, ((count, arm), value) in enumerate(paper.MEMORY_MB.items()):
            axes.barh(
                i,
                value,
                height=0.42,
                color="none",
                hatch="////" if arm == "pretrained" else "",
                edgecolor=PAPER,
                linewidth=1.0,
            )
            axes.text(0, i - 0.29, words[count] + ("" if arm == "unimodal" else f" · {arm}"), va="bottom", fontsize=8.5)
            _value(axes, value, i, thousands(value, 0))
        _bar_axes(axes, len(paper.MEMORY_MB), max(paper.MEMORY_MB.values()), "MB, as the paper printed it")
        svg = saved(figure)
    caption = (
        "The paper's Table 2 (its Fig. 4), MB: MViTv2-B on an RTX A5000. Nothing in this figure was measured here."
    )
    return Picture("memory_paper", "Memory in the paper", caption, svg)


def _value(axes: Axes, x: float, y: float, text: str) -> None:
    """The number at the end of a bar."""
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight="bold")


def _bar_axes(axes: Axes, bars: int, top: float, label: str) -> None:
    axes.set_ylim(bars - 0.55, -0.85)
    axes.set_xlim(0, top * 1.18)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


def _part_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor=INK, hatch=hatch, linewidth=0.6, label=name)
        for (_, name), colour, hatch in zip(PARTS, PART_COLOURS, _HATCHES, strict=True)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=2, label="Peak"))
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8.5)


def curves(records: RunRecords) -> tuple[Picture, ...]:
    """Loss and validation AP50 over epochs, at most six trainings a figure, pretraining and fine-tuning apart."""
    found: list[Picture] = []
    for stage, title in (("pretrain", "Pretraining"), ("finetune", "Fine-tuning")):
        results = [result for result in records.of(stage) if result.metrics]
        for start in range(0, len(results), LINES_A_FIGURE):
            part = results[start : start + LINES_A_FIGURE]
            suffix = f"_{start // LINES_A_FIGURE + 1}" if start else ""
            loss = [(training_name(result), loss_points(result)) for result in part]
            ap50 = [(training_name(result), ap50_points(result)) for result in part]
            found += filter(
                None,
                (
                    _curve(
                        f"{stage}_loss{suffix}",
                        f"{title}: loss",
                        "Training loss, mean of each epoch, over epochs.",
                        "training loss",
                        loss,
                    ),
                    _curve(
                        f"{stage}_ap50{suffix}",
                        f"{title}: validation",
                        "AP50 on the validation split, percent, over epochs.",
                        "validation AP50, %",
                        ap50,
                    ),
                ),
            )
    return tuple(found)


def loss_points(result: CellResult) -> list[tuple[float, float]]:
    """(epoch, mean of the step losses of that epoch) from metrics.jsonl."""
    sums: dict[float, list[float]] = {}
    for row in result.metrics:
        if row.get("kind") == "train" and isinstance(row.get("loss"), int | float):
            sums.setdefault(float(row.get("epoch", 0)), []).append(float(row["loss"]))
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(sums.items())]


def ap50_points(result: CellResult) -> list[tuple[float, float]]:
    """(epoch, AP50) of the validations in metrics.jsonl."""
    return [
        (float(row.get("epoch", 0)), float(row["ap50"]))
        for row in result.metrics
        if row.get("kind") == "val" and isinstance(row.get("ap50"), int | float)
    ]


def _curve(
    name: str, title: str, caption: str, label: str, lines: Sequence[tuple[str, list[tuple[float, float]]]]
) -> Picture | None:
    if not any(points for _, points in lines):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = axes_of(2.35 + 0.17 * len(lines))
        for i, (line, points) in enumerate(lines):
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=PALETTE[i],
                linestyle=DASHES[i],
                linewidth=1.7,
                marker=MARKERS[i],
                markersize=4,
                markevery=max(1, len(points) // 8),
                label=_short(line, 56),
            )
        axes.grid(linewidth=0.6)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        figure.legend(loc="outside lower left", fontsize=8.2)
        svg = saved(figure)
    return Picture(name, title, caption, svg)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
