"""A run that is prepared here and whose tasks somebody runs with sbatch or by hand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.launch.__main__ import main
from rtshpc.launch.launch import by_hand
from rtshpc.launch.plan import make_plan
from rtshpc.stages.runner import find_cell

from .conftest import ROOT, Launcher


def test_a_prepared_run_has_submitted_nothing_and_every_array_element_is_one_of_its_cells(launcher: Launcher) -> None:
    answer = launcher.run("sweep", "--prepare")
    assert answer.returncode == 0, answer.stderr
    plan = make_plan(load_run(launcher.sweep), launcher.runs)
    assert answer.stdout.splitlines() == by_hand(plan)
    assert not plan.paths.ledger.exists()
    found: list[str] = []
    for line in answer.stdout.splitlines()[:-1]:
        run, stage, sbatch, array, template = shlex.split(line)
        assert sbatch == "sbatch" and (ROOT / template).is_file()
        last = int(array.removeprefix("--array=0-").partition("%")[0])
        paths, name = RunPaths(Path(run.removeprefix("RTSHPC_RUN="))), stage.removeprefix("RTSHPC_STAGE=")
        found += [find_cell(paths, name, str(number)) for number in range(last + 1)]
    assert found == [cell.id for cell in plan.cells if cell.stage != "summarise"]


@pytest.mark.parametrize("template", sorted(ROOT.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_a_template_is_clean_and_says_what_it_does_needs_and_how_safe_it_is_to_submit_again(template: Path) -> None:
    text = template.read_text()
    first = text.index("\nset -euo pipefail")
    for word in ("# What:  ", "# Needs: ", "# Again: ", "# Use:   "):
        assert 0 < text.index(word) < text.index("#SBATCH")
    assert "#SBATCH" not in text[first:]  # sbatch would pass over it
    for name in re.findall(r"^(RTSHPC_\w+)=", text, re.MULTILINE):
        assert f'{name}="${{{name}:-' in text
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian: apt-get install shellcheck)")
    subprocess.run(["shellcheck", str(template)], check=True)


def test_a_run_folder_with_spaces_quotes_and_dollars_is_one_word_of_the_lines(launcher: Launcher) -> None:
    folder = launcher.folder / "my $HOME 'run' \"x\""
    plan = make_plan(load_run(launcher.sweep), folder)
    for line in by_hand(plan):
        words = [word.removeprefix("RTSHPC_RUN=") for word in shlex.split(line)]
        assert str(folder / "small") in words


def test_lines_typed_outside_of_a_clone_name_the_templates_that_came_with_the_code(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(load_run(launcher.sweep), launcher.runs)
    monkeypatch.chdir(launcher.folder)
    templates = [Path(shlex.split(line)[-1]) for line in by_hand(plan)[:-1]]
    assert templates and all(template.is_file() for template in templates)


@pytest.mark.parametrize(("held", "gpus"), [({"SLURM_GPUS_ON_NODE": "2"}, 2), ({}, 0)])
def test_a_sweep_inside_one_job_computes_on_the_gpus_of_that_job(
    held: dict[str, str], gpus: int, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "RTSHPC_PYTHON": str(python), **held}
    line = ["bash", str(ROOT / "slurm/sweep.sbatch")]
    told = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    sets = [word for word in told.split() if word.startswith("site.")]
    assert load_run("demo", sets, "local").site.gpus == gpus


def test_a_plan_is_printed_in_one_form(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(launcher.sweep), "--runs", str(launcher.runs), "--json", "--sbatch"]) == 2
    said = capsys.readouterr()
    assert (said.out, "give one of them" in said.err) == ("", True)
