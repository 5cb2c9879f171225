from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rtshpc.engine.predict import boxes_of_masks, decode, encode
from rtshpc.engine.scoring import ImageResult, Regions, quick_score, score

SIDE = 64


def _disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def _regions(masks: list[np.ndarray], scores: list[float] | None = None, classes: list[int] | None = None) -> Regions:
    stack = np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE)
    found = None if scores is None else np.array(scores, np.float32)
    return Regions(boxes_of_masks(stack), np.array(classes or [0] * len(masks), np.int64), encode(stack), found)


def _image(truth: list[np.ndarray], found: list[np.ndarray], scores: list[float], **more: object) -> ImageResult:
    base = ImageResult(
        id="a",
        scene="s",
        site="here",
        size=(SIDE, SIDE),
        pixel_m=1.0,
        truth=_regions(truth),
        ignore=_regions([]),
        found=_regions(found, scores),
    )
    return replace(base, **more)  # type: ignore[arg-type]


def _random_images(count: int = 12) -> list[ImageResult]:
    random = np.random.default_rng(5)
    images = []
    for number in range(count):
        places = [
            (random.uniform(8, 56), random.uniform(8, 56), random.uniform(3, 9)) for _ in range(random.integers(0, 5))
        ]
        truth = [_disc(*place) for place in places]
        found = [_disc(y + random.normal(0, 1.5), x + random.normal(0, 1.5), r + random.normal()) for y, x, r in places]
        found += [_disc(*random.uniform(8, 56, 2), 4) for _ in range(2)]
        found = [mask for mask in found if mask.any()]
        scores = sorted(random.uniform(0, 1, len(found)), reverse=True)
        site = "north" if number % 3 else "south"
        images.append(_image(truth, found, list(scores), id=f"c{number}", site=site, pixel_m=4.0))
    return images


def test_finding_everything_exactly_is_a_hundred() -> None:
    discs = [_disc(20, 20, 6), _disc(45, 40, 10)]
    figures = score([_image(discs, discs, [0.9, 0.8])], 1, (200, 1000))
    for kind in ("mask", "box"):
        assert {key: figures[kind][key] for key in ("AP", "AP50", "AP75", "AR")} == dict.fromkeys(
            ("AP", "AP50", "AP75", "AR"), pytest.approx(100)
        )


def test_figures_are_those_that_pycocotools_prints() -> None:
    images = _random_images()
    truth, found = COCO(), []
    truth.dataset = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "rts"}]}
    for number, image in enumerate(images, 1):
        truth.dataset["images"].append({"id": number, "height": SIDE, "width": SIDE})
        for box, mask in zip(image.truth.boxes, image.truth.masks or [], strict=True):
            x1, y1, x2, y2 = map(float, box)
            place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": mask, "area": 1.0, "iscrowd": 0}
            row = {"id": len(truth.dataset["annotations"]) + 1, "image_id": number, "category_id": 1, **place}
            truth.dataset["annotations"].append(row)
        for value, mask in zip(image.found.scores, image.found.masks or [], strict=True):  # type: ignore[arg-type]
            found.append({"image_id": number, "category_id": 1, "segmentation": mask, "score": float(value)})
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        plain = COCOeval(truth, truth.loadRes(found), "segm")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    ours = score(images, 1, (300, 1500))["mask"]
    assert ours["AP"] == pytest.approx(plain.stats[0] * 100) and 10 < ours["AP"] < 90
    assert ours["AP50"] == pytest.approx(plain.stats[1] * 100)
    assert ours["AP75"] == pytest.approx(plain.stats[2] * 100)
    assert ours["AR"] == pytest.approx(plain.stats[8] * 100)


def test_a_site_scores_as_if_it_were_alone() -> None:
    images = _random_images()
    whole = score(images, 1, (300, 1500))
    for site in ("north", "south"):
        own = [image for image in images if image.site == site]
        alone = score(own, 1, (300, 1500))
        row = whole["per_site"][site]
        assert row["mask_AP50"] == pytest.approx(alone["mask"]["AP50"])
        assert row["box_AP50"] == pytest.approx(alone["box"]["AP50"])
        assert (row["images"], row["instances"]) == (len(own), sum(len(image.truth) for image in own))


def test_size_classes_are_square_metres_whatever_the_resolution() -> None:
    disc = _disc(30, 30, 10)  # 317 px
    for pixel_m, name in ((1.0, "small"), (4.0, "medium"), (10.0, "large")):
        figures = score([_image([disc], [disc], [0.9], pixel_m=pixel_m)], 1, (2000, 12000))["mask"]
        sizes = {key: figures[f"AR_{key}"] for key in ("small", "medium", "large")}
        assert sizes.pop(name) == pytest.approx(100)
        assert set(sizes.values()) == {None}


