"""The house's ceilings: what a reader can hold in the head."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rtshpc"
FILE_LINES, FUNCTION_LINES, STAGE_LINES, DEPTH = 400, 60, 80, 4
MODULES, STAGES = (3, 9), 14

SOURCES = sorted(p for top in ("rtshpc", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py"))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_no_file_is_longer_than_400_lines_and_no_function_than_60(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("folder", sorted({p.parent for p in PACKAGE.rglob("*.py")}), ids=_id)
def test_a_folder_holds_three_to_nine_modules(folder: Path) -> None:
    modules = [p for p in folder.glob("*.py") if not p.name.startswith("__")]
    most = STAGES if folder.name == "stages" else MODULES[1]
    if folder != PACKAGE:
        assert len(modules) <= most, f"{len(modules)} modules"
    assert len(folder.relative_to(PACKAGE).parts) < DEPTH


def test_a_stage_reads_as_a_recipe() -> None:
    from rtshpc.core.cell import STAGES as NAMES

    for name in NAMES:
        path = PACKAGE / "stages" / f"{name}.py"
        tree = ast.parse(path.read_text())
        run = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run")
        assert (run.end_lineno or 0) - run.lineno < STAGE_LINES


def test_locks_hold_hashes_and_no_addresses() -> None:
    for lock in ("default", "cuda12"):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text and "--index" not in text and "--find-links" not in text
    assert not (ROOT / "uv.lock").exists()


def test_unsafe_calls_do_not_occur() -> None:
    banned = ("shell=True", "weights_only=False", "yaml.load(", "os.system(", "pickle.load(")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        found = [word for word in banned if word in text]
        assert not found, f"{_id(path)}: {found}"


def test_every_shell_script_parses() -> None:
    for pattern in ("slurm/*.sbatch", "containers/*.sh", ".ci/run"):
        for path in ROOT.glob(pattern):
            subprocess.run(["bash", "-n", str(path)], check=True)
