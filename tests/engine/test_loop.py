from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtshpc.core.cell import Cell
from rtshpc.core.errors import STOPPED, DataError, RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, read_lines
from rtshpc.engine import checkpoint
from rtshpc.engine.detectors import fresh, trained
from rtshpc.engine.distributed import Preempted
from rtshpc.engine.loop import fit

from .conftest import cell_of, small_config

Train = Callable[..., dict[str, Any]]


class Interrupt(Exception):
    pass


class At(Progress):
    """Calls `act` once, when `phase` has done `done`."""

    def __init__(self, phase: str, done: int, act: Callable[[], None]) -> None:
        super().__init__(None)
        self._wanted, self._act = (phase, done), act

    def __call__(self, phase: str, done: int, total: int, text: str = "") -> None:
        if (phase, done) == self._wanted:
            self._wanted = ("", -1)
            self._act()


def _interrupt() -> None:
    raise Interrupt


def _ended(paths: RunPaths, cell: Cell) -> tuple[bytes, bytes, bytes]:
    own = paths.cell(cell.id)
    last = checkpoint.load(own.last_checkpoint)
    tensors = [t for name, t in sorted(last["model"].items())]
    tensors += [s[key] for _, s in sorted(last["optimizer"]["state"].items()) for key in sorted(s)]
    weights = b"".join(t.contiguous().numpy().tobytes() for t in tensors)
    return own.best_checkpoint.read_bytes(), own.metrics.read_bytes(), weights


@pytest.fixture
def undisturbed(paths: RunPaths, train: Train, tmp_path: Path, shards: Path) -> Callable[[Cell], tuple[bytes, ...]]:
    def run(cell: Cell) -> tuple[bytes, ...]:
        other = RunPaths(tmp_path / "other")
        other.create()
        other.shards.rmdir()
        other.shards.symlink_to(RunPaths(shards).shards)
        train(cell, other)
        return _ended(other, cell)

    return run


def test_a_training_ends_with_a_record_a_curve_and_tensorboard_events(paths: RunPaths, train: Train) -> None:
    cell = cell_of(small_config(), "pretrain", "rgb")
    results = train(cell)
    own = paths.cell(cell.id)
    rows = read_lines(own.metrics)
    steps = [row for row in rows if row["kind"] == "train"]
    vals = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in steps] == list(range(1, results["steps"] + 1))
    assert [row["epoch"] for row in vals] == [1, 2]
    assert set(steps[0]) == {"kind", "epoch", "step", "loss", "losses", "lr", "grad_norm"}
    assert steps[0]["loss"] == pytest.approx(sum(steps[0]["losses"].values()))
    assert results["best_ap50"] == max(row["ap50"] for row in vals)
    assert results["checkpoint_sha256"] == checkpoint.file_sha256(own.root / results["checkpoint"])
    assert results["resumed"] == 0 and results["device"] == "cpu"
    assert results["parameters"]["total"] == results["parameters"]["trainable"] > 0
    assert list(own.tensorboard.glob("events.out.tfevents.*"))
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(("phase", "done"), [("train", 2), ("train", 7), ("validate", 8)])
def test_an_interrupted_training_ends_as_an_undisturbed_one(
    paths: RunPaths, train: Train, undisturbed: Any, phase: str, done: int
) -> None:
    cell = cell_of(small_config({"checkpoint_seconds": 0.0}), "pretrain", "rgb")
    with pytest.raises(Interrupt):
        fit(cell, paths, fresh, At(phase, done, _interrupt))
    results = train(cell)
    assert results["resumed"] == 1
    assert _ended(paths, cell) == undisturbed(cell)


@pytest.mark.parametrize(("number", "phase", "done"), [(signal.SIGTERM, "train", 3), (signal.SIGUSR1, "validate", 8)])
def test_a_stop_signal_saves_the_step_and_leaves(
    paths: RunPaths, train: Train, undisturbed: Any, number: signal.Signals, phase: str, done: int
) -> None:
    before = signal.getsignal(number)
    cell = cell_of(small_config({"checkpoint_seconds": 1e9}), "pretrain", "rgb")
    with pytest.raises(Preempted) as caught:
        fit(cell, paths, fresh, At(phase, done, lambda: os.kill(os.getpid(), number)))
    assert caught.value.code == STOPPED
    assert signal.getsignal(number) is before
    position = checkpoint.load(paths.cell(cell.id).last_checkpoint)["position"]
    assert position["step"] == (done if phase == "train" else position["done"]) > 0
    train(cell)
    assert _ended(paths, cell) == undisturbed(cell)


def test_a_corrupt_checkpoint_is_told_and_trained_over(paths: RunPaths, train: Train, undisturbed: Any) -> None:
    cell = cell_of(small_config({"checkpoint_seconds": 0.0}), "pretrain", "rgb")
    with pytest.raises(Interrupt):
        fit(cell, paths, fresh, At("train", 6, _interrupt))
    last = paths.cell(cell.id).last_checkpoint
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.write_bytes(content)
    with pytest.warns(UserWarning, match="starts anew"):
        results = train(cell)
    assert results["resumed"] == 0
    assert _ended(paths, cell) == undisturbed(cell)


