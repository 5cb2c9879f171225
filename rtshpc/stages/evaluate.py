"""Scores a trained cell on the test split, stores its predictions and draws its gallery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rtshpc.core.cell import Cell
from rtshpc.core.load import read_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, write_json
from rtshpc.data.reader import ShardDataset, read_index
from rtshpc.engine.detectors import trained
from rtshpc.engine.distributed import choose_device
from rtshpc.engine.loop import training_of
from rtshpc.engine.nearby import near
from rtshpc.engine.predict import coco_predictions, decode, predict
from rtshpc.engine.scoring import ImageResult, score
from rtshpc.report.gallery import draw_picture, stretch

SPLIT = "test"


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Figures of the trained cell (`cell.needs[0]`) on the test split.

    Returns:
        What was scored (trained, trained_label, stage, arm, modalities, mixer, residual, varied), split,
        images, instances, allow_leakage, `mask` and `box` figures in percent, per_site, size_edges_m2,
        predictions and gallery (file names).
    """
    model = read_cell(paths.cell(cell.needs[0]).config)
    config, own = cell.config, paths.cell(cell.id)
    paths = near(cell, paths, progress)
    progress("load", 0, 1)
    dataset = ShardDataset(paths.index, config.data, SPLIT, model.modalities)
    training = training_of(model)
    device = choose_device(training.device)
    torch.set_num_threads(training.threads)
    detector = trained(model, paths).to(device)
    results = predict(
        detector,
        dataset,
        range(len(dataset)),
        device,
        training.precision,
        told=lambda done, total: progress("predict", done, total),
    )
    progress("score", 0, 1)
    edges = config.evaluate.size_edges_m2
    figures = score(results, len(dataset.classes), edges)
    write_json(own.predictions, coco_predictions(results, dataset.classes))
    gallery = _draw_gallery(cell, results, dataset, own.gallery)
    fused = len(model.modalities) > 1
    return {
        "trained": model.id,
        "trained_label": model.label,
        "stage": model.stage,
        "arm": model.arm,
        "modalities": list(model.modalities),
        "mixer": config.model.fusion.mixer if fused else None,
        "residual": config.model.fusion.residual if fused else None,
        "varied": model.varied,
        "split": SPLIT,
        "images": len(results),
        "instances": sum(len(result.truth) for result in results),
        "allow_leakage": bool(read_index(paths.index)["split"]["allow_leakage"]),
        **figures,
        "size_edges_m2": list(edges),
        "predictions": own.predictions.name,
        "gallery": gallery,
    }


def _draw_gallery(cell: Cell, results: Sequence[ImageResult], dataset: ShardDataset, folder: Path) -> list[str]:
    """Pictures of chips with labels, spread over the sites; names relative to the cell's folder."""
    threshold = cell.config.evaluate.score_threshold
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    drawn: list[str] = []
    for number in chosen_rows(results, cell.config.evaluate.gallery):
        result, sample = results[number], dataset[number]
        images = {}
        for name, image in sample.images.items():
            valid = sample.modality_valid.get(name, sample.valid)
            images[name] = _at_size(stretch(image.numpy(), valid.numpy()), result.size)
        assert result.found.scores is not None
        shown = [n for n, value in enumerate(result.found.scores) if value >= threshold]
        masks = result.found.masks
        found = decode([masks[n] for n in shown] if masks is not None else [], result.size)
        path = folder / f"{len(drawn):02d}.png"
        draw_picture(path, images, decode(result.truth.masks or [], result.size), found, f"{result.site}, {result.id}")
        drawn.append(f"{folder.name}/{path.name}")
    return drawn


def chosen_rows(results: Sequence[ImageResult], count: int) -> list[int]:
    """`count` images, those with most instances first, one site after the other."""
    order = sorted(range(len(results)), key=lambda n: (-len(results[n].truth), results[n].id))
    seen: dict[str, int] = {}
    turns: dict[int, int] = {}
    for number in order:
        site = results[number].site
        turns[number] = seen.get(site, 0)
        seen[site] = turns[number] + 1
    # A stable sort: within a turn, images with more instances stay first.
    return sorted(order, key=lambda n: turns[n])[:count]


def _at_size(image: Any, size: tuple[int, int]) -> Any:
    """Display image (H, W[, 3]) at the chip's own size, by taking every n-th pixel."""
    rows, columns = image.shape[0] // size[0], image.shape[1] // size[1]
    return image[::rows, ::columns]
