"""What becomes of attempts that end without a record."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import BAD_NODE, STOPPED
from rtshpc.core.load import load_run, write_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import append_line, read_json
from rtshpc.hpc import accounting, attempt
from rtshpc.hpc.attempt import OUT_OF_MEMORY, Ended, Verdict, advanced, job_name, judge, last_words, main
from rtshpc.hpc.books import note_bad_node
from rtshpc.hpc.executor import become

SITE = SiteConfig(executor="slurm", minutes=60, warn_seconds=60, max_attempts=3, memory_gb=8)
KILLED, TOLD = 128 + signal.SIGKILL, 128 + signal.SIGTERM


def ended(code: int, seconds: int = 10, number: int = 1, advanced: bool = False, **facts: bool) -> Ended:
    return Ended(code, seconds, number, advanced, **facts)


@pytest.mark.parametrize("code", [STOPPED, TOLD, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2, KILLED])
def test_what_was_told_to_stop_or_killed_is_tried_again_until_the_attempts_are_used_up(code: int) -> None:
    assert judge(ended(code), SITE).again
    assert judge(ended(code, number=2), SITE).again
    last = judge(ended(code, number=3), SITE)
    assert (last.again, last.kind, "max_attempts = 3" in last.why) == (False, "Attempts", True)


@pytest.mark.parametrize("code", [1, 2, 126, 255, 128 + signal.SIGSEGV])
def test_a_task_that_failed_is_not_tried_again_and_named_where_it_could_not_name_itself(code: int) -> None:
    assert judge(ended(code, explained=True), SITE) == Verdict(False)
    verdict = judge(ended(code), SITE)
    assert (verdict.again, verdict.kind) == (False, "Died")
    assert ("SIGSEGV" if code == 139 else f"exit code {code}") in verdict.why


def test_a_task_that_found_its_node_broken_is_tried_elsewhere_as_often_as_any_other() -> None:
    late = SITE.minutes * 60
    assert judge(ended(BAD_NODE, late, explained=True), SITE).again
    assert judge(ended(BAD_NODE, number=3, explained=True), SITE).kind == "Attempts"
    assert not judge(ended(BAD_NODE, explained=True), SITE.model_copy(update={"requeue": "never"})).again


def test_a_time_limit_is_tried_again_only_if_the_checkpoint_advanced() -> None:
    late = SITE.minutes * 60 - 100
    assert judge(ended(STOPPED, late, advanced=True), SITE).again
    stuck = judge(ended(STOPPED, late, advanced=False), SITE)
    assert (stuck.again, stuck.kind) == (False, "TimeLimit")
    assert "site.minutes = 60 is too short" in stuck.why
    assert judge(ended(STOPPED, late - 200, advanced=False), SITE).again


def test_a_job_that_is_over_for_slurm_is_left_so_unless_its_time_limit_ended_it() -> None:
    assert judge(ended(STOPPED, advanced=True, taken=True), SITE) == Verdict(False, "Taken")
    assert judge(ended(STOPPED, advanced=True, taken=True, timed_out=True), SITE).again
    assert judge(ended(TOLD, taken=True, timed_out=True), SITE).kind == "TimeLimit"


def test_memory_that_ran_out_is_named_and_not_tried_again_unchanged() -> None:
    verdict = judge(ended(KILLED, out_of_memory=True), SITE)
    assert (verdict.again, verdict.kind, "site.memory_gb = 8" in verdict.why) == (False, OUT_OF_MEMORY, True)


def test_the_sites_policy_says_what_is_queued_again() -> None:
    never, stopped = (SITE.model_copy(update={"requeue": word}) for word in ("never", "stopped"))
    assert [judge(ended(code), never).again for code in (STOPPED, KILLED)] == [False, False]
    assert [judge(ended(code), stopped).again for code in (STOPPED, KILLED)] == [True, False]


def test_a_checkpoint_or_journal_counts_when_it_is_younger_than_the_attempt(tmp_path: Path) -> None:
    cell = CellPaths(tmp_path)
    assert not advanced(cell)
    cell.checkpoints.mkdir()
    for saved in (cell.last_checkpoint, cell.journal):
        saved.write_text("x")
        os.utime(saved, ns=(10, 10))
    append_line(cell.attempts, {})
    assert not advanced(cell)
    for saved in (cell.last_checkpoint, cell.journal):
        os.utime(saved)
        os.utime(cell.attempts, ns=(20, 20))
        assert advanced(cell)
        os.utime(saved, ns=(10, 10))


def test_only_the_last_attempts_words_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == b""
    log.write_text("INFO - Starting with JobEnvironment(job_id=1)\nfirst\n")
    assert b"first" in last_words(log)
    log.write_text(log.read_text() + "x" * 100_000 + "INFO - Starting with JobEnvironment(job_id=1)\nsecond\n")
    assert last_words(log) == b"job_id=1)\nsecond\n"


def test_an_element_is_never_named_by_a_number_that_could_mean_its_array() -> None:
    assert job_name({"SLURM_JOB_ID": "12"}) == "12"
    element = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_name(element) == "12_3"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Element 3 of a job, in a run folder, with programs by the names of Slurm's; gives the folder of its logs."""
    paths = RunPaths(tmp_path / "run")
    write_run_config(paths.config, load_run("demo", ["site.max_attempts=3"]), {})
    logs = paths.logs / "pretrain"
    logs.mkdir(parents=True)
    paths.cell("aa").root.mkdir(parents=True)
    DelayedSubmission(become, "pretrain", str(paths.root), "aa").dump(logs / "12_3_submitted.pkl")
    programs = {"squeue": "echo RUNNING", "scontrol": f'echo "$@" >> {tmp_path}/asked'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "15"), ("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return logs


def test_the_element_queues_itself_again_and_keeps_the_tasks_exit_code(job: Path, tmp_path: Path) -> None:
    assert main([str(job), str(STOPPED), "5"]) == STOPPED
    assert (tmp_path / "asked").read_text() == "requeue 12_3\n"
    assert not (tmp_path / "run/cells/aa/failure.json").exists()


def test_what_is_not_queued_again_says_why_in_its_cell(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = tmp_path / "run/cells/aa/failure.json"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'slurm_requeue error: disabled' >&2\nexit 1\n")
    assert main([str(job), "137", "5"]) == 137
    assert "could not be queued again: slurm_requeue error: disabled" in read_json(failure)["error"]
    (job / "12_3_0_log.out").write_text("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=15.0.\n")
    main([str(job), "137", "5"])
    assert read_json(failure)["kind"] == OUT_OF_MEMORY
    (job / "12_3_0_log.out").unlink()
    failure.unlink()
    main([str(job), "1", "5"])
    assert "ended with exit code 1" in read_json(failure)["error"]
    failure.write_text('{"error": "the task said so"}')
    main([str(job), "1", "5"])
    assert read_json(failure)["error"] == "the task said so"


def test_of_several_tasks_the_one_that_failed_first_is_judged_whatever_srun_tells_of_the_others(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    paths = RunPaths(tmp_path / "run")
    failure = paths.cell("aa").failure
    failure.write_text('{"error": "the third task said so"}')
    main([str(job), str(KILLED), "5"])
    assert not (tmp_path / "asked").exists() and read_json(failure)["error"] == "the third task said so"
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    note_bad_node(paths, "aa", "n7 is broken: GPU is lost")
    main([str(job), str(KILLED), "5"])
    assert (tmp_path / "asked").read_text() == "requeue 12_3\nupdate JobId=12_3 ExcNodeList=n7\n"
    failure.unlink()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    (job / "12_3_submitted.pkl").rename(job / "12_4_submitted.pkl")
    main([str(job), str(KILLED), "5"])
    assert (tmp_path / "asked").read_text().endswith("requeue 12_4\n")


def test_a_job_that_its_user_cancelled_stays_cancelled_and_is_no_failure(job: Path, tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\necho COMPLETING\n")
    assert main([str(job), str(TOLD), "5"]) == TOLD
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "run/cells/aa/failure.json").exists()


def test_a_controller_that_is_busy_for_a_moment_costs_no_attempt(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "PAUSE_SECONDS", 0.0)
    busy = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/before ] || {{ touch {tmp_path}/before; {busy}; }}\necho RUNNING\n"
    )
    assert main([str(job), str(STOPPED), "5"]) == STOPPED
    assert (tmp_path / "asked").read_text() == "requeue 12_3\n"


def test_an_attempt_of_which_slurm_says_nothing_is_named_and_not_passed_over(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "PAUSE_SECONDS", 0.0)
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert main([str(job), str(STOPPED), "5"]) == STOPPED
    assert not (tmp_path / "asked").exists()
    assert "squeue does not say" in read_json(tmp_path / "run/cells/aa/failure.json")["error"]


def test_programs_of_slurms_that_hang_are_given_up_and_the_exit_code_stays_the_tasks(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "TIMEOUT_SECONDS", 0.2)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 10\n")
    assert main([str(job), str(STOPPED), "5"]) == STOPPED
    assert "scontrol does not answer" in read_json(tmp_path / "run/cells/aa/failure.json")["error"]


def test_a_job_that_slurm_has_forgotten_is_over(programs: Any) -> None:
    programs.says("squeue", "", code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert attempt.taken_away("12") is True


def test_a_job_that_lost_too_many_nodes_does_not_start_its_task(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(SystemExit) as caught:
        become("pretrain", str(job.parents[1]), "aa")
    assert caught.value.code == STOPPED