def test_other_numbers_of_edges_name_their_classes_by_position() -> None:
    disc = _disc(30, 30, 10)
    assert set(score([_image([disc], [disc], [0.9])], 1, (100,))["mask"]) >= {"AR_size0", "AR_size1"}


def test_a_detection_on_unlabelled_ground_is_neither_right_nor_wrong() -> None:
    slump, unknown = _disc(16, 16, 6), _disc(45, 45, 8)
    wrong = _image([slump], [unknown, slump], [0.9, 0.5])
    assert score([wrong], 1)["mask"]["AP50"] == pytest.approx(50)
    spared = replace(wrong, ignore=_regions([unknown]))
    assert score([spared], 1)["mask"]["AP50"] == pytest.approx(100)
    assert score([spared], 1)["box"]["AP50"] == pytest.approx(100)
    assert quick_score([spared], 1)["ap50"] == pytest.approx(100)


def test_a_figure_without_ground_truth_is_none_and_misses_are_zero() -> None:
    empty = _image([], [_disc(30, 30, 5)], [0.9])
    assert set(score([empty], 1, (10, 100))["mask"].values()) == {None}
    assert quick_score([], 1) == {"ap50": None, "ap": None, "f1": None, "threshold": None}
    assert quick_score([empty], 1)["threshold"] is None
    missed = _image([_disc(30, 30, 5)], [], [])
    assert score([missed], 1)["mask"]["AP50"] == 0.0


def _f1(images: list[ImageResult], threshold: float) -> float:
    """F1 of the detections from a score on: each, best first, takes the free instance it fits best, from IoU 0.5."""
    right = taken_out = labelled = 0
    for image in images:
        truth, found = decode(image.truth.masks or [], image.size), decode(image.found.masks or [], image.size)
        assert image.found.scores is not None
        labelled += len(truth)
        free = list(range(len(truth)))
        for number in np.argsort(-image.found.scores, kind="stable"):
            if image.found.scores[number] < threshold:
                continue
            taken_out += 1
            iou = {n: (truth[n] & found[number]).sum() / (truth[n] | found[number]).sum() for n in free}
            best = max(iou, key=iou.__getitem__, default=None)
            if best is not None and iou[best] >= 0.5:
                right += 1
                free.remove(best)
    return 2 * right / (taken_out + labelled)


def test_the_threshold_of_a_validation_maximises_f1() -> None:
    images = _random_images()
    scores = np.unique(np.concatenate([image.found.scores for image in images if image.found.scores is not None]))
    best = max(_f1(images, threshold) for threshold in scores)
    found = quick_score(images, 1)
    assert found["f1"] == pytest.approx(100 * best)
    assert found["threshold"] is not None
    assert _f1(images, found["threshold"]) == pytest.approx(best)
    # All of equal scores are taken or none.
    disc, far = _disc(16, 16, 6), _disc(45, 45, 8)
    even = quick_score([_image([disc], [disc, far], [0.5, 0.5])], 1)
    assert (even["f1"], even["threshold"]) == (pytest.approx(200 / 3), 0.5)


def test_ground_that_is_not_labelled_takes_no_part_in_the_threshold() -> None:
    slump, unknown = _disc(16, 16, 6), _disc(45, 45, 8)
    image = _image([slump], [unknown, slump], [0.9, 0.5], ignore=_regions([unknown]))
    assert quick_score([image], 1)["f1"] == pytest.approx(100)


def test_boxes_alone_give_no_mask_figures() -> None:
    disc = _disc(30, 30, 10)
    image = _image([disc], [disc], [0.9])
    boxes = replace(image, found=replace(image.found, masks=None))
    figures = score([boxes], 1, (10, 100))
    assert figures["mask"]["AP50"] is None and figures["box"]["AP50"] == pytest.approx(100)
    assert figures["per_site"]["here"]["mask_AP50"] is None
    assert quick_score([boxes], 1)["ap50"] == pytest.approx(100)


def test_classes_are_scored_apart() -> None:
    one, other = _disc(16, 16, 6), _disc(45, 45, 8)
    image = _image([], [], [])
    image = replace(
        image, truth=_regions([one, other], classes=[0, 1]), found=_regions([one, other], [0.9, 0.8], classes=[0, 0])
    )
    assert score([image], 2)["mask"]["AP50"] == pytest.approx(50)
