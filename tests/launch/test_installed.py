"""Without the libraries of the tasks, and from a wheel outside a clone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_lines

from .conftest import ROOT, Launcher

ABSENT = ("torch", "torchvision", "rasterio", "h5py", "numpy", "cv2", "shapely")


def needed(name: str, found: set[str]) -> set[str]:
    """Distributions that `name` needs without extras, and theirs."""
    for line in importlib.metadata.requires(name) or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if "extra" in marker or match is None or match[0].lower() in found:
            continue
        try:
            importlib.metadata.distribution(match[0])
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(match[0].lower())
        needed(match[0], found)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with the base install's libraries alone."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    for name in needed("rtshpc", set()):
        for file in importlib.metadata.files(name) or []:
            top = Path(str(file)).parts[0]
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top not in ("..", "bin", "__pycache__") and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return str(folder / "bin" / "python")


def test_the_base_install_holds_no_tensors_and_no_rasters(base: str) -> None:
    code = f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])"
    answer = subprocess.run([base, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_base_install_plans_submits_and_tells_the_status(base: str, tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, base)
    plan = launcher.run("plan")
    assert (plan.returncode, plan.stderr) == (0, "")
    sweep = launcher.run("sweep", "--until", "preprocess", "--set", "data.shard.tasks=1")
    assert sweep.returncode == 1
    assert "is not installed" in sweep.stdout
    assert 'pip install "rtshpc[tasks]"' in sweep.stdout
    assert [entry["stage"] for entry in read_lines(RunPaths(launcher.runs / "small").ledger)] == ["preprocess"]
    status = launcher("status", "small", "--runs", str(launcher.runs))
    assert status.returncode == 0
    assert "preprocess: 1 failed" in status.stdout and "is not installed" in status.stdout
    assert launcher("doctor").returncode == 0
    check = launcher("check", "some.tif")
    assert (check.returncode, check.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_wheel_outside_a_clone_finds_configs_and_templates(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(next(tmp_path.glob("*.whl")))], check=True, capture_output=True, timeout=240)
    outside = tmp_path / "outside"
    outside.mkdir()

    def python(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(target)}
        line = [sys.executable, *arguments]
        return subprocess.run(
            line, cwd=outside, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    assert python("-c", "import rtshpc; print(rtshpc.__file__)").startswith(str(target))
    assert "pretrain: 3 cells" in python("-m", "rtshpc.launch", "plan", "demo")
    code = "from rtshpc.core.load import shipped_folder as f; print(f('configs'), f('slurm'))"
    assert all(Path(folder).is_dir() for folder in python("-c", code).split())
    assert not list(outside.iterdir())
