"""The training loop of both stages: `fit` takes a cell from its first step, or its last checkpoint, to its best.

Killed at any instant and started again, it ends with the same weights and the same metrics.jsonl, on CPU to the
byte: all draws depend on (seed, epoch, sample id), and a checkpoint knows the step and the bytes of the metrics.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.cell import Cell
from rtshpc.core.config import TrainConfig
from rtshpc.core.errors import DataError, RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Progress
from rtshpc.data.reader import ShardDataset
from rtshpc.engine import checkpoint, optim
from rtshpc.engine.checkpoint import Checkpoints, Journal, Position
from rtshpc.engine.detectors import sources, stored_scales
from rtshpc.engine.distributed import Group, Preempted, autocast, run_group, stop_requests
from rtshpc.engine.feed import TrainBatch, batches, derive_seed, plan_steps, steps_per_epoch
from rtshpc.engine.predict import predict
from rtshpc.engine.scoring import quick_score
from rtshpc.model.detector import Detector
from rtshpc.model.weights import load_trainable, trainable_state

Build = Callable[[Cell, RunPaths], Detector]
"""Makes the detector a training starts from; a function of a module, so that spawned processes find it."""

LOGGED_ROWS = 2000
"""About so many training rows are written; longer trainings write every n-th step."""

SKIPPED_STEPS = 20
"""So many steps in a row without finite gradients end an fp16 training: the loss scale cannot fall that far."""


def fit(cell: Cell, paths: RunPaths, build: Build, progress: Progress = SILENT) -> dict[str, Any]:
    """Train the cell's detector and give the results of its record.

    Args:
        cell: pretrain or finetune cell.
        paths: the run.
        build: makes the starting detector.
        progress: told about steps and validations.

    Returns:
        epochs, steps, best_epoch, best_ap50, final_loss, parameters, seconds_per_step, samples_per_second,
        checkpoint, checkpoint_sha256, checkpoint_bytes, device, precision, features (live or cached), resumed.

    Raises:
        DataError: there is nothing to train on.
        RunError: the loss is not finite, or a device is missing.
        Preempted: a stop signal came; the state is saved.
    """
    config = training_of(cell)
    return run_group(_fit, config.processes, config.device, (cell, paths, build, progress))


def training_of(cell: Cell) -> TrainConfig:
    """The section that says how a pretrain or finetune cell is trained."""
    return cell.config.finetune if cell.stage == "finetune" else cell.config.pretrain


def _fit(group: Group, cell: Cell, paths: RunPaths, build: Build, progress: Progress) -> dict[str, Any]:
    config = training_of(cell)
    with computing(config, group.device), stop_requests() as stopped:
        if group.leads:
            progress("load", 0, 1)
        training = Training(group, cell, paths, build, progress if group.leads else SILENT, stopped)
        try:
            return training.run()
        except Exception as error:
            if stopped():  # the signal reached a loader process, too, which is missed here: the last checkpoint stands
                print(f"stopped; failed meanwhile: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                raise Preempted from error
            raise
        finally:
            training.close()


@contextmanager
def computing(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads and determinism of a training, put back afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it hides no use of such memory here, and costs
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = filled


class Training:
    """The state of one training in one process."""

    def __init__(
        self, group: Group, cell: Cell, paths: RunPaths, build: Build, progress: Progress, stopped: Callable[[], int]
    ) -> None:
        self.group, self.cell, self.paths, self.stopped, self.progress = group, cell, paths, stopped, progress
        self.config = config = training_of(cell)
        self.seed = cell.config.seed
        data = cell.config.data
        live = not cell.features
        self.train_set = ShardDataset(paths.index, data, "train", cell.modalities, images=live)
        self.val_set = ShardDataset(paths.index, data, "val", cell.modalities, images=live)
        if not len(self.train_set):
            raise DataError(f"{paths.index}: the train split has no chips; see data.split and shards/rejected.json")
        self.train_scales = stored_scales(cell, paths, self.train_set, "train")
        self.val_scales = stored_scales(cell, paths, self.val_set, "val")
        self.per_epoch = steps_per_epoch(len(self.train_set), config.batch_size)
        self.total = self.per_epoch * config.epochs
        self.detector = build(cell, paths).to(group.device).train()
        self.detector.take_at_once(cell.config.site.micro_batch)
        self.frozen = self.detector.state_dict().keys() - trainable_state(self.detector).keys()
        self.model = group.wrap(self.detector, self.frozen)
        self.parameters = [parameter for _, parameter in optim.trainable(self.model)]
        self.optimizer = optim.build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "fp16")
        self.sources = sources(cell, paths)
        self.position = Position()
        self.skipped = 0
        self.checkpoints = Checkpoints(paths.cell(cell.id))
        self._resume()
        own = paths.cell(cell.id)
        self.journal: Journal | None = None
        if group.leads:
            self.journal = Journal(own.metrics, own.tensorboard, self.position.metrics_bytes, self.position.step + 1)
        self.saved_at, self.saved = time.monotonic(), (self.position.epoch, self.position.step)

    def _resume(self) -> None:
        """Go on from last.pt; the first process reads it, so that all agree on what it is."""
        loaded = self.checkpoints.read_last() if self.group.leads else None
        if self.group.any(int(loaded is not None)) == 0:
            return
        if not self.group.leads:
            content = checkpoint.load(self.paths.cell(self.cell.id).last_checkpoint)
            loaded = checkpoint.Loaded(Position(**content.pop("position")), content)
        assert loaded is not None
        states = loaded.states
        if states["steps_per_epoch"] != self.per_epoch or states["cell"] != self.cell.id:
            warnings.warn(
                f"cells/{self.cell.id}: last.pt is of other chips or another cell; starting anew", stacklevel=2
            )
            return
        load_trainable(self.detector, states["model"], "last.pt")
        self.optimizer.load_state_dict(states["optimizer"])
        if states["scaler"]:
            self.scaler.load_state_dict(states["scaler"])
        checkpoint.restore_random_states(states["random"])
        self.position = loaded.position
        self.position.resumed += 1

    def run(self) -> dict[str, Any]:
        """Steps and validations to the end."""
        while self.position.epoch <= self.config.epochs:
            if self.position.done < self.per_epoch:
                self._run_epochs()
            else:
                self._end_epoch()
        return self._results()

    def _run_epochs(self) -> None:
        """Steps from here on; ends with the training, the validations in between are run on the way."""
        group, position = self.group, self.position
        steps = plan_steps(
            len(self.train_set), self.config, self.seed, (position.epoch, position.done), group.rank, group.size
        )
        pin = group.device.type == "cuda"
        for batch in batches(self.train_set, self.config, self.seed, steps, pin, self.train_scales):
            self.step(batch)
            if position.done == self.per_epoch:
                self._end_epoch()
            elif self._checkpoint_due():
                self._save()
            self._stop_if_asked()

    def step(self, batch: TrainBatch) -> None:
        """One optimizer step."""
        began = time.monotonic()
        position, step = self.position, self.position.step + 1
        torch.manual_seed(derive_seed(self.seed, "step", batch.step.epoch, batch.step.number))
        rate = optim.rate_at(step, self.total, self.config)
        optim.set_rate(self.optimizer, rate)
        own = batch.to(self.group.device)
        with autocast(self.group.device, self.config.precision):
            given = {"sizes": own.sizes, "scales": own.scales} if own.scales else {}
            found = self.model(own.images, own.targets, own.seeds, **given)
            losses = {name: value.float() for name, value in found.items()}
        shares = self._shares(losses, batch.step.weight)
        loss = (torch.stack(list(losses.values())) * shares).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        values, grad_norm = self._values(losses, norm, shares)
        total = sum(values.values())
        self._check_finite(values, grad_norm, step)
        position.step, position.done, position.loss_sum = step, batch.step.number, position.loss_sum + total
        position.seconds, position.timed = position.seconds + time.monotonic() - began, position.timed + 1
        if self.journal is not None and (step % math.ceil(self.total / LOGGED_ROWS) == 0 or step == self.total):
            row = {"epoch": batch.step.epoch, "step": step, "loss": total, "losses": values, "lr": rate}
            self.journal.train({**row, "grad_norm": grad_norm})
        self.progress("train", step, self.total, f"loss {total:.3f}")

    def _shares(self, losses: Mapping[str, Tensor], weight: float) -> Tensor:
        """Factors (losses,) with which means over this process's chips or boxes have the mean over all of theirs.

        Args:
            losses: each a mean over chips, or over the boxes that the detector has counted.
            weight: of a mean over chips; 0 where the process has none.
        """
        shares = torch.full((len(losses),), weight, device=self.group.device)
        counted = self.detector.counted() if self.group.size > 1 else {}
        if counted:
            own = torch.tensor([counted.get(name, 0) if weight else 0 for name in losses], dtype=shares.dtype)
            own = own.to(shares.device)
            every = self.group.sum(own.clone())
            told = torch.tensor([name in counted for name in losses], device=shares.device)
            shares = torch.where(told, own * self.group.size / every.clamp(min=1), shares)
        return shares

    def _values(
        self, losses: Mapping[str, Tensor], norm: Tensor, shares: Tensor
    ) -> tuple[dict[str, float], float | None]:
        """Losses, as means over the global batch, and the gradients' norm (None if not finite)."""
        own = torch.stack([*losses.values()]).detach() * (shares / self.group.size)
        numbers = [*self.group.sum(own).tolist(), float(norm)]
        norm_value = numbers.pop()
        return dict(zip(losses, numbers, strict=True)), norm_value if math.isfinite(norm_value) else None

    def _check_finite(self, values: Mapping[str, float], grad_norm: float | None, step: int) -> None:
        """Raise RunError where training on makes no sense; fp16 may skip some steps while its scale falls."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self.skipped = self.skipped + 1 if grad_norm is None else 0
        if not bad and (grad_norm is not None or (self.scaler.is_enabled() and self.skipped < SKIPPED_STEPS)):
            return
        what = ", ".join(bad) or "the gradient"
        rate = self.config.learning_rate
        raise RunError(
            f"step {step}: {what} is not finite; try a learning_rate below {rate:g}, a longer warmup_steps or bf16"
        )

    def _end_epoch(self) -> None:
        """Validate where it is due, keep the best, save."""
        position, config = self.position, self.config
        last = position.epoch == config.epochs
        if position.epoch % config.validate_every == 0 or last:
            self._validate(last)
        position.final_loss = position.loss_sum / self.per_epoch
        position.epoch, position.done, position.loss_sum = position.epoch + 1, 0, 0.0
        self._save()

    def _validate(self, last: bool) -> None:
        """AP50 of the val split over all processes; the first of equal epochs stays the best."""
        position, group = self.position, self.group
        group.share_buffers(self.detector, self.frozen)
        rows = list(range(group.rank, len(self.val_set), group.size))
        own = predict(
            self.detector,
            self.val_set,
            rows,
            group.device,
            self.config.precision,
            False,
            self._told_validation,
            self.val_scales,
        )
        parts = group.gather(own)
        if not group.leads:
            return
        found = [part[number] for number in range(len(parts[0])) for part in parts if number < len(part)]
        scores = quick_score(found, len(self.val_set.classes))
        if self.journal is not None:
            self.journal.val({"epoch": position.epoch, "step": position.step, **scores})
        ap50 = scores["ap50"]
        better = ap50 is not None and (position.best_ap50 is None or ap50 > position.best_ap50)
        if better or (last and position.best_ap50 is None):
            position.best_epoch, position.best_ap50 = position.epoch, ap50
            self.checkpoints.write_best(position, self._best_content())

    def _told_validation(self, done: int, total: int) -> None:
        self.progress("validate", done, total, f"epoch {self.position.epoch}")
        # Alone, a process may leave in mid-validation; several leave together, after the next step.
        if self.group.size == 1 and self.stopped():
            self._leave()

    def _best_content(self) -> dict[str, Any]:
        """What best.pt holds: enough to build the detector again from the cell's config."""
        cell = self.cell
        return {
            "cell": cell.id,
            "stage": cell.stage,
            "arm": cell.arm,
            "modalities": list(cell.modalities),
            "channels": dict(self.train_set.channels),
            "classes": list(self.train_set.classes),
            "backbones": self.sources,
            "epoch": self.position.best_epoch,
            "ap50": self.position.best_ap50,
            "model": {name: tensor.detach().cpu() for name, tensor in trainable_state(self.detector).items()},
        }

    def _checkpoint_due(self) -> bool:
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        return due and self.group.leads

    def _stop_if_asked(self) -> None:
        """Save and leave when any process got a stop signal."""
        if self.group.any(self.stopped()):
            self._leave()

    def _leave(self) -> None:
        """Save what is new; a checkpoint's time tells the scheduler whether this attempt got anywhere."""
        if (self.position.epoch, self.position.step) != self.saved:
            self._save()
        self.group.wait()  # who leaves first would have Slurm end the one that saves
        raise Preempted

    def _save(self) -> None:
        """Write last.pt (the first process)."""
        if not self.group.leads:
            return
        assert self.journal is not None
        self.position.metrics_bytes = self.journal.mark()
        states = {
            "cell": self.cell.id,
            "steps_per_epoch": self.per_epoch,
            "model": trainable_state(self.detector),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"step": self.position.step, "total": self.total},
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_states(),
        }
        self.checkpoints.write_last(self.position, states)
        self.saved_at, self.saved = time.monotonic(), (self.position.epoch, self.position.step)

    def _results(self) -> dict[str, Any]:
        position, own = self.position, self.paths.cell(self.cell.id)
        per_step = position.seconds / position.timed if position.timed else None
        parameters = list(self.detector.parameters())
        return {
            "epochs": self.config.epochs,
            "steps": position.step,
            "best_epoch": position.best_epoch,
            "best_ap50": position.best_ap50,
            "final_loss": position.final_loss,
            "parameters": {
                "total": sum(parameter.numel() for parameter in parameters) + self.detector.backbone.absent,
                "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            },
            "seconds_per_step": per_step,
            "samples_per_second": len(self.train_set) / (self.per_epoch * per_step) if per_step else None,
            "checkpoint": str(own.best_checkpoint.relative_to(own.root)),
            "checkpoint_sha256": position.best_sha256,
            "checkpoint_bytes": own.best_checkpoint.stat().st_size if self.group.leads else None,
            "device": _device_name(self.group.device),
            "precision": self.config.precision,
            "features": "cached" if self.cell.features else "live",
            "resumed": position.resumed,
        }

    def close(self) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
