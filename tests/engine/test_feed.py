from __future__ import annotations

from itertools import islice

import pytest
import torch

from rtshpc.core.config import TrainConfig
from rtshpc.data.reader import ShardDataset
from rtshpc.engine.feed import TrainBatch, batches, derive_seed, epoch_order, plan_steps, steps_per_epoch

from .conftest import small_config

CONFIG = TrainConfig(epochs=3, batch_size=4)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_choose() -> None:
    first = epoch_order(50, 7, 1)
    assert sorted(first) == list(range(50))
    assert first == epoch_order(50, 7, 1)
    assert first != epoch_order(50, 7, 2) and first != epoch_order(50, 8, 1)


def test_seeds_tell_their_parts_apart() -> None:
    seeds = {derive_seed(0, "rois", epoch, f"chip{n}") for epoch in range(20) for n in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("samples", "processes"), [(10, 1), (10, 3), (13, 4), (1, 3)])
def test_every_chip_is_taken_once_an_epoch_and_weights_make_the_mean_one_over_chips(
    samples: int, processes: int
) -> None:
    plans = [list(plan_steps(samples, CONFIG, 0, (1, 0), rank, processes)) for rank in range(processes)]
    assert {len(plan) for plan in plans} == {3 * steps_per_epoch(samples, 4)}
    for together in zip(*plans, strict=True):
        assert len({(step.epoch, step.number) for step in together}) == 1
        assert sum(step.weight for step in together) == pytest.approx(processes)
    for epoch in (1, 2, 3):
        taken = [row for plan in plans for step in plan if step.epoch == epoch and step.weight for row in step.rows]
        assert sorted(taken) == list(range(samples))


def test_a_plan_goes_on_in_mid_epoch_where_it_was_left() -> None:
    whole = list(plan_steps(10, CONFIG, 0, (1, 0)))
    assert list(plan_steps(10, CONFIG, 0, (2, 1))) == whole[4:]
    assert list(plan_steps(10, CONFIG, 0, (1, 3))) == whole[3:]


def _equal(one: TrainBatch, other: TrainBatch) -> bool:
    same = all(torch.equal(one.images[name], other.images[name]) for name in one.images)
    boxes = all(torch.equal(a.boxes, b.boxes) for a, b in zip(one.targets, other.targets, strict=True))
    return same and boxes and one.seeds == other.seeds and one.step == other.step


def test_a_thread_and_loader_processes_give_the_same_batches(dataset: ShardDataset) -> None:
    def take(workers: int) -> list[TrainBatch]:
        config = small_config({"workers": workers}).pretrain
        return list(islice(batches(dataset, config, 3, plan_steps(len(dataset), config, 3, (1, 0))), 6))

    threaded, forked = take(0), take(2)
    assert len(threaded) == 6
    assert all(_equal(one, other) for one, other in zip(threaded, forked, strict=True))


def test_a_chip_is_changed_anew_in_every_epoch(dataset: ShardDataset) -> None:
    config = small_config({"batch_size": len(dataset)}).pretrain
    first, second = batches(dataset, config, 3, plan_steps(len(dataset), config, 3, (1, 0)))
    places = {row: place for place, row in enumerate(second.step.rows)}
    same = [
        torch.equal(first.images["rgb"][n], second.images["rgb"][places[row]]) for n, row in enumerate(first.step.rows)
    ]
    assert not any(same)


def test_an_unreadable_shard_is_an_error_and_no_hang(dataset: ShardDataset) -> None:
    config = small_config().pretrain
    dataset.chips = [{**chip, "shard": "gone.h5"} for chip in dataset.chips]
    with pytest.raises(Exception, match="gone"):
        next(batches(dataset, config, 0, plan_steps(len(dataset), config, 0, (1, 0))))
