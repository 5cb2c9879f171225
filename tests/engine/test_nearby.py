"""Shards that tasks read from the scratch disk of their node."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.cell import Cell
from rtshpc.core.errors import DataError, RunError
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, write_json
from rtshpc.engine import nearby
from rtshpc.engine.nearby import near

NAMES = ("0000-000.h5", "0001-000.h5")


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run of two shards, and a node's scratch folder."""
    found = RunPaths(tmp_path / "run")
    found.create()
    for name in NAMES:
        (found.shards / name).write_bytes(name.encode() * 1000)
    sums = {name: hashlib.sha256((found.shards / name).read_bytes()).hexdigest() for name in NAMES}
    write_json(found.index, {"chips": [], "shards": sums})
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path / "scratch"))
    return found


def cell(*sets: str) -> Cell:
    config = load_run("demo", ["site.scratch=NODE_SCRATCH", "site.stage_shards=true", *sets])
    return Cell(id="a", stage="pretrain", label="a", config=config)


def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are copied from now on."""
    copy, seen = shutil.copyfile, list[str]()

    def noted(source: Path, target: Path) -> Any:
        seen.append(source.name)
        return copy(source, target)

    monkeypatch.setattr(nearby.shutil, "copyfile", noted)
    return seen


def test_many_tasks_of_a_node_copy_every_shard_once_and_read_what_preprocess_wrote(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = copies(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: near(cell(), paths, SILENT), range(8)))
    assert sorted(seen) == sorted([*NAMES, "index.json"])
    (folder,) = {one.index.parent for one in found}
    assert folder.is_relative_to(os.environ["NODE_SCRATCH"]) and found[0].shards == paths.shards
    for name in (*NAMES, "index.json"):
        assert (folder / name).read_bytes() == (paths.shards / name).read_bytes()


def test_a_copy_that_was_altered_or_cut_off_is_made_again(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = near(cell(), paths, SILENT).index.parent
    (folder / NAMES[0]).write_bytes(b"x")
    leftover = folder / f".{NAMES[0]}.abc.tmp"
    leftover.write_bytes(b"half")
    seen = copies(monkeypatch)
    assert near(cell(), paths, SILENT).index.parent == folder
    assert seen == [NAMES[0]] and not leftover.exists()
    assert (folder / NAMES[0]).read_bytes() == (paths.shards / NAMES[0]).read_bytes()


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_shard_that_is_not_what_preprocess_wrote_is_refused_and_never_staged(paths: RunPaths, damage: str) -> None:
    shard = paths.shards / NAMES[1]
    shard.write_bytes(b"other") if damage == "altered" else shard.unlink()
    with pytest.raises(DataError, match=f"removed: {NAMES[1]}"):
        near(cell(), paths, SILENT)
    assert not shard.exists() and not list(Path(os.environ["NODE_SCRATCH"]).glob(f"**/{NAMES[1]}"))


def test_without_room_on_scratch_the_shards_are_read_where_they_are(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nearby.shutil, "copyfile", full)
    assert near(cell(), paths, SILENT).index == paths.index
    assert f"No space left on device; shards are read from {paths.shards}" in capsys.readouterr().out


def test_only_a_site_that_asks_for_it_stages_and_it_must_name_its_scratch(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert near(cell("site.stage_shards=false"), paths, SILENT).index == paths.index
    assert not os.listdir(os.environ["NODE_SCRATCH"])
    monkeypatch.delenv("NODE_SCRATCH")
    with pytest.raises(RunError, match=r"site.scratch = NODE_SCRATCH: no such environment variable"):
        near(cell(), paths, SILENT)
