"""What must hold before and while a run folder is written, whatever the machine is like."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.paths import CellPaths
from rtshpc.launch.__main__ import main as launch_main
from rtshpc.launch.plan import make_plan
from rtshpc.launch.schedule import failure
from rtshpc.stages.__main__ import main as stages_main

from .conftest import ROOT, Launcher


def shared_paths(folder: Path) -> list[str]:
    """Files and folders below that others than their owner can write."""
    found = [folder, *folder.rglob("*")]
    return [str(path) for path in found if not path.is_symlink() and path.stat().st_mode & 0o022]


@pytest.mark.parametrize("main", [launch_main, stages_main])
def test_whatever_is_started_writes_for_its_user_alone(main: Callable[[list[str]], int]) -> None:
    old = os.umask(0)
    try:
        with suppress(SystemExit):
            main(["--help"])
        assert os.umask(0) == 0o022
    finally:
        os.umask(old)


@pytest.mark.slow
def test_under_an_open_umask_neither_launcher_nor_task_leaves_what_others_can_write(launcher: Launcher) -> None:
    plan = make_plan(load_run(launcher.sweep), launcher.runs)
    old = os.umask(0)
    try:
        launcher.run("sweep", "--until", "preprocess", "--set", "data.band_names=[x]", "--set", "site.max_jobs=1")
        line = [sys.executable, "-m", "rtshpc.stages", "preprocess", "--run-dir", str(plan.paths.root), "--task", "0"]
        subprocess.run(line, cwd=ROOT, capture_output=True, check=False)
    finally:
        os.umask(old)
    assert list(plan.paths.logs.rglob("*_submitted.pkl"))
    assert shared_paths(launcher.runs) == []


def failing(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error of a command that is refused."""
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_what_the_machine_refuses_is_one_line(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, runs = str(launcher.sweep), launcher.runs
    runs.mkdir()
    file, dangling, folder = runs / "file", runs / "dangling", runs / "folder"
    file.write_text("x")
    dangling.symlink_to(runs / "nowhere")
    (folder / "plan.json").mkdir(parents=True)

    def said(name: str, at: Path = runs) -> str:
        return failing(launch_main, capsys, "sweep", sweep, "--runs", str(at), "--set", f"name={name}")

    assert "Not a directory" in said("file")
    assert f"{dangling}: File exists" in said("dangling")
    assert "Not a directory" in said("small", file)
    assert f"{folder / 'plan.json'}: cannot be read: Is a directory" in said("folder")
    assert "File name too long" in said("n" * 300)
    task = ("preprocess", "--run-dir", str(file), "--task", "0")
    assert "Not a directory" in failing(stages_main, capsys, *task)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_output_that_cannot_be_written_is_one_line(launcher: Launcher) -> None:
    with Path("/dev/full").open("w") as full:
        line = launcher.line("plan", str(launcher.sweep), "--runs", str(launcher.runs))
        answer = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (2, "error: No space left on device\n")


def test_a_cell_that_left_no_word_is_told_though_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("rtshpc.launch.schedule.write_json", full)
    assert "ended without a record" in failure(CellPaths(tmp_path), tmp_path / "log")
