from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rtshpc.data.normalise import Statistics, merge, normalise, statistics_of

TYPES = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "float32", "float64")


def reference(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    channels = len(parts[0][0])
    pixels = [np.concatenate([p[c][v].astype(np.float64) for p, v in parts]) for c in range(channels)]
    return [np.array([f(values) for values in pixels]) for f in (len, np.mean, np.var, np.min, np.max)]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    seed=st.integers(0, 10_000),
    offset=st.sampled_from([0, 90]),
    missing=st.sampled_from([0.0, 0.3, 0.999]),
    chips=st.integers(1, 6),
)
def test_statistics_equal_a_float64_reference(kind: str, seed: int, offset: int, missing: float, chips: int) -> None:
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(chips):
        pixels = (random.normal(0, 9, (2, 16, 24)).clip(-30, 30) + offset).clip(0 if kind[0] == "u" else -128, 120)
        valid = random.random((16, 24)) >= missing
        valid[0, 0] = True
        parts.append((pixels.astype(kind), valid))
    total = merge([statistics_of(*part) for part in parts], 2)
    count, mean, variance, low, high = reference(parts)
    assert (
        np.array_equal(total.count, count)
        and np.array_equal(total.minimum, low)
        and np.array_equal(total.maximum, high)
    )
    assert np.allclose(total.mean, mean, rtol=1e-11, atol=1e-11)
    assert np.allclose(total.m2 / total.count, variance, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(("uint8", "int8", "uint16", "int16")),
    seed=st.integers(0, 10_000),
    share=st.floats(0.02, 1),
    shape=st.tuples(st.integers(8, 300), st.integers(8, 300)),
)
def test_moments_of_whole_numbers_are_the_general_ones_to_the_bit(
    kind: str, seed: int, share: float, shape: tuple[int, int]
) -> None:
    limits = np.iinfo(kind)
    pixels = np.random.default_rng(seed).integers(limits.min, int(limits.max * share) + 1, shape, kind)
    mean, std = (float(part[0, 0]) for part in cv2.meanStdDev(pixels))
    got = statistics_of(pixels[None], np.ones(shape, dtype=bool))
    assert (got.mean[0], got.m2[0]) == (mean, std * std * pixels.size)


def test_a_small_spread_on_a_large_mean_keeps_its_digits() -> None:
    random = np.random.default_rng(0)
    pixels = (1e6 + random.normal(0, 0.5, (1, 64, 64))).astype(np.float32)
    valid = np.ones((64, 64), dtype=bool)
    got = statistics_of(pixels, valid)
    assert got.m2[0] / got.count[0] == pytest.approx(pixels.astype(np.float64).var(), rel=1e-9)


def test_nodata_counts_nowhere() -> None:
    pixels = np.array([[[5.0, np.nan], [np.inf, 7.0]]], dtype=np.float32)
    got = statistics_of(pixels, np.array([[True, False], [False, True]]))
    assert (got.count[0], got.mean[0], got.minimum[0], got.maximum[0]) == (2, 6, 5, 7)
    none = statistics_of(pixels, np.zeros((2, 2), dtype=bool))
    assert none.count[0] == 0 and none.to_json()["min"] == [None] and none.std[0] == 1.0
    same = merge([none, got, none], 1)
    assert same.mean[0] == 6 and same.m2[0] == got.m2[0]


def test_scaling_and_json_keep_the_statistics() -> None:
    pixels = np.random.default_rng(1).integers(0, 10_000, (3, 20, 20)).astype(np.int16)
    got = statistics_of(pixels, np.ones((20, 20), dtype=bool)).scaled(-1e-4, 0.5)
    values = pixels.astype(np.float64) * -1e-4 + 0.5
    assert np.allclose(got.mean, values.mean(axis=(1, 2))) and np.allclose(got.minimum, values.min(axis=(1, 2)))
    again = Statistics.from_json(got.to_json())
    assert np.array_equal(again.to_array(), got.to_array())
    assert np.array_equal(Statistics.from_array(got.to_array()).to_array(), got.to_array())


def test_merging_does_not_depend_on_the_grouping() -> None:
    random = np.random.default_rng(3)
    parts = [statistics_of(random.normal(5, 2, (1, 8, 8)), np.ones((8, 8), dtype=bool)) for _ in range(13)]
    whole = merge(parts, 1)
    two = merge([merge(parts[:4], 1), merge(parts[4:], 1)], 1)
    assert np.allclose(whole.to_array(), two.to_array(), rtol=1e-13)


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "float32", "float64"])
def test_normalised_pixels_have_zero_mean_unit_spread_and_nodata_at_zero(kind: str) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 200, (2, 32, 32)).astype(kind)
    valid = random.random((32, 32)) > 0.2
    stats = statistics_of(pixels, valid).scaled(0.01, -3.0)
    got = normalise(pixels, valid, (0.01, -3.0), stats.mean.tolist(), stats.std.tolist()).numpy()
    wanted = (pixels * 0.01 - 3.0 - stats.mean.reshape(-1, 1, 1)) / stats.std.reshape(-1, 1, 1)
    assert got.dtype == np.float32 and (got[:, ~valid] == 0).all()
    assert np.allclose(got[:, valid], wanted[:, valid], atol=2e-6)
