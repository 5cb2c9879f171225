from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rtshpc.core.config import AugmentConfig
from rtshpc.core.errors import ShapeError
from rtshpc.core.features import variants
from rtshpc.data.augment import Geometry, augment, drawn_variant, geometry_of, turn, variant_of
from rtshpc.data.sample import IGNORE_ID, Sample, boxes_of, collate, target_of

SIZE = 24


def sample_of(seed: int, name: str = "chip", size: int = SIZE) -> Sample:
    random = np.random.default_rng(seed)
    ids = np.zeros((size, size), dtype=np.int32)
    count = int(random.integers(0, 4))
    for number in range(1, count + 1):
        y, x = random.integers(0, size - 6, 2)
        ids[y : y + random.integers(2, 7), x : x + random.integers(2, 7)] = number
    ids = np.searchsorted(np.unique(np.append(ids, 0)), ids)
    ids[0, : size // 3] = np.where(ids[0, : size // 3] == 0, IGNORE_ID, ids[0, : size // 3])
    count = int(ids[ids != IGNORE_ID].max())
    valid = torch.from_numpy(random.random((size, size)) > 0.1)
    base = torch.from_numpy(random.normal(size=(1, size, size)).astype(np.float32)) * valid
    images = {"rgb": torch.cat((base, base * 2, base * 3)), "ndvi": base.clone()}
    target = target_of(torch.from_numpy(ids), [number % 3 for number in range(count)])
    return Sample(
        name,
        "scene",
        "site",
        images,
        valid,
        target,
        (1.0, 0, 0, 0, -1.0, 0),
        "",
        (size, size),
        {"rgb": valid, "ndvi": valid},
    )


configs = st.builds(
    AugmentConfig,
    flip=st.booleans(),
    quarter_turns=st.booleans(),
    scale=st.sampled_from([(1.0, 1.0), (0.6, 1.7)]),
    brightness=st.sampled_from([0.0, 0.3]),
    contrast=st.sampled_from([0.0, 0.3]),
    noise=st.sampled_from([0.0, 0.2]),
)
examples = settings(max_examples=60, deadline=None)


@examples
@given(config=configs, seed=st.integers(0, 99), epoch=st.integers(0, 40))
def test_boxes_fit_their_masks_and_shapes_stay(config: AugmentConfig, seed: int, epoch: int) -> None:
    sample = sample_of(seed)
    got = augment(sample, config, seed, epoch)
    target = got.target
    assert torch.equal(target.boxes, boxes_of(target.masks))
    assert len(target.boxes) == len(target.classes) == len(target.masks) <= len(sample.target)
    assert target.masks.flatten(1).any(dim=1).all()
    assert got.size == sample.size and all(got.images[n].shape == sample.images[n].shape for n in got.images)
    assert not (target.masks.any(dim=0) & target.ignore).any() or config.scale != (1.0, 1.0)
    for (x1, y1, x2, y2), mask in zip(target.boxes.int().tolist(), target.masks, strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum() and mask[y1].any() and mask[:, x2 - 1].any()


@examples
@given(config=configs, seed=st.integers(0, 99), epoch=st.integers(0, 40))
def test_a_draw_depends_on_seed_epoch_and_id_alone(config: AugmentConfig, seed: int, epoch: int) -> None:
    sample = sample_of(7)
    first = augment(sample, config, seed, epoch)
    np.random.seed(seed)
    torch.manual_seed(epoch)
    augment(sample_of(8, "another"), config, seed + 1, epoch)
    second = augment(sample, config, seed, epoch)
    for name in first.images:
        assert torch.equal(first.images[name], second.images[name])
    assert torch.equal(first.target.masks, second.target.masks)


def test_seed_epoch_and_id_all_matter() -> None:
    config = AugmentConfig(noise=0.5)
    one = augment(sample_of(1), config, 0, 0).images["rgb"]
    for other in (
        augment(sample_of(1), config, 1, 0),
        augment(sample_of(1), config, 0, 1),
        augment(sample_of(1, "b"), config, 0, 0),
    ):
        assert not torch.equal(one, other.images["rgb"])


@examples
@given(seed=st.integers(0, 99), epoch=st.integers(0, 40), zoomed=st.booleans())
def test_geometry_is_one_for_all_modalities_and_masks(seed: int, epoch: int, zoomed: bool) -> None:
    sample = sample_of(seed)
    if len(sample.target) == 0:
        return
    # The image *is* the first mask: wherever geometry takes it, the mask must go too.
    shape = sample.target.masks[0].float()[None]
    images = {"rgb": torch.cat((shape,) * 3), "ndvi": shape.clone()}
    everywhere = torch.ones_like(sample.valid)
    sample = Sample(
        "x", "", "", images, everywhere, sample.target, (), "", sample.size, {"rgb": everywhere, "ndvi": everywhere}
    )
    got = augment(sample, AugmentConfig(scale=(0.7, 1.5) if zoomed else (1.0, 1.0)), seed, epoch)
    assert torch.equal(got.images["rgb"][0], got.images["ndvi"][0])
    image = got.images["ndvi"][0] > 0.5
    if not zoomed:
        assert torch.equal(image, got.target.masks[0])
    elif len(got.target) == len(sample.target):
        # Bilinear and nearest differ by a rim of at most one pixel.
        grown = torch.nn.functional.max_pool2d(got.target.masks[0].float()[None], 3, 1, 1)[0] > 0
        assert not (image & ~grown).any()


def test_flips_and_turns_move_pixels_and_compute_nothing() -> None:
    sample = sample_of(3)
    seen = set()
    for epoch in range(40):
        got = augment(sample, AugmentConfig(), 0, epoch)
        assert torch.equal(
            got.images["rgb"].flatten(1).sort(dim=1).values, sample.images["rgb"].flatten(1).sort(dim=1).values
        )
        seen.add(tuple(got.images["ndvi"].flatten().tolist()))
    assert len(seen) == 8, "flips and quarter turns of a square are eight"


def test_nodata_stays_zero_under_radiometry() -> None:
    sample = sample_of(5)
    got = augment(sample, AugmentConfig(flip=False, quarter_turns=False, brightness=1.0, contrast=0.5, noise=1.0), 0, 0)
    for image in got.images.values():
        assert (image[:, ~sample.valid] == 0).all() and not torch.equal(
            image[:, sample.valid], sample.images["ndvi"][:, sample.valid]
        )


def test_a_batch_stacks_and_refuses_what_does_not_fit() -> None:
    batch = collate([sample_of(1), sample_of(2)])
    assert batch.images["rgb"].shape == (2, 3, SIZE, SIZE) and len(batch) == 2
    with pytest.raises(ShapeError, match="do not fit"):
        collate([sample_of(1), sample_of(2, size=16)])
    with pytest.raises(ShapeError, match="at least one"):
        collate([])


def test_no_instances_are_empty_tensors() -> None:
    target = target_of(torch.full((4, 4), IGNORE_ID), [])
    assert target.boxes.shape == (0, 4) and target.masks.shape == (0, 4, 4) and target.ignore.all()


def test_flips_and_turns_are_eight_variants_and_each_moves_the_same_pixels() -> None:
    image = torch.arange(2 * 5 * 5).reshape(2, 5, 5)
    seen: dict[int, torch.Tensor] = {}
    for flip_x in (False, True):
        for flip_y in (False, True):
            for turns in range(4):
                geometry = Geometry(flip_x, flip_y, turns, 1.0, (0.0, 0.0))
                number = variant_of(geometry)
                assert torch.equal(turn(image, geometry), turn(image, geometry_of(number)))
                seen[number] = turn(image, geometry)
    assert sorted(seen) == list(range(8)) and torch.equal(seen[0], image)
    assert len({tuple(one.flatten().tolist()) for one in seen.values()}) == 8


@examples
@given(flip=st.booleans(), turns=st.booleans(), seed=st.integers(0, 99), epoch=st.integers(0, 40))
def test_the_drawn_variant_is_what_augmentation_makes(flip: bool, turns: bool, seed: int, epoch: int) -> None:
    sample, config = sample_of(seed), AugmentConfig(flip=flip, quarter_turns=turns)
    number = drawn_variant(sample.id, config, seed, epoch)
    assert number in variants(config)
    got = augment(sample, config, seed, epoch)
    assert all(torch.equal(turn(sample.images[name], geometry_of(number)), got.images[name]) for name in got.images)
