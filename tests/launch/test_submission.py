"""What is handed to Slurm, seen by programs of its names that keep what they are given."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from rtshpc.core.errors import RunError
from rtshpc.core.load import load_run
from rtshpc.core.records import read_lines
from rtshpc.launch.plan import Plan, make_plan
from rtshpc.launch.submit import Ledger, prepare, scripts, submit_arrays

from .conftest import Launcher

SBATCH = """#!/bin/sh
number=$(($(ls "$0".seen.* 2>/dev/null | wc -l) + 1))
cp "$1" "$0.seen.$number"
echo "Submitted batch job $((100 + number))"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": "#!/bin/sh\n", "squeue": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def plan_of(launcher: Launcher, *sets: str) -> Plan:
    return make_plan(load_run(launcher.sweep, ["site=lab", *sets]), launcher.runs)


def seen(slurm: Path) -> list[str]:
    """The scripts that sbatch was given, in order."""
    return [(slurm / f"sbatch.seen.{number + 1}").read_text() for number in range(len(list(slurm.glob("*.seen.*"))))]


def test_the_printed_scripts_are_those_that_are_submitted_but_for_the_numbers_of_jobs(
    launcher: Launcher, slurm: Path
) -> None:
    plan = plan_of(launcher)
    printed = [text for _, text in scripts(plan)]
    assert not launcher.runs.exists()
    prepare(plan)
    made = submit_arrays(plan, Ledger(plan.paths))
    assert (len(made.sent), made.left_alone, made.held_back) == (len(plan.todo), (), ())
    submitted = seen(slurm)
    assert len(printed) == len(submitted) < len(plan.todo)
    for mine, theirs in zip(printed, submitted, strict=True):
        assert re.sub(r"JOB(\d+)", lambda found: str(100 + int(found[1])), mine) == theirs
    assert "JOB1" in "".join(printed)


def test_each_submission_is_in_the_ledger_with_its_element_and_log(launcher: Launcher, slurm: Path) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    submit_arrays(plan, Ledger(plan.paths))
    jobs = {entry["label"]: entry["job"] for entry in read_lines(plan.paths.ledger)}
    assert (jobs["preprocess 1/2"], jobs["preprocess 2/2"], jobs["gather"]) == ("101_0", "101_1", "102")
    logs = [Path(entry["log"]).name for entry in read_lines(plan.paths.ledger) if entry["stage"] == "preprocess"]
    assert logs == ["101_0_0_log.out", "101_1_0_log.out"]


def test_no_more_than_the_site_takes_is_submitted_and_the_rest_is_told(launcher: Launcher, slurm: Path) -> None:
    plan = plan_of(launcher, "site.submit_limit=6")
    prepare(plan)
    (slurm / "squeue").write_text('#!/bin/sh\ncase "$*" in *--me*) echo 1; echo 2;; esac\n')
    made = submit_arrays(plan, Ledger(plan.paths))
    assert [cell.stage for cell in made.sent] == ["preprocess", "preprocess", "gather", "pretrain"]
    assert len(made.held_back) == len(plan.todo) - 4
    assert "--array" in seen(slurm)[0] and "--array" not in seen(slurm)[2]


def test_a_dependent_of_a_lost_job_is_submitted_anew_though_slurm_has_not_dropped_it_yet(
    launcher: Launcher, slurm: Path
) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    ledger = Ledger(plan.paths)
    submit_arrays(plan, ledger)
    jobs = {str(entry["label"]): str(entry["job"]) for entry in ledger.entries}
    still = [job for label, job in jobs.items() if label != "pretrain ndvi"]
    (slurm / "squeue").write_text(
        "#!/bin/sh\n" + "".join(f"echo '{job}|PENDING|Priority|N/A|0:00|10:00|'\n" for job in still)
    )
    made = submit_arrays(plan, ledger)
    fused = "finetune rgb+ndvi cross residual pretrained"
    again = {"pretrain ndvi", "evaluate pretrain ndvi", fused, f"evaluate {fused}", "summarise"}
    assert {cell.label for cell in made.sent} == again
    assert {cell.label for cell in made.left_alone} == set(jobs) - again


def test_a_site_without_slurm_has_no_scripts(launcher: Launcher) -> None:
    with pytest.raises(RunError, match="executor = local has no batch scripts"):
        scripts(plan_of(launcher, "site=local"))
