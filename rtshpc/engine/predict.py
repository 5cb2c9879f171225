"""A detector over the chips of a split: instances at the chips' own resolution, and where on Earth they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pyproj
import torch
from pycocotools import mask as coder
from rasterio.features import shapes

from rtshpc.core.errors import SceneRejected
from rtshpc.core.features import CHIPS_AT_ONCE
from rtshpc.data.reader import ShardDataset
from rtshpc.data.sample import Batch, Sample, collate
from rtshpc.engine.distributed import autocast
from rtshpc.engine.scoring import ImageResult, Regions, Rle
from rtshpc.geo.crs import resolution_m, to_lonlat
from rtshpc.model.detections import Detections
from rtshpc.model.detector import Detector
from rtshpc.model.features import StoredScales, computable, read_scales

_DEGREES = 7
"""Decimals of longitudes and latitudes, about 1 cm."""

Told = Callable[[int, int], None]
"""`told(done, total)`, called after every batch; may raise to stop."""


def predict(
    detector: Detector,
    dataset: ShardDataset,
    rows: Sequence[int],
    device: torch.device,
    precision: str = "fp32",
    ground: bool = True,
    told: Told | None = None,
    stored: Mapping[str, StoredScales] | None = None,
) -> list[ImageResult]:
    """Detections and truth of chips, in the order of `rows`; the detector is left in its mode.

    Args:
        detector: on `device`.
        dataset: chips, not augmented.
        rows: positions in the data set.
        device: where to compute.
        precision: fp32, bf16 or fp16.
        ground: also find each chip's ground resolution (else 1 m a pixel).
        told: called with chips done and in all.
        stored: modality -> scales of the data set's split, where the detector has no backbones.
    """
    before = detector.training
    detector.eval()
    found: list[ImageResult] = []
    try:
        with torch.inference_mode():
            for batch, scales in _batches(dataset, rows, stored or {}):
                images = {name: image.to(device) for name, image in batch.images.items()}
                given: dict[str, Any] = {}
                if stored:
                    live = next(iter(stored.values())).live
                    given["scales"] = computable(scales, device, live)
                    given["sizes"] = [sample.size for sample in batch.samples]
                with autocast(device, precision):
                    detections = detector(images, **given)
                for sample, one in zip(batch.samples, detections, strict=True):
                    found.append(image_result(sample, one.cpu(), ground))
                if told is not None:
                    told(len(found), len(rows))
    finally:
        detector.train(before)
    return found


_Read = tuple[Batch, dict[str, tuple[torch.Tensor, ...]]]


def _batches(dataset: ShardDataset, rows: Sequence[int], stored: Mapping[str, StoredScales]) -> Iterator[_Read]:
    """Batches of `rows`, the next one read by a thread while this one is computed."""
    groups = [list(rows[start : start + CHIPS_AT_ONCE]) for start in range(0, len(rows), CHIPS_AT_ONCE)]
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting = [pool.submit(_read, dataset, group, stored) for group in groups[:1]]
        for number in range(len(groups)):
            if number + 1 < len(groups):
                waiting.append(pool.submit(_read, dataset, groups[number + 1], stored))
            yield waiting.pop(0).result()


def _read(dataset: ShardDataset, rows: list[int], stored: Mapping[str, StoredScales]) -> _Read:
    return collate(dataset.__getitems__(rows)), read_scales(stored, rows, [0] * len(rows))


def image_result(sample: Sample, detections: Detections, ground: bool = True) -> ImageResult:
    """Truth and detections of one chip at its own resolution.

    Args:
        sample: the chip at the detector's resolution.
        detections: of that chip, on the CPU.
        ground: see `predict`.
    """
    height, width = sample.native_size
    boxes = detections.scaled_boxes(height, width, *sample.size).float().numpy()
    masks = None
    if detections.mask_probs_NHW is not None:
        masks = encode(detections.masks(height, width, *sample.size).numpy())
    found = Regions(boxes, detections.classes_N.numpy(), masks, detections.scores_N.float().numpy())
    true = native_masks(sample)
    ignored = components(_native(sample.target.ignore.numpy(), sample.native_size))
    nothing = np.zeros(len(ignored), np.int64)
    return ImageResult(
        id=sample.id,
        scene=sample.scene,
        site=sample.site,
        size=(height, width),
        pixel_m=_pixel_m(sample) if ground else 1.0,
        truth=Regions(boxes_of_masks(true), sample.target.classes.numpy(), encode(true)),
        ignore=Regions(boxes_of_masks(ignored), nothing, encode(ignored)),
        found=found,
        transform=sample.transform,
        crs_wkt=sample.crs_wkt,
    )


def native_masks(sample: Sample) -> np.ndarray:
    """Masks of the labels at the chip's own resolution, (N, h, w) bool: enlarging repeats pixels, so this is exact."""
    return _native(sample.target.masks.numpy(), sample.native_size)


def _native(layers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = layers.shape[-2] // size[0], layers.shape[-1] // size[1]
    return layers[..., ::rows, ::columns]


def components(mask: np.ndarray) -> np.ndarray:
    """8-connected parts of a mask (h, w), (N, h, w) bool."""
    count, ids = cv2.connectedComponents(np.ascontiguousarray(mask, np.uint8), connectivity=8, ltype=cv2.CV_32S)
    return ids[None] == np.arange(1, count)[:, None, None]


def encode(masks: np.ndarray) -> list[Rle]:
    """COCO run-length codes (text counts) of masks (N, h, w)."""
    codes = coder.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)) if len(masks) else []
    return [{"size": list(map(int, code["size"])), "counts": code["counts"].decode("ascii")} for code in codes]


