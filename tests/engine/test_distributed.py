from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtshpc.core.errors import STOPPED, RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_lines
from rtshpc.engine import checkpoint
from rtshpc.engine.distributed import Group, Preempted, _die_with_parent, choose_device, run_group, stop_requests

from .conftest import cell_of, small_config

ALONE = Group(0, 1, torch.device("cpu"))


def _dealt(group: Group, value: int) -> dict[str, Any]:
    total = group.sum(torch.tensor([float(group.rank + value)]))
    return {"sum": float(total), "any": group.any(5 * group.rank), "ranks": group.gather(group.rank)}


def _failing(group: Group) -> None:
    if group.rank == 1:
        raise RunError("no room for a second")
    group.any(1)


def _killed(group: Group) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.any(1)


def _stopping(group: Group) -> None:
    with stop_requests() as stopped:
        if group.rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        while not group.any(stopped()):
            pass
    raise Preempted


def test_one_process_is_a_group_of_itself() -> None:
    assert _dealt(ALONE, 1) == {"sum": 1.0, "any": 0, "ranks": [0]}
    layer = torch.nn.Linear(2, 2)
    assert ALONE.wrap(layer) is layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(RunError, match="0 visible"):
        choose_device("cuda")


def test_a_stop_signal_is_a_flag_only_inside() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_requests() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopped() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.slow
def test_two_processes_sum_compare_and_gather() -> None:
    assert run_group(_dealt, 2, "cpu", (1,)) == {"sum": 3.0, "any": 5, "ranks": [0, 1]}


@pytest.mark.slow
def test_a_failed_process_ends_the_others_and_is_quoted() -> None:
    with pytest.raises(RunError, match="no room for a second"):
        run_group(_failing, 2, "cpu", ())


@pytest.mark.slow
def test_a_killed_process_is_named() -> None:
    with pytest.raises(RunError, match="process 1 was killed"):
        run_group(_killed, 2, "cpu", ())


@pytest.mark.slow
def test_a_stop_signal_reaches_all_processes() -> None:
    with pytest.raises(Preempted) as caught:
        run_group(_stopping, 2, "cpu", ())
    assert caught.value.code == STOPPED


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(paths: RunPaths, train: Callable[..., Any]) -> None:
    """Batch norms, and losses that are means over boxes, are over those of both; three chips do not divide by two.

    In the last step there is one chip for both, which the second one takes too, at weight 0: only the number of boxes that
    a running variance is corrected by is then another.
    """
    weights, curves = [], []
    for processes in (1, 2):
        training = {"processes": processes, "batch_size": 3, "epochs": 1, "clip_norm": 0.0, "learning_rate": 1e-3}
        config = small_config(training)
        cell = cell_of(config, "pretrain", "rgb")
        cell = cell.model_copy(update={"id": f"with-{processes}"})
        train(cell)
        own = paths.cell(cell.id)
        weights.append(checkpoint.load(own.last_checkpoint)["model"])
        curves.append([row["loss"] for row in read_lines(own.metrics) if row["kind"] == "train"])
    one, two = weights
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    for name, tensor in one.items():
        room = 1e-3 if name.endswith("running_var") else 1e-5
        torch.testing.assert_close(two[name], tensor, rtol=room, atol=5e-5, msg=name)


@pytest.mark.parametrize(("here", "end"), [(True, 0), (False, -signal.SIGKILL)])
def test_a_process_whose_parent_is_gone_before_it_could_follow_it_does_not_live_on(here: bool, end: int) -> None:
    parent = os.getpid()
    child = os.fork()
    if not child:
        _die_with_parent(parent if here else parent + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == end
