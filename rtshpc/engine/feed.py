"""Which chips a step takes, and the batches themselves, read ahead of the training.

Everything random is a function of (seed, epoch, sample id): a training that was killed goes on with the very
batches it would have had, whatever the number of loader processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rtshpc.core.config import AugmentConfig, TrainConfig
from rtshpc.data.augment import augment, drawn_variant
from rtshpc.data.reader import ShardDataset
from rtshpc.data.sample import Target, collate
from rtshpc.model.features import StoredScales, computable, read_scales

AHEAD = 2
"""Batches read before they are asked for."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: from 1.
        number: step within the epoch, from 1.
        rows: chips of this process; at least one.
        weight: share of this process's mean loss in the step's, times the number of processes; 0 where
            `rows` only fills an empty hand.
    """

    epoch: int
    number: int
    rows: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class TrainBatch:
    """What the training needs of a batch.

    Attributes:
        step: which step it is.
        images: modality -> (B, C, H, W); empty with `scales`.
        targets: one a chip.
        seeds: of the RoIs, one a chip.
        scales: modality -> four stored scales (B, C, H, W); empty where backbones run.
        live: type in which the training takes scales.
    """

    step: Step
    images: dict[str, Tensor]
    targets: list[Target]
    seeds: list[int]
    scales: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    live: torch.dtype = torch.float32

    def to(self, device: torch.device) -> TrainBatch:
        """The same on `device`, with scales in the type `live`."""
        images = {name: image.to(device, non_blocking=True) for name, image in self.images.items()}
        targets = [target.to(device) for target in self.targets]
        return replace(self, images=images, targets=targets, scales=computable(self.scales, device, self.live))

    def pin_memory(self) -> TrainBatch:
        """The same with images and scales in page-locked memory, for copies that overlap with computing."""
        images = {name: image.pin_memory() for name, image in self.images.items()}
        scales = {name: tuple(scale.pin_memory() for scale in maps) for name, maps in self.scales.items()}
        return replace(self, images=images, scales=scales)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each chip, px."""
        return [(int(target.ignore.shape[0]), int(target.ignore.shape[1])) for target in self.targets]


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**63 that depends on all `parts` and nothing else."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Optimizer steps of one pass; the last batch may be smaller."""
    return -(-samples // batch_size)


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation of 0..samples-1 from (seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator).tolist()


def plan_steps(
    samples: int, config: TrainConfig, seed: int, start: tuple[int, int], rank: int = 0, processes: int = 1
) -> Iterator[Step]:
    """The steps from `start` to the end of the training, as one process sees them.

    The global batch is dealt out one chip at a time. Where it does not divide, `weight` makes the mean over
    processes equal the mean over chips, and a process without a chip takes one at weight 0, because all
    processes must take part in every step.

    Args:
        samples: chips of the train split.
        config: batch size and epochs.
        seed: of the order.
        start: (epoch, steps of it already done).
        rank: this process.
        processes: all processes.
    """
    first, done = start
    for epoch in range(first, config.epochs + 1):
        order = epoch_order(samples, seed, epoch)
        for number in range((done if epoch == first else 0) + 1, steps_per_epoch(samples, config.batch_size) + 1):
            whole = order[(number - 1) * config.batch_size : number * config.batch_size]
            own = tuple(whole[rank::processes])
            weight = len(own) * processes / len(whole)
            yield Step(epoch, number, own or (whole[0],), weight)


def full_steps(
    samples: int, batch_size: int, seed: int, steps: int, rank: int = 0, processes: int = 1
) -> Iterator[Step]:
    """As `plan_steps`, for timing: so many steps of whole batches, whatever the chips; an epoch may end inside of one."""
    order = (row for epoch in count(1) for row in epoch_order(samples, seed, epoch))
    for number in range(1, steps + 1):
        whole = list(islice(order, batch_size))
        own = tuple(whole[rank::processes])
        yield Step(1, number, own or (whole[0],), len(own) * processes / len(whole))


class _Source:
    """Steps to batches: reads, augments, stacks. What a loader process gets a copy of."""

    def __init__(
        self, dataset: ShardDataset, augmentation: AugmentConfig, seed: int, stored: Mapping[str, StoredScales]
    ) -> None:
        self._dataset = dataset
        self._stored = stored
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, step: Step) -> TrainBatch:
        rows = list(step.rows)
        samples = self._dataset.__getitems__(rows)
        changed = [augment(sample, self._augmentation, self._seed, step.epoch) for sample in samples]
        batch = collate(changed)
        seeds = [derive_seed(self._seed, "rois", step.epoch, sample.id) for sample in changed]
        found = TrainBatch(step, batch.images, batch.targets, seeds)
        if not self._stored:
            return found
        variants = [drawn_variant(sample.id, self._augmentation, self._seed, step.epoch) for sample in samples]
        live = next(iter(self._stored.values())).live
        return replace(found, scales=read_scales(self._stored, rows, variants), live=live)


def _only(batches: Sequence[TrainBatch]) -> TrainBatch:
    return batches[0]


def batches(
    dataset: ShardDataset,
    config: TrainConfig,
    seed: int,
    steps: Iterator[Step],
    pin: bool = False,
    stored: Mapping[str, StoredScales] | None = None,
) -> Iterator[TrainBatch]:
    """The batches of `steps` in order, read ahead by a thread or by `config.workers` processes.

    Args:
        dataset: the train split, not augmented.
        config: augmentation and workers.
        seed: of augmentation and RoI sampling.
        steps: see `plan_steps`.
        pin: put images in page-locked memory (workers only).
        stored: modality -> scales of the train split, where no backbone runs.
    """
    source = _Source(dataset, config.augment, seed, stored or {})
    if config.workers:
        # A sampler of whole steps: one loader serves all epochs, so its processes start once.
        loader: DataLoader[TrainBatch] = DataLoader(
            source,  # pyright: ignore[reportArgumentType]
            batch_sampler=([step] for step in steps),  # pyright: ignore[reportArgumentType]
            num_workers=config.workers,
            collate_fn=_only,
            prefetch_factor=AHEAD,
            pin_memory=pin,
        )
        yield from loader
        return
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting: list[Future[TrainBatch]] = []
        try:
            for step in steps:
                waiting.append(pool.submit(source.__getitem__, step))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