def decode(masks: Sequence[Rle], size: tuple[int, int]) -> np.ndarray:
    """Masks (N, h, w) bool of run-length codes."""
    if not masks:
        return np.zeros((0, *size), np.bool_)
    return coder.decode(list(masks)).transpose(2, 0, 1).astype(np.bool_)


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Tight boxes (N, 4) float32, x1 y1 x2 y2, of masks (N, h, w); zeros for an empty one."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for number, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if rows.size:
            boxes[number] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return boxes


def _pixel_m(sample: Sample) -> float:
    try:
        return resolution_m(sample.crs_wkt, sample.transform[:6], sample.native_size[1], sample.native_size[0])
    except (pyproj.exceptions.ProjError, SceneRejected):
        a, b, _, d, e, _ = sample.transform[:6]
        return math.sqrt(abs(a * e - b * d))


def coco_predictions(results: Sequence[ImageResult], classes: Sequence[str]) -> dict[str, Any]:
    """COCO JSON of all detections; each annotation also has `score`, `area_m2` and `geo`.

    `geo` (EPSG:4326, degrees): `lon`, `lat` of the box's centre, `bbox` [west, south, east, north] and
    `geometry`, a GeoJSON MultiPolygon of the mask (of the box without one); None where the CRS does not lead there.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, result in enumerate(results, start=1):
        height, width = result.size
        images.append(
            {
                "id": image,
                "file_name": result.id,
                "height": height,
                "width": width,
                "scene": result.scene,
                "site": result.site,
                "transform": list(result.transform),
                "crs": _crs_name(result.crs_wkt),
                "pixel_m": result.pixel_m,
            }
        )
        for number in range(len(result.found)):
            annotations.append({"id": len(annotations) + 1, "image_id": image, **_annotation(result, number)})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _annotation(result: ImageResult, number: int) -> dict[str, Any]:
    found = result.found
    assert found.scores is not None
    x1, y1, x2, y2 = (float(value) for value in found.boxes[number])
    mask = None if found.masks is None else found.masks[number]
    area = (x2 - x1) * (y2 - y1) if mask is None else float(coder.area(mask))
    return {
        "category_id": int(found.classes[number]) + 1,
        "score": float(found.scores[number]),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "area_m2": area * result.pixel_m**2,
        "iscrowd": 0,
        **({} if mask is None else {"segmentation": mask}),
        "geo": _geo(result, (x1, y1, x2, y2), mask),
    }


def _geo(result: ImageResult, box: tuple[float, float, float, float], mask: Rle | None) -> dict[str, Any] | None:
    x1, y1, x2, y2 = box
    ring = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    shape = outlines(decode([mask], result.size)[0]) if mask is not None else []
    moved = _degrees(result, [((x1 + x2) / 2, (y1 + y2) / 2), *ring])
    if moved is None:
        return None
    placed = [[_degrees(result, points) for points in rings] for rings in shape or [[ring]]]
    lons, lats = [lon for lon, _ in moved[1:]], [lat for _, lat in moved[1:]]
    return {
        "lon": moved[0][0],
        "lat": moved[0][1],
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "geometry": {"type": "MultiPolygon", "coordinates": placed},
    }


def outlines(mask: np.ndarray) -> list[list[list[tuple[float, float]]]]:
    """Polygons along the pixel edges of a mask (h, w): each a closed outer ring, then its holes, (x, y) in px."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    part = np.ascontiguousarray(mask[top : rows[-1] + 1, left : columns[-1] + 1])
    polygons: list[list[list[tuple[float, float]]]] = []
    # 4-connected, because the polygons of 8-connected shapes can be invalid.
    for shape, _ in shapes(part.astype(np.uint8), mask=part, connectivity=4):
        polygons.append([[(x + left, y + top) for x, y in ring] for ring in shape["coordinates"]])
    return polygons


def _degrees(result: ImageResult, points: Sequence[tuple[float, float]]) -> list[list[float]] | None:
    """Pixel coordinates to [lon, lat]; None where the CRS does not lead there."""
    if not result.crs_wkt or len(result.transform) < 6:
        return None
    a, b, c, d, e, f = result.transform[:6]
    xs = [a * x + b * y + c for x, y in points]
    ys = [d * x + e * y + f for x, y in points]
    try:
        lons, lats = to_lonlat(result.crs_wkt, xs, ys)
    except pyproj.exceptions.ProjError:
        return None
    if not all(map(math.isfinite, [*lons, *lats])):
        return None
    return [[round(lon, _DEGREES), round(lat, _DEGREES)] for lon, lat in zip(lons, lats, strict=True)]


def _crs_name(wkt: str) -> str:
    """`EPSG:32608` where the CRS has such a name, else its WKT."""
    try:
        authority = pyproj.CRS.from_wkt(wkt).to_authority(min_confidence=100)
    except pyproj.exceptions.ProjError:
        return wkt
    return ":".join(authority) if authority else wkt
