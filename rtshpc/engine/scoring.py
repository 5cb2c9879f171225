"""COCO figures of masks and boxes, by size class in square metres and by site, through pycocotools.

Ignore regions are crowd annotations: a detection that lies in one is neither right nor wrong. A figure
without ground truth to measure it on is None, never 0.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Rle = dict[str, Any]
"""COCO run-length code of a mask: `size` [h, w] and `counts`."""

SIZE_NAMES = ("small", "medium", "large")
_KINDS = {"mask": "segm", "box": "bbox"}
_MOST = 100
_FAR_M2 = 1e15
_IOU_50, _IOU_75 = 0, 5
"""Positions of the two in COCO's thresholds 0.50, 0.55, ..., 0.95."""


@dataclass(frozen=True)
class Regions:
    """Instances of one image, true or found.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2, px of the chip.
        classes: (N,) int64.
        masks: N run-length codes; None where there are boxes only.
        scores: (N,) float32, for found ones.
    """

    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    masks: list[Rle] | None
    scores: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class ImageResult:
    """One chip's truth and detections at its own resolution.

    Attributes:
        id: the chip.
        scene: its scene.
        site: its site.
        size: (h, w), px.
        pixel_m: side of a square of a pixel's ground area, m.
        truth: labelled instances.
        ignore: connected regions that are not labelled.
        found: detections, best first.
        transform: affine a, b, c, d, e, f from pixel to CRS coordinates.
        crs_wkt: CRS of `transform`.
    """

    id: str
    scene: str
    site: str
    size: tuple[int, int]
    pixel_m: float
    truth: Regions
    ignore: Regions
    found: Regions
    transform: tuple[float, ...] = ()
    crs_wkt: str = ""


def score(results: Sequence[ImageResult], classes: int, size_edges_m2: Sequence[float] = ()) -> dict[str, Any]:
    """Figures of all images, percent.

    Args:
        results: the images.
        classes: number of classes.
        size_edges_m2: edges of the size classes, ascending; two edges give small, medium and large.

    Returns:
        `mask` and `box`: AP, AP50, AP75, AR (over IoU 0.50 to 0.95, 100 detections) and AR of each size
        class; `per_site`: images, instances, mask_AP50, box_AP50.
    """
    sites = sorted({result.site for result in results})
    per_site: dict[str, dict[str, Any]] = {}
    for site in sites:
        own = [result for result in results if result.site == site]
        per_site[site] = {"images": len(own), "instances": sum(len(result.truth) for result in own)}
    whole: dict[str, Any] = {"per_site": per_site}
    for kind in _KINDS:
        evaluated = _evaluate(results, classes, kind, size_edges_m2)
        whole[kind] = _figures(evaluated, size_edges_m2)
        for site in sites:
            chosen = [number for number, result in enumerate(results) if result.site == site]
            part = None if evaluated is None else _accumulated(evaluated, chosen)
            per_site[site][f"{kind}_AP50"] = None if part is None else _precision(part, _IOU_50)
    return whole


def quick_score(results: Sequence[ImageResult], classes: int) -> dict[str, float | None]:
    """`ap50` and `ap` (percent) of masks, or of boxes where there are no masks: what a validation needs.

    `threshold` is the score from which on detections make the largest F1 at IoU 0.5, over all classes, and `f1` is that
    F1, percent: what a map is best cut at.
    """
    masks = all(result.found.masks is not None for result in results)
    evaluated = _evaluate(results, classes, "mask" if masks else "box", ())
    if evaluated is None:
        return dict.fromkeys(("ap50", "ap", "f1", "threshold"))
    f1, threshold = _best_f1(evaluated)
    return {
        "ap50": _precision(evaluated, _IOU_50),
        "ap": _precision(evaluated, None),
        "f1": None if f1 is None else 100 * f1,
        "threshold": threshold,
    }


def _best_f1(evaluation: COCOeval) -> tuple[float | None, float | None]:
    """The largest F1 at IoU 0.5 that a score threshold gives, and the highest such threshold.

    Detections are matched best first, so a threshold changes nothing about the matches of those above it.
    """
    images = [image for image in evaluation.evalImgs if image is not None]
    # Images of all size ranges follow each other; the first range holds every size.
    images = [image for image in images if image["aRng"] == evaluation.params.areaRng[0]]
    counted = [~image["dtIgnore"][_IOU_50].astype(bool) for image in images]
    scores = np.concatenate(
        [np.asarray(image["dtScores"])[kept] for image, kept in zip(images, counted, strict=True)] or [[]]
    )
    right = np.concatenate(
        [image["dtMatches"][_IOU_50][kept] > 0 for image, kept in zip(images, counted, strict=True)] or [[]]
    )
    labelled = sum(int(np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)) for image in images)
    if not labelled or not len(scores):
        return None, None
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order])
    # A threshold takes all detections of one score or none.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    f1 = 2 * found[ends] / (ends + 1 + labelled)
    best = int(np.argmax(f1))
    return float(f1[best]), float(scores[ends[best]])


