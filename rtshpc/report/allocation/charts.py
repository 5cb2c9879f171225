"""Figures of the allocation report: linear axes, ideal and 75 % lines, legible in grey."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from rtshpc.core.sizing.scaling import ScaleRow
from rtshpc.report import figures
from rtshpc.report.allocation.scaling import GOOD, Kind, by_series, counted
from rtshpc.report.entries import places_for, thousands

_LABELS = 6
"""Periods that are named below the axis; of more, every second or third."""


def scaling_chart(kind: Kind, rows: Sequence[ScaleRow]) -> figures.Picture:
    """Speed-up over the count, with quartiles, beside the ideal and 75 % of it."""
    series = by_series(rows)
    most = max(row.count for row in rows) * 1.08
    with mpl.rc_context(figures.STYLE):
        figure, axes = figures.axes_of(3.5)
        axes.plot([0, most], [0, most], color=figures.INK, linewidth=1.1, label="ideal")
        three = f"{GOOD:.0%} efficiency"
        axes.plot([0, most], [0, GOOD * most], color=figures.INK, linewidth=1.1, linestyle=(0, (5, 3)), label=three)
        for i, own in enumerate(series[: figures.LINES_A_FIGURE]):
            unit = own[0].rate / own[0].speed_up
            low = [max(0.0, (row.rate - row.low) / unit) for row in own]
            high = [max(0.0, (row.high - row.rate) / unit) for row in own]
            axes.errorbar(
                [row.count for row in own],
                [row.speed_up for row in own],
                yerr=[low, high],
                color=figures.PALETTE[i],
                marker=figures.MARKERS[i],
                markersize=6,
                linewidth=1.8,
                linestyle=figures.DASHES[i],
                capsize=4,
                label="measured" if len(series) == 1 else f"{own[0].gpu or own[0].device}, inputs {own[0].inputs[:8]}",
            )
        axes.set_xlim(0, most)
        axes.set_ylim(0, max(most, 1.05 * max(row.high * row.speed_up / row.rate for row in rows)))
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(counted(kind, rows))
        axes.set_ylabel("speed-up")
        figure.legend(loc="outside lower left", ncols=2, fontsize=8.5)
        svg = figures.saved(figure)
    caption = (
        f"{kind.caption} Speed-up over the smallest count; bars: first to third quartile of the repeats. Line: ideal; "
        f"broken line: {GOOD:.0%} of it."
    )
    return figures.Picture(f"{kind.table}_{kind.name}", kind.title, caption, svg)


def cumulative_chart(labels: Sequence[str], amounts: Sequence[float], unit: str) -> figures.Picture:
    """The request by period as bars, and its sum up to the end of each as a line."""
    total, sums = 0.0, [0.0]
    for amount in amounts:
        total += amount
        sums.append(total)
    with mpl.rc_context(figures.STYLE):
        figure, axes = figures.axes_of(3.1)
        places = [i + 0.5 for i in range(len(amounts))]
        axes.bar(
            places,
            amounts,
            width=0.7,
            color=figures.PALETTE[4],
            hatch="////",
            edgecolor=figures.INK,
            linewidth=0.6,
            label="in the period",
        )
        axes.plot(range(len(sums)), sums, color=figures.PALETTE[0], marker="o", linewidth=1.9, label="up to its end")
        axes.annotate(
            thousands(total, places_for(total)),
            (len(amounts), total),
            (-4, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            fontweight="bold",
        )
        axes.set_xlim(0, len(amounts) + 0.15)
        axes.set_ylim(0, max(total * 1.15, 1e-9))
        step = -(-len(labels) // _LABELS)
        axes.set_xticks(places[::step], [label.replace(" to ", "\nto ") for label in labels[::step]])
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylabel(unit)
        figure.legend(loc="outside lower left", ncols=2, fontsize=8.5)
        svg = figures.saved(figure)
    caption = f"The request, {unit}: each period (hatched) and the sum up to its end (line)."
    return figures.Picture(f"T6_{unit}", f"Cumulative request, {unit}", caption, svg)
