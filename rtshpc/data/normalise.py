"""Count, mean, spread and range of a modality without its nodata, mergeable in any grouping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FAST_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.float32, np.float64)
"""Types whose moments OpenCV accumulates in double precision without a copy."""
EXACT = 2.0**50
"""Below, a double holds a whole number, and the square of its root differs from it by less than a half."""
CANCELLATION = 1e5
"""Above this ratio of mean square to variance the one-pass moments lose digits and are computed again in two passes."""


@dataclass(frozen=True)
class Statistics:
    """Moments of a modality's channels, in the modality's unit.

    Attributes:
        count: (C,) float64, valid pixels.
        mean: (C,) float64.
        m2: (C,) float64, sum of squared differences from the mean.
        minimum: (C,) float64, +inf where count is 0.
        maximum: (C,) float64, -inf where count is 0.
    """

    count: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    minimum: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> Statistics:
        """Of no pixels at all."""
        return cls(*(np.full(channels, value) for value in (0.0, 0.0, 0.0, np.inf, -np.inf)))

    @classmethod
    def from_array(cls, table: npt.NDArray[np.float64]) -> Statistics:
        """From (C, 5): the form that shards hold."""
        return cls(*np.ascontiguousarray(table.T))

    def to_array(self) -> npt.NDArray[np.float64]:
        """(C, 5) float64: count, mean, m2, minimum, maximum."""
        return np.stack((self.count, self.mean, self.m2, self.minimum, self.maximum), axis=1)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """(C,) standard deviation of the population; 1 where there are no pixels or they are all equal."""
        variance = self.m2 / np.maximum(self.count, 1)
        return np.where(variance > 0, np.sqrt(variance), 1.0)

    def scaled(self, scale: float, offset: float) -> Statistics:
        """Statistics of `x * scale + offset`."""
        if (scale, offset) == (1.0, 0.0):
            return self
        with np.errstate(over="ignore", invalid="ignore"):
            return self._scaled(scale, offset)

    def _scaled(self, scale: float, offset: float) -> Statistics:
        low, high = self.minimum * scale + offset, self.maximum * scale + offset
        if scale < 0:
            low, high = high, low
        none = self.count == 0
        mean = np.where(none, 0.0, self.mean * scale + offset)
        return Statistics(
            self.count, mean, self.m2 * scale * scale, np.where(none, np.inf, low), np.where(none, -np.inf, high)
        )

    def to_json(self) -> dict[str, Any]:
        """`{count, mean, m2, min, max}`, lists by channel; min and max are null where there is no pixel."""
        bounds = {
            key: [float(v) if np.isfinite(v) else None for v in values]
            for key, values in (("min", self.minimum), ("max", self.maximum))
        }
        return {
            "count": [int(v) for v in self.count],
            "mean": [float(v) for v in self.mean],
            "m2": [float(v) for v in self.m2],
            **bounds,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Statistics:
        """The inverse of `to_json`."""
        low = [np.inf if v is None else v for v in value["min"]]
        high = [-np.inf if v is None else v for v in value["max"]]
        return cls(
            *(np.asarray(part, dtype=np.float64) for part in (value["count"], value["mean"], value["m2"], low, high))
        )


def statistics_of(pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Statistics:
    """Moments of one chip.

    Args:
        pixels: (C, H, W) of any real type.
        valid: (H, W); pixels outside do not count.
    """
    count = int(np.count_nonzero(valid))
    mask = None if count == valid.size else np.ascontiguousarray(valid).view(np.uint8)
    if count == 0:
        return Statistics.empty(len(pixels))
    with np.errstate(over="ignore", invalid="ignore"):
        # Moments that overflow are infinite; who writes them looks.
        rows = [_channel(channel, mask, valid) for channel in pixels]
    mean, m2, low, high = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return Statistics(np.full(len(pixels), float(count)), mean, m2, low, high)


def _channel(
    channel: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None, valid: npt.NDArray[np.bool_]
) -> tuple[float, float, float, float]:
    """(mean, m2, minimum, maximum) of one (H, W) layer with at least one valid pixel."""
    if channel.dtype.type in FAST_TYPES:
        channel = np.ascontiguousarray(channel)
        count = channel.size if mask is None else int(np.count_nonzero(mask))
        if mask is None:
            low, high = float(channel.min()), float(channel.max())
        else:
            low, high = cv2.minMaxLoc(channel, mask=mask)[:2]
        if mask is None and channel.dtype.kind in "iu" and max(-low, high) ** 2 * count < EXACT:
            mean, std = _of_integers(channel)
        else:
            mean, std = (float(part[0, 0]) for part in cv2.meanStdDev(channel, mask=mask))
        variance = std * std
        if low == high:
            return low, 0.0, low, high
        if np.isfinite(variance) and mean * mean <= CANCELLATION * variance:
            return mean, variance * count, low, high
    values = channel[valid].astype(np.float64)
    mean = float(values.mean())
    return mean, float(np.square(values - mean).sum()), float(values.min()), float(values.max())


def _of_integers(channel: npt.NDArray[Any]) -> tuple[float, float]:
    """(mean, deviation) of integers whose squares add up to less than `EXACT`.

    Both sums are whole numbers that a double holds, so no order of adding changes them, and the result is that of
    `cv2.meanStdDev` to the bit; for 16-bit types that function does the same eight times slower.
    """
    share = 1 / channel.size
    mean = cv2.sumElems(channel)[0] * share
    squares = round(cv2.norm(channel, cv2.NORM_L2SQR))  # it squares a root, so the last bits may be off
    return mean, math.sqrt(max(squares * share - mean * mean, 0.0))


def merge(parts: Iterable[Statistics], channels: int) -> Statistics:
    """Statistics of all pixels together (Chan, Golub and LeVeque 1979), as a balanced tree in float64."""
    level = list(parts) or [Statistics.empty(channels)]
    while len(level) > 1:
        pairs = [_merge_two(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def _merge_two(a: Statistics, b: Statistics) -> Statistics:
    count = a.count + b.count
    safe = np.maximum(count, 1)
    delta = b.mean - a.mean
    return Statistics(
        count,
        np.where(a.count == 0, b.mean, np.where(b.count == 0, a.mean, a.mean + delta * (b.count / safe))),
        a.m2 + b.m2 + delta * delta * (a.count * b.count / safe),
        np.minimum(a.minimum, b.minimum),
        np.maximum(a.maximum, b.maximum),
    )


def normalise(
    pixels: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    scaling: tuple[float, float],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Stored values -> zero mean and unit deviation, nodata -> 0.

    Args:
        pixels: (C, H, W) as stored.
        valid: (H, W).
        scaling: scale and offset from stored values to the modality's unit.
        mean: of each channel, in the unit.
        std: of each channel, in the unit.

    Returns:
        (C, H, W) float32.
    """
    gain = scaling[0] / np.asarray(std, dtype=np.float64)
    shift = (scaling[1] - np.asarray(mean, dtype=np.float64)) / np.asarray(std, dtype=np.float64)
    exact = pixels.dtype.itemsize <= 2 or pixels.dtype == np.float32
    values = pixels.astype(np.float32 if exact else np.float64)
    # Centre first: float32 keeps its digits for the differences, not for the large common part.
    centre = (-shift / gain).reshape(-1, 1, 1).astype(values.dtype)
    values -= centre
    values *= gain.reshape(-1, 1, 1).astype(values.dtype)
    if not valid.all():
        values[:, ~valid] = 0.0
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