def size_names(edges: Sequence[float]) -> list[str]:
    """Names of the size classes: small, medium, large for two edges, else size0, size1, ..."""
    count = len(edges) + 1
    return list(SIZE_NAMES) if count == len(SIZE_NAMES) else [f"size{number}" for number in range(count)]


def _evaluate(results: Sequence[ImageResult], classes: int, kind: str, edges: Sequence[float]) -> COCOeval | None:
    """pycocotools' evaluation, accumulated; None where there is nothing to compare."""
    if not results or (kind == "mask" and any(result.found.masks is None for result in results)):
        return None
    bounds = [0.0, *edges, _FAR_M2]
    ranges = [[0.0, _FAR_M2], *([low, high] for low, high in itertools.pairwise(bounds) if edges)]
    with redirect_stdout(io.StringIO()):
        truth = _dataset(results, classes, kind, found=False)
        found = _dataset(results, classes, kind, found=True)
        evaluation = COCOeval(truth, found, _KINDS[kind])
        evaluation.params.areaRng = ranges
        evaluation.params.areaRngLbl = ["all", *(size_names(edges) if edges else [])]
        evaluation.params.maxDets = [1, 10, _MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _dataset(results: Sequence[ImageResult], classes: int, kind: str, found: bool) -> COCO:
    annotations: list[dict[str, Any]] = []
    for image, result in enumerate(results, start=1):
        if found:
            rows = _annotations(result.found, kind, result.pixel_m)
        else:
            rows = _annotations(result.truth, kind, result.pixel_m)
            for crowd in _annotations(result.ignore, kind, result.pixel_m):
                rows += [{**crowd, "category_id": number + 1, "iscrowd": 1} for number in range(classes)]
        annotations += [{**row, "image_id": image, "id": len(annotations) + n} for n, row in enumerate(rows, start=1)]
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": image, "height": result.size[0], "width": result.size[1]}
            for image, result in enumerate(results, start=1)
        ],
        "categories": [{"id": number + 1, "name": str(number)} for number in range(classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _annotations(regions: Regions, kind: str, pixel_m: float) -> list[dict[str, Any]]:
    """COCO annotations whose `area` is in m2, so that pycocotools' area ranges are size classes."""
    rows: list[dict[str, Any]] = []
    for number, box in enumerate(regions.boxes.astype(float)):
        width, height = box[2] - box[0], box[3] - box[1]
        mask = None if regions.masks is None else regions.masks[number]
        area = float(width * height) if mask is None else float(_mask_area(mask))
        row: dict[str, Any] = {
            "category_id": int(regions.classes[number]) + 1,
            "bbox": [box[0], box[1], width, height],
            "area": area * pixel_m**2,
            "iscrowd": 0,
        }
        if kind == "mask":
            row["segmentation"] = mask
        if regions.scores is not None:
            row["score"] = float(regions.scores[number])
        rows.append(row)
    return rows


def _mask_area(mask: Rle) -> int:
    from pycocotools import mask as coder

    return int(coder.area(mask))


def _accumulated(evaluation: COCOeval, images: Sequence[int]) -> COCOeval:
    """The same evaluation over some of its images (positions), without matching again."""
    params = evaluation._paramsEval
    shape = (len(params.catIds), len(params.areaRng), len(params.imgIds))
    every = np.empty(len(evaluation.evalImgs), dtype=object)
    every[:] = evaluation.evalImgs
    part = copy.copy(evaluation)
    part.params, part._paramsEval = copy.deepcopy(params), copy.deepcopy(params)
    chosen = [params.imgIds[number] for number in images]
    part.params.imgIds = part._paramsEval.imgIds = chosen
    part.evalImgs = every.reshape(shape)[:, :, list(images)].ravel().tolist()
    with redirect_stdout(io.StringIO()):
        part.accumulate()
    return part


def _figures(evaluation: COCOeval | None, edges: Sequence[float]) -> dict[str, float | None]:
    names = size_names(edges) if edges else []
    if evaluation is None:
        return dict.fromkeys(["AP", "AP50", "AP75", "AR", *(f"AR_{name}" for name in names)])
    return {
        "AP": _precision(evaluation, None),
        "AP50": _precision(evaluation, _IOU_50),
        "AP75": _precision(evaluation, _IOU_75),
        "AR": _recall(evaluation, 0),
        **{f"AR_{name}": _recall(evaluation, number) for number, name in enumerate(names, start=1)},
    }


def _accumulation(evaluation: COCOeval) -> Mapping[str, Any]:
    return evaluation.eval


def _precision(evaluation: COCOeval, iou: int | None) -> float | None:
    """Mean precision over recalls and classes, all sizes, most detections; all IoUs or one."""
    values = _accumulation(evaluation)["precision"][:, :, :, 0, -1]
    return _percent(values if iou is None else values[iou])


def _recall(evaluation: COCOeval, size: int) -> float | None:
    return _percent(_accumulation(evaluation)["recall"][:, :, size, -1])


def _percent(values: npt.NDArray[np.float64]) -> float | None:
    """Mean of what is defined (COCO marks the rest -1), percent."""
    defined = values[values > -1]
    return float(defined.mean() * 100) if defined.size else None
