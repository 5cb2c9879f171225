"""Processes of one training: starting them, each on its device and in its precision, averaging over them, and stopping them together."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing as mp, nn
from torch.nn.parallel import DistributedDataParallel

from rtshpc.core.errors import STOP_SIGNALS, STOPPED, RunError
from rtshpc.hpc.site import Place, place_in_step
from rtshpc.model.layers import share_batch_norms

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: a validation or a checkpoint on a slow disk is no hang."""

LOST_OTHERS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "pair closure",
    "failed to recv",
    "remote process exited",
)
"""What gloo, NCCL and the store say when another process has gone, in small letters."""

END_SECONDS = 60.0
"""So long a task that lost another one waits for Slurm to end the step."""

_PR_SET_PDEATHSIG = 1


class Preempted(SystemExit):
    """The training was asked to stop and has saved where it is."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@dataclass(frozen=True)
class Group:
    """The processes of a training, as one of them sees them."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, model: nn.Module, frozen: Iterable[str] = ()) -> nn.Module:
        """`model` so that its gradients are means over processes; itself where there is one process.

        Tensors named in `frozen` never change and are the same everywhere: they are not sent. Batch norms are over the
        chips of all processes.
        """
        if self.size == 1:
            return model
        if not getattr(model, "own_batch_norm_sync", False):
            if self.device.type == "cuda":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            else:
                share_batch_norms(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(frozen))
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: int) -> int:
        """The largest `flag` of all processes."""
        if self.size == 1:
            return flag
        value = torch.tensor(flag, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share_buffers(self, model: nn.Module, frozen: Iterable[str] = ()) -> None:
        """Give all processes the first one's buffers (running means of batch norms) but those named in `frozen`."""
        if self.size > 1:
            for name, buffer in model.named_buffers():
                if name not in frozen:
                    dist.broadcast(buffer, 0)


HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of autocast."""


def choose_device(wanted: str, rank: int = 0) -> torch.device:
    """The device of a process: `auto` takes a GPU where one is visible.

    Raises:
        RunError: a GPU is asked for and there are not enough.
    """
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and rank >= count:
        raise RunError(
            f"device = cuda: process {rank} has no GPU, {count} visible; use device: auto or fewer processes"
        )
    if count == 0:
        return torch.device("cpu")
    return torch.device("cuda", rank % count)


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a network of this precision runs; fp32 changes nothing."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=HALF_TYPES[precision])


class StopFlag:
    """The stop signal that came, as a number; 0 = none."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> int:
        return self.signal


@contextmanager
def stop_requests(forward: Callable[[int], None] | None = None) -> Iterator[StopFlag]:
    """Turn STOP_SIGNALS into a flag while the block runs (in the main thread; elsewhere they stay as they are).

    Args:
        forward: also called with the signal, e.g. to pass it to child processes.
    """
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        flag.signal = number
        if forward is not None:
            forward(number)

    old: dict[int, Any] = {}
    try:
        for number in STOP_SIGNALS:
            with suppress(ValueError):
                old[number] = signal.signal(number, note)
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


Work = Callable[..., Any]
"""`work(group, *arguments)`, a function of a module."""


def run_group(work: Work, processes: int, device: str, arguments: tuple[Any, ...]) -> Any:
    """Run `work` in `processes` processes on this machine and give what the first returns.

    A task of a Slurm step that trains over several of them is one of the processes itself, and `processes` has no say.

    Raises:
        RunError: a process died.
        Preempted: a stop signal came and the work ended on it.
    """
    own = place_in_step()
    if own is not None:
        return _join(own, work, device, arguments)
    if processes == 1:
        return work(Group(0, 1, choose_device(device)), *arguments)
    choose_device(device, processes - 1)
    with tempfile.TemporaryDirectory(prefix="rtshpc-group-") as folder:
        result = Path(folder) / "result.pt"
        started = mp.start_processes(
            _enter,
            (work, processes, device, folder, arguments, os.getpid()),
            processes,
            join=False,
            start_method="spawn",
        )
        assert started is not None

        def forward(number: int) -> None:
            for process in started.processes:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, number)

        with stop_requests(forward) as stopped:
            try:
                while not started.join():
                    pass
            except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
                if stopped():
                    raise Preempted from None
                reason = _first_cause(Path(folder), [process.exitcode for process in started.processes], error)
                raise RunError(f"a process of the training failed: {reason}") from error
        if not result.exists():
            raise Preempted
        return torch.load(result, weights_only=True)


def _join(own: Place, work: Work, device: str, arguments: tuple[Any, ...]) -> Any:
    """Work as one task of a Slurm step: one process a GPU, over any number of nodes."""
    chosen = choose_device(device, own.local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=own.meeting, rank=own.rank, world_size=own.size, timeout=TIMEOUT)
    try:
        group = Group(own.rank, own.size, chosen)
        result = work(group, *arguments)
        group.wait()
        return result
    except RuntimeError as error:
        if any(word in str(error).lower() for word in LOST_OTHERS):
            # The one that failed first says why, and Slurm ends us with it; else this is the reason after all.
            time.sleep(END_SECONDS)
        raise
    finally:
        dist.destroy_process_group()


def _first_cause(folder: Path, exit_codes: Sequence[int | None], error: Exception) -> str:
    """Why the first process ended: the others only lost their connection to it, and may be noticed before."""
    if -signal.SIGKILL in exit_codes:
        rank = exit_codes.index(-signal.SIGKILL)
        return f"process {rank} was killed (SIGKILL), by the memory limit or by hand"
    if (folder / "failed").exists():
        return (folder / "failed").read_text()
    return str(error).strip().splitlines()[-1]


def _note_failure(folder: Path, rank: int, error: Exception) -> None:
    """Leave `error` for the parent where no other process failed before; linked, so never read half written."""
    own = folder / f"failed-{rank}"
    own.write_text(f"{type(error).__name__}: {error}")
    with suppress(FileExistsError):
        os.link(own, folder / "failed")


def _die_with_parent(parent: int) -> None:
    """End with the process `parent` that started this one: an orphan would write into the next attempt's files."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may be gone since: starting Python and importing torch take seconds, in which nobody tells us.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _enter(rank: int, work: Work, size: int, device: str, folder: str, arguments: tuple[Any, ...], parent: int) -> None:
    """What a process spawned by `parent` does: join the group, work, leave the first one's result."""
    _die_with_parent(parent)
    own = choose_device(device, rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # One machine: the address of its host name need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        result = work(Group(rank, size, own), *arguments)
        if rank == 0:
            torch.save(result, Path(folder) / "result.pt")
        dist.barrier()
    except Preempted:
        return
    except Exception as error:
        _note_failure(Path(folder), rank, error)
        raise
    finally:
        dist.destroy_process_group()
