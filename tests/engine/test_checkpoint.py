from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from rtshpc.core.paths import CellPaths
from rtshpc.engine import checkpoint
from rtshpc.engine.checkpoint import BadCheckpoint, Checkpoints, Position

CONTENT = {"format": checkpoint.FORMAT, "model": {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.int64)}}


@pytest.fixture
def own(tmp_path: Path) -> CellPaths:
    return CellPaths(tmp_path / "cell")


def test_equal_content_gives_equal_bytes_under_any_name(tmp_path: Path) -> None:
    first, second = checkpoint.save(tmp_path / "a.pt", CONTENT), checkpoint.save(tmp_path / "longer.pt", CONTENT)
    assert first == second == checkpoint.file_sha256(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "longer.pt").read_bytes()


def test_a_flipped_bit_anywhere_in_the_tensors_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, CONTENT)
    good = path.read_bytes()
    start = good.index(torch.arange(1000.0).numpy().tobytes())
    for place in (start, start + 1234, start + 3999):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(BadCheckpoint, match="CRC"):
            checkpoint.load(path)


@pytest.mark.parametrize("left", [0, 1, 100, 2000, -1])
def test_a_torn_file_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, CONTENT)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(BadCheckpoint, match=r"a\.pt"):
        checkpoint.load(path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/rtshpc-was-here",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "model": _Evil()}, tmp_path / "a.pt")
    with pytest.raises(BadCheckpoint):
        checkpoint.load(tmp_path / "a.pt")
    assert not Path("/tmp/rtshpc-was-here").exists()


def test_a_kill_between_any_two_writes_leaves_a_pair_that_belongs_together(own: CellPaths) -> None:
    """best-2.pt and last.pt of epoch 2 replace those of epoch 1; stop after each of the three steps."""

    def first() -> Checkpoints:
        files, position = Checkpoints(own), Position(epoch=2, best_epoch=1)
        files.write_best(position, {"model": "one"})
        files.write_last(position, {"model": "one"})
        return files

    new = Position(epoch=3, best_epoch=2)
    files = first()
    files.write_best(new, {"model": "two"})
    loaded = Checkpoints(own).read_last()
    assert loaded is not None and loaded.position.best_epoch == 1
    assert checkpoint.load(own.best_checkpoint)["model"] == "one" and not list(own.checkpoints.glob("best-*"))

    files = first()
    files.write_best(new, {"model": "two"})
    candidate = own.checkpoints / "best-2.pt"
    kept = candidate.read_bytes()
    files.write_last(new, {"model": "two"})
    candidate.write_bytes(kept)  # as if the kill came before the rename
    checkpoint.save(own.best_checkpoint, {"format": checkpoint.FORMAT, "model": "one"})
    loaded = Checkpoints(own).read_last()
    assert loaded is not None and loaded.position.best_epoch == 2
    assert checkpoint.load(own.best_checkpoint)["model"] == "two"


def test_a_corrupt_last_checkpoint_or_a_lost_best_starts_anew_with_a_warning(own: CellPaths) -> None:
    files, position = Checkpoints(own), Position(epoch=2, best_epoch=1)
    files.write_best(position, {"model": "one"})
    files.write_last(position, {"model": "one"})
    good = own.last_checkpoint.read_bytes()
    own.last_checkpoint.write_bytes(good[: len(good) // 2])
    with pytest.warns(UserWarning, match="starts anew"):
        assert files.read_last() is None
    own.last_checkpoint.write_bytes(good)
    own.best_checkpoint.unlink()
    with pytest.warns(UserWarning, match="best"):
        assert files.read_last() is None


def test_leftovers_of_a_killed_write_are_removed_and_no_checkpoint_is_no_warning(own: CellPaths) -> None:
    files = Checkpoints(own)
    (own.checkpoints / ".last.pt.abc.tmp").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert files.read_last() is None
    assert not list(own.checkpoints.iterdir())


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"format": checkpoint.FORMAT, "random": checkpoint.random_states()})

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(1))

    wanted = draw()
    draw()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "a.pt")["random"])
    assert draw() == wanted
