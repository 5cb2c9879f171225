"""Pictures of ground truth and predictions on each modality (the paper's Figs. 6 and 7)."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.patheffects import Stroke

from rtshpc.core.records import replacing
from rtshpc.report.collect import CellResult, inside
from rtshpc.report.entries import modality_name

TRUTH, PREDICTION = "#ff4536", "#0a28d8"
_PANEL_PX = 320
_DPI = 100
_PNG = b"\x89PNG\r\n\x1a\n"


def stretch(image_CHW: np.ndarray, valid_HW: np.ndarray, low: float = 2.0, high: float = 98.0) -> np.ndarray:
    """Stretch each band between two percentiles of its valid pixels, for display.

    Args:
        image_CHW: bands of one modality, any unit, (C, H, W).
        valid_HW: bool, pixels that hold data; the others come out 0.
        low: percentile shown as 0.
        high: percentile shown as 1.

    Returns:
        float32 in 0..1: (H, W, 3) of the first three bands where there are three, else (H, W) of the first band.
    """
    bands = np.asarray(image_CHW, dtype=np.float64)
    chosen = bands[:3] if len(bands) >= 3 else bands[:1]
    out = np.zeros(chosen.shape, dtype=np.float32)
    for i, band in enumerate(chosen):
        usable = np.asarray(valid_HW, dtype=bool) & np.isfinite(band)
        if not usable.any():
            continue
        floor, ceiling = np.percentile(band[usable], (low, high))
        if ceiling <= floor:
            # A flat band is shown mid-grey: it holds data, but nothing to tell apart.
            out[i][usable] = 0.5
            continue
        out[i][usable] = np.clip((band[usable] - floor) / (ceiling - floor), 0.0, 1.0)
    return out.transpose(1, 2, 0) if out.shape[0] == 3 else out[0]


def draw_picture(
    path: Path, images: dict[str, np.ndarray], truth_NHW: np.ndarray, predictions_NHW: np.ndarray, title: str
) -> None:
    """Write a PNG with one panel for each modality, ground truth outlined red and predictions blue.

    Holes are outlined too; chips smaller than a panel are enlarged by a whole factor without smoothing. Red lines have a
    dark rim, blue ones a light rim, so that they differ in grey.

    Args:
        path: where the PNG goes (atomically).
        images: modality -> (H, W) or (H, W, 3), float 0..1.
        truth_NHW: bool masks of the true instances; N may be 0.
        predictions_NHW: bool masks of the predicted ones; N may be 0.
        title: shown above the panels as it is, never read as markup.
    """
    if not images:
        raise ValueError("draw_picture needs at least one modality")
    height, width = next(iter(images.values())).shape[:2]
    factor = max(1, math.ceil(_PANEL_PX / max(height, width)))
    panel_w, panel_h = max(width * factor, 160), height * factor
    head, foot, gap = 56, 34, 10
    total_w = len(images) * panel_w + (len(images) + 1) * gap
    total_h = panel_h + head + foot
    figure = Figure(figsize=(total_w / _DPI, total_h / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    truth, predictions = _outlines(truth_NHW, factor), _outlines(predictions_NHW, factor)
    for i, (name, image) in enumerate(images.items()):
        left = gap + i * (panel_w + gap)
        axes = figure.add_axes((left / total_w, foot / total_h, panel_w / total_w, panel_h / total_h))
        _panel(axes, image, factor)
        # The prediction is the thinner line, so that red still shows where both agree.
        _stroke(axes, truth, TRUTH, "#3a0000", 2.8)
        _stroke(axes, predictions, PREDICTION, "#ffffff", 1.6)
        axes.set_title(modality_name(name), fontsize=10, pad=4, parse_math=False)
    room = max(12, int(total_w / 6.6))
    shown = title if len(title) <= room else f"{title[: room - 1]}…"
    figure.text(gap / total_w, 1 - 8 / total_h, shown, va="top", fontsize=10, fontweight="bold", parse_math=False)
    _legend(figure, len(truth_NHW), len(predictions_NHW), gap / total_w)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


def _panel(axes: Axes, image: np.ndarray, factor: int) -> None:
    shown = np.clip(np.nan_to_num(np.asarray(image, dtype=np.float32)), 0.0, 1.0)
    height, width = shown.shape[:2]
    axes.imshow(
        shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, width * factor, height * factor, 0)
    )
    axes.set_xlim(0, width * factor)
    axes.set_ylim(height * factor, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor("#8c959f")


def _outlines(masks_NHW: np.ndarray, factor: int) -> list[Outline]:
    """Outer borders and holes of each mask along pixel edges, in enlarged pixels."""
    found: list[Outline] = []
    # Drawn on a grid of at least 4 cells a pixel, so that the line follows pixel edges and not their centres.
    fine = max(4, factor)
    for mask in np.asarray(masks_NHW, dtype=np.uint8):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        top, left = int(rows[0]), int(columns[0])
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1]
        large = np.ascontiguousarray(crop.repeat(fine, 0).repeat(fine, 1))
        lines, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        for line in lines:
            points = (line[:, 0, :].astype(np.float64) + 0.5) / fine + (left, top)
            closed = np.vstack([points, points[:1]]) * factor
            found.append(Outline(closed, closed=True))
    return found


def _stroke(axes: Axes, outlines: Sequence[Outline], colour: str, rim: str, width: float) -> None:
    if outlines:
        joined = Outline.make_compound_path(*outlines)
        patch = PathPatch(joined, fill=False, edgecolor=colour, linewidth=width, joinstyle="round")
        rimmed = Stroke(linewidth=width + 1.0, foreground=rim, alpha=0.75)
        patch.set_path_effects([rimmed, Stroke(linewidth=width, foreground=colour)])
        axes.add_patch(patch)


def _legend(figure: Figure, truth: int, predictions: int, left: float) -> None:
    handles = []
    for colour, rim, label in (
        (TRUTH, "#3a0000", f"ground truth ({truth})"),
        (PREDICTION, "#b6c2ff", f"predictions ({predictions})"),
    ):
        line = Line2D([], [], color=colour, linewidth=2, label=label)
        line.set_path_effects([Stroke(linewidth=4.0, foreground=rim), Stroke(linewidth=2.0, foreground=colour)])
        handles.append(line)
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(left, 0.0),
        ncols=2,
        frameon=False,
        fontsize=9,
        borderaxespad=0.4,
        borderpad=0.2,
    )


@dataclass(frozen=True)
class Embedded:
    """One gallery picture in the page.

    Attributes:
        name: file name relative to the run.
        data: base64 of the PNG; empty where it is not embedded.
        width: px.
        height: px.
        reason: why it is not shown; empty where it is.
    """

    name: str
    data: str
    width: int = 0
    height: int = 0
    reason: str = ""


def embed(results: Sequence[CellResult], limit_bytes: int) -> dict[str, tuple[Embedded, ...]]:
    """Gallery pictures of evaluations by cell id, as base64, until `limit_bytes` of PNG are in the page.

    One picture of every cell is taken before a second of any, so that a limit never hides a whole cell.
    """
    listed = {result.cell.id: _names(result) for result in results}
    shown: dict[str, list[Embedded]] = {name: [] for name in listed}
    left = limit_bytes
    for turn in range(max(map(len, listed.values()), default=0)):
        for result in results:
            names = listed[result.cell.id]
            if turn >= len(names):
                continue
            picture = _load(result, names[turn], left)
            left -= len(picture.data) * 3 // 4
            shown[result.cell.id].append(picture)
    return {name: tuple(pictures) for name, pictures in shown.items()}


def _names(result: CellResult) -> list[str]:
    names = result.get("gallery")
    return [str(name) for name in names] if isinstance(names, list) else []


def _load(result: CellResult, name: str, limit: int) -> Embedded:
    shown = f"cells/{result.cell.id}/{name}"
    path = inside(result.paths.root, name)
    if path is None:
        return Embedded(shown, "", reason="the picture is not in the cell's folder")
    content = path.read_bytes()
    if content[:8] != _PNG or len(content) < 24:
        return Embedded(shown, "", reason="the file is no PNG")
    if len(content) > limit:
        return Embedded(shown, "", reason="not embedded, to keep the page small")
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    return Embedded(shown, base64.b64encode(content).decode("ascii"), width, height)
