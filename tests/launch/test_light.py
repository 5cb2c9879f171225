from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT, Launcher

CACHED = ("plan", "demo", "--set", "finetune.features=cached")
HEAVY = ("torch", "torchvision", "rasterio", "h5py", "numpy", "cv2", "shapely")

IMPORTS = """
import sys
sys.argv = ["launch", *{arguments!r}]
from rtshpc.launch.__main__ import main
main({arguments!r})
print("LOADED", *[name for name in {heavy!r} if name in sys.modules])
"""


def loaded(*arguments: str, cwd: Path = ROOT) -> str:
    code = IMPORTS.format(arguments=list(arguments), heavy=HEAVY)
    answer = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return next(line for line in answer.stdout.splitlines() if line.startswith("LOADED")).removeprefix("LOADED").strip()


def test_help_answers_in_under_half_a_second(launcher: Launcher) -> None:
    times: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        answer = launcher("--help")
        times.append(time.perf_counter() - began)
        assert answer.returncode == 0
        assert "sweep" in answer.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("arguments", [("--help",), ("sweep", "--help"), ("plan", "demo"), CACHED, ("doctor",)])
def test_the_launcher_imports_neither_tensors_nor_rasters(arguments: tuple[str, ...]) -> None:
    assert loaded(*arguments) == ""


def test_a_mistake_is_one_line_and_exit_code_2(launcher: Launcher) -> None:
    answer = launcher.run("plan", "--set", "finetune.primary=rbg")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr == 'error: --set: finetune.primary = "rbg" is unknown. Known: ndvi, rgb. Did you mean "rgb"?\n'


def test_an_unknown_command_or_stage_or_run_is_a_mistake(launcher: Launcher) -> None:
    assert launcher("swep").returncode == 2
    assert "Did you mean" in launcher.run("plan", "--until", "pretran").stderr
    answer = launcher("status", "nowhere", "--runs", str(launcher.runs))
    assert answer.returncode == 2
    assert "no run there" in answer.stderr


def test_a_tools_arguments_reach_it_and_its_exit_code_comes_back(launcher: Launcher) -> None:
    answer = launcher("params", "no-such-model")
    assert answer.returncode == 2
    assert "no-such-model" in answer.stderr