def test_frozen_backbones_are_the_pretrained_ones_and_stay_out_of_the_checkpoint(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1})
    parts = {name: cell_of(config, "pretrain", name) for name in ("rgb", "ndvi")}
    records = {name: train(cell) for name, cell in parts.items()}
    cell = cell_of(config, "finetune")
    results = train(cell)
    content = checkpoint.load(paths.cell(cell.id).best_checkpoint)
    assert not any("bottom_up" in name for name in content["model"])
    assert {k: v["sha256"] for k, v in content["backbones"].items()} == {
        name: record["checkpoint_sha256"] for name, record in records.items()
    }
    assert results["parameters"]["trainable"] < results["parameters"]["total"]
    detector = trained(cell, paths)
    for name, part in parts.items():
        wanted = checkpoint.load(paths.cell(part.id).best_checkpoint)["model"]
        backbone = detector.backbone.backbones()[name].state_dict()
        for key, tensor in backbone.items():
            assert torch.equal(tensor, wanted[f"backbone.bottom_up.{key}"]), key
    assert all(torch.equal(t, content["model"][k]) for k, t in detector.state_dict().items() if k in content["model"])


def test_full_training_starts_fresh_and_keeps_everything(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1})
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"backbones": "full"})})
    cell = cell_of(config, "finetune")
    results = train(cell)
    assert results["parameters"]["trainable"] == results["parameters"]["total"]
    content = checkpoint.load(paths.cell(cell.id).best_checkpoint)
    assert content["backbones"] == {} and any("bottom_ups.ndvi" in name for name in content["model"])


def test_a_backbone_that_is_not_the_recorded_one_is_refused(paths: RunPaths, train: Train) -> None:
    config = small_config({"epochs": 1})
    for name in ("rgb", "ndvi"):
        train(cell_of(config, "pretrain", name))
    best = paths.cell(cell_of(config, "pretrain", "ndvi").id).best_checkpoint
    content = checkpoint.load(best)
    checkpoint.save(best, {**content, "epoch": 99})
    with pytest.raises(RunError, match="SHA-256"):
        train(cell_of(config, "finetune"))


def test_a_fusion_without_its_pretraining_names_what_is_missing(paths: RunPaths, train: Train) -> None:
    with pytest.raises(RunError, match="run that cell first"):
        train(cell_of(small_config(), "finetune"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_with_finite_losses(paths: RunPaths, train: Train, precision: str) -> None:
    cell = cell_of(small_config({"epochs": 1, "precision": precision}), "pretrain", "rgb")
    results = train(cell)
    assert results["precision"] == precision and 0 < results["final_loss"] < 100


def test_a_loss_that_is_not_finite_ends_the_training_with_advice(paths: RunPaths, train: Train) -> None:
    cell = cell_of(small_config({"learning_rate": 1e12, "warmup_steps": 0, "clip_norm": 0.0}), "pretrain", "rgb")
    with pytest.raises(RunError, match="learning_rate below"):
        train(cell)


def _with_splits(paths: RunPaths, rename: dict[str, str]) -> None:
    index = json.loads(paths.index.read_text())
    real = paths.shards.resolve()
    paths.shards.unlink()
    paths.shards.mkdir()
    for shard in real.glob("*.h5"):
        (paths.shards / shard.name).symlink_to(shard)
    for chip in index["chips"]:
        chip["split"] = rename.get(chip["split"], chip["split"])
    paths.index.write_text(json.dumps(index))


def test_without_a_val_split_the_last_epoch_is_kept(paths: RunPaths, train: Train) -> None:
    _with_splits(paths, {"val": "test"})
    results = train(cell_of(small_config(), "pretrain", "rgb"))
    assert results["best_epoch"] == 2 and results["best_ap50"] is None


def test_without_training_chips_the_message_says_where_to_look(paths: RunPaths, train: Train) -> None:
    _with_splits(paths, {"train": "test"})
    with pytest.raises(DataError, match="train split has no chips"):
        train(cell_of(small_config(), "pretrain", "rgb"))


def test_lost_metrics_do_not_lose_the_training(paths: RunPaths, train: Train) -> None:
    cell = cell_of(small_config({"checkpoint_seconds": 0.0}), "pretrain", "rgb")
    with pytest.raises(Interrupt):
        fit(cell, paths, fresh, At("train", 6, _interrupt))
    paths.cell(cell.id).metrics.unlink()
    with pytest.warns(UserWarning, match="rows are lost"):
        results = train(cell)
    assert results["resumed"] == 1
    assert next(row["step"] for row in read_lines(paths.cell(cell.id).metrics)) == 6


def test_a_training_by_parts_of_its_batch_is_the_same_cell_and_ends_with_the_same_weights(
    paths: RunPaths, train: Callable[..., Any]
) -> None:
    whole, parts = (
        cell_of(small_config({"epochs": 1}, site={"micro_batch": at_once}), "pretrain", "rgb") for at_once in (0, 1)
    )
    assert whole.id == parts.id
    weights: list[dict[str, torch.Tensor]] = []
    for name, cell in (("whole", whole), ("parts", parts)):
        own = cell.model_copy(update={"id": name})
        train(own)
        weights.append(checkpoint.load(paths.cell(name).last_checkpoint)["model"])

    def apart(one: Any, other: Any) -> float:
        return float(torch.stack([(one[name].double() - other[name].double()).norm() for name in weights[0]]).norm())

    # AdamW takes a step of full length where a gradient is next to nothing, so that single weights may differ.
    assert apart(*weights) < 0.01 * apart(weights[0], fresh(whole).state_dict())
