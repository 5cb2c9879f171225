"""A detector that sees ids that it is given as pixels, and a config of map runs for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rtshpc.core.config import RunConfig

SIZE = 32
"""Side of a chip, px."""


@dataclass(frozen=True)
class Seen:
    """What an ideal detector says of a chip: the ids that it was given as pixels."""

    ids: np.ndarray
    numbers: tuple[int, ...]

    @property
    def scores_N(self) -> torch.Tensor:
        return torch.tensor([0.5 + number / 100 for number in self.numbers])

    @property
    def classes_N(self) -> torch.Tensor:
        return torch.zeros(len(self.numbers), dtype=torch.int64)

    def take(self, kept: torch.Tensor) -> Seen:
        return Seen(self.ids, tuple(self.numbers[one] for one in kept.tolist()))

    def masks(self, height: int, width: int, *_: int) -> torch.Tensor:
        assert self.ids.shape == (height, width)
        return torch.from_numpy(self.ids[None] == np.array(self.numbers)[:, None, None])


def ideal(images: dict[str, torch.Tensor]) -> list[Any]:
    """Pixels are ids, normalised by a mean of 0 and a deviation of 1."""
    found: list[Any] = []
    for image in images["ids"]:
        ids = image[0].round().to(torch.int64).numpy()
        found.append(Seen(ids, tuple(reversed([int(one) for one in np.unique(ids) if one > 0]))))
    return found


def config(**values: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "ideal",
            "data": {
                "name": "ideal",
                "scenes": {"glob": "*"},
                "modalities": {"ids": {"bands": ["1"]}},
                "primary": "ids",
                "chip": {"size_px": SIZE, "overlap_px": 0},
            },
            "model": {"name": "none"},
            "finetune": {"modalities": ["ids"], "primary": "ids"},
            "map": {
                "modalities": ["ids"],
                "statistics": {"ids": {"mean": [0.0], "std": [1.0]}},
                "overlap_px": 6,
                "score_threshold": 0.0,
                **values,
            },
        }
    )
