"""Attempts in our own books, and what is made of them beside Slurm's."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from rtshpc.core.config import SiteConfig
from rtshpc.core.paths import CellPaths
from rtshpc.core.records import append_line
from rtshpc.hpc import books
from rtshpc.hpc.accounting import Spent
from rtshpc.launch.usage import (
    Taken,
    by_end,
    charge,
    matched,
    reconcile,
    run_hints,
    stage_hints,
    taken_by,
    together,
    unit_of,
)

GIB = 1 << 30


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CellPaths:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return CellPaths(tmp_path)


def test_an_attempt_notes_what_it_was_given_and_what_it_took(cell: CellPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_MEM_PER_NODE": "2048",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert books.begin(cell, "2026-01-02T03:00:00+00:00") == 1
    (running,) = books.attempts(cell, running=True)
    assert (running.seconds, running.how) == (None, "")
    books.end(cell, 1, "done")
    (done,) = books.attempts(cell)
    assert (done.job, done.gpus, done.cpus, done.memory_bytes, done.how) == ("7_3", 4, 16, 4 * GIB, "done")
    assert done.seconds and done.seconds > 0 and done.peak_bytes and done.peak_bytes > 1 << 20
    assert done.cpu_s and done.cpu_s > 0


def test_jobs_of_an_array_and_tasks_of_a_launch_are_known_to_belong_together(
    cell: CellPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, launch = books.submission()
    assert job.endswith(f":{os.getpid()}") and launch.endswith(f":{os.getppid()}")
    monkeypatch.setenv(books.LAUNCHED, "77:123")  # of Submitit's tasks, each has a parent of its own
    assert books.submission()[1].endswith(":77:123")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert books.submission() == ("12", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert books.submission() == ("7_3", "7")


def test_a_killed_attempt_ended_when_it_last_told_its_progress(cell: CellPaths) -> None:
    started = "2026-01-02T03:00:00+00:00"
    books.begin(cell, started)
    assert books.attempts(cell)[0].seconds == 0
    cell.progress.write_text("{}")
    when = books.attempts(cell)[0]
    os.utime(cell.progress, (0, 1767323400))  # 2026-01-02T03:10:00Z
    (lost,) = books.attempts(cell)
    assert (lost.how, lost.seconds) == (books.LOST, 600)
    assert when.seconds != 600
    books.begin(cell, "2026-01-02T04:00:00+00:00")
    cell.progress.unlink()
    books.end(cell, 2, "done")
    first, second = books.attempts(cell)
    assert (first.how, first.seconds, second.how) == (books.LOST, 600, "done")


def test_books_of_an_older_form_count_their_attempts(cell: CellPaths) -> None:
    for hour in (3, 4):
        append_line(cell.attempts, {"started": f"2026-01-02T0{hour}:00:00+00:00", "host": "n", "pid": 1})
    assert [one.gpus for one in books.attempts(cell)] == [0, 0]
    assert together(taken_by(matched([], books.attempts(cell)), True)).attempts == 2


def test_without_slurm_the_threads_of_an_attempt_are_its_cores(
    cell: CellPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.begin(cell, "2026-01-02T03:00:00+00:00", cores=3)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    books.begin(cell, "2026-01-02T04:00:00+00:00", cores=3)
    assert [one.cpus for one in books.attempts(cell)] == [3, 8]


def test_cores_that_nobody_noted_are_unknown_and_never_none() -> None:
    old, new = Taken("done", False, 3600, 0, 0), Taken("failed", False, 1800, 0, 4)
    assert (together([old, new]).cpu_hours, together([new]).cpu_hours) == (None, 2.0)
    assert (unit_of([old, new]), by_end([old, new])["failed"]) == ("node-hours", 0.5)
    assert (unit_of([new]), by_end([new])["failed"]) == ("core-hours", 2.0)
    assert together([Taken("failed", False, 0, 0, 0)]).cpu_hours == 0  # it took no time on whatever it had
    price = SiteConfig.model_validate({"name": "s", "charge_per_node_hour": 8, "node_cpus": 64})
    assert charge([old, new], price) is None and charge([new], price) == pytest.approx(8 * 4 / 64 / 2)
    cell = {"id": "c", "label": "finetune", "stage": "finetune"}
    found = reconcile([(cell, [(None, noted(3, gpus=0, cpus=0)), (None, noted(4, gpus=0))])])
    assert found["own"] == {"attempts": 2, "gpu_hours": 0.0, "node_hours": 2.0, "cpu_hours": None}
    found = reconcile([(cell, [(spent(), noted(3, cpus=0))])])
    assert found["difference"] == {"gpu_hours": 0.0, "node_hours": 0.0, "cpu_hours": None}


def spent(**other: object) -> Spent:
    facts: dict[str, object] = {
        "job": "7_0",
        "state": "COMPLETED",
        "start": None,
        "elapsed_s": 3600,
        "limit_s": 28800,
        "cpus": 8,
        "gpus": 1,
        "memory_bytes": 32 * GIB,
        "peak_bytes": 9 * GIB,
        "cpu_s": 7200.0,
        "gpu_share": None,
        "nodes": "n1",
    }
    return Spent(**facts | other)  # type: ignore[arg-type]


def test_gpu_hours_are_those_of_all_attempts() -> None:
    taken = taken_by(matched([spent(state="NODE_FAIL", elapsed_s=1800, cpu_s=0.0), spent()], []), True)
    assert together(taken).gpu_hours == 1.5
    assert by_end(taken) == {"done": 1.0, "failed": 0.0, "interrupted": 0.5, "running": 0.0}
    assert together(taken).memory_share == 9 / 32


def test_completed_without_a_record_has_failed() -> None:
    assert taken_by(matched([spent()], []), False)[0].end == "failed"


def test_gpus_that_accounting_does_not_count_are_those_the_task_saw() -> None:
    noted = [books.Attempt("2026-01-02T03:00:00+00:00", "7_0", "n", 2, 8, 60.0, "done", gpu_peak_bytes=5 * GIB)]
    (one,) = taken_by(matched([spent(gpus=0)], noted), True)
    assert (one.gpus, one.gpu_peak_bytes) == (2, 5 * GIB)


def test_shares_are_weighed_by_what_was_held() -> None:
    taken = [
        Taken("done", False, 3600, 1, 4, cpu_s=3600, gpu_share=0.2),
        Taken("done", False, 7200, 2, 4, cpu_s=0, gpu_share=0.7),
    ]
    found = together(taken)
    assert found.cpu_share == pytest.approx(1 / 12)
    assert found.gpu_share == pytest.approx((0.2 + 4 * 0.7) / 5)
    assert together([]).cpu_share is None


def hints(*taken: Taken) -> str:
    return "\n".join(stage_hints("finetune", together(taken), taken))


def test_hints_say_what_to_ask_for() -> None:
    generous = Taken("done", False, 600, 1, 8, 28800, 32 * GIB, 4 * GIB, cpu_s=600, gpu_share=0.3)
    text = hints(generous)
    assert "site.memory_gb: 6 would do" in text
    assert "site.minutes: 20 would let Slurm start it sooner" in text
    assert "site.cpus: 2 would do" in text
    assert "GPUs were busy 30% of the time" in text
    assert "which is close; ask for site.memory_gb: 41" in hints(
        Taken("done", False, 60, 0, 1, None, 32 * GIB, 31 * GIB)
    )
    assert "once an attempt ran out of memory" in hints(Taken("failed", True, 60, 0, 1))
    assert "met its time limit" in hints(Taken("interrupted", False, 600, 0, 1, 600))
    assert hints(Taken("done", False, 6000, 1, 4, 7200, 32 * GIB, 20 * GIB, cpu_s=20000, gpu_share=0.9)) == ""


def test_hints_on_the_run_name_hours_that_were_cut_off_and_gpus_that_idled() -> None:
    taken = [Taken("interrupted", False, 3600, 1, 1), Taken("done", False, 3600, 1, 1)]
    text = "\n".join(run_hints(taken, ["pretrain"], True))
    assert "50% of the GPU-hours were in attempts that were cut off" in text
    assert "pretrain: held GPUs and computed on the CPU" in text
    assert "accounting does not count GPUs" in text
    assert run_hints([Taken("done", False, 3600, 0, 1)], [], False) == []


def noted(hour: int, seconds: float = 3600.0, job: str = "7_0", **other: object) -> books.Attempt:
    facts: dict[str, object] = {
        "started": f"2026-01-02T{hour:02}:00:00+00:00",
        "job": job,
        "host": "n1",
        "gpus": 1,
        "cpus": 8,
    }
    return books.Attempt(**facts | {"seconds": seconds, "how": "done"} | other)  # type: ignore[arg-type]


def at(hour: int, seconds: int = 3600, **other: object) -> Spent:
    """An attempt of sacct's, which tells local time."""
    when = datetime(2026, 1, 2, hour, tzinfo=UTC).astimezone().replace(tzinfo=None)
    return spent(start=when.isoformat(), elapsed_s=seconds, **other)


def test_an_attempt_is_counted_once_by_sacct_where_it_knows_it_and_by_its_own_notes_where_not() -> None:
    pairs = matched([at(3, state="NODE_FAIL"), at(5)], [noted(1, job=""), noted(5), noted(9, job="8_0")])
    assert [(bool(theirs), own and own.started[11:13]) for theirs, own in pairs] == [
        (True, None), (True, "05"), (False, "01"), (False, "09"),
    ]  # fmt: skip
    assert together(taken_by(pairs, True)).gpu_hours == 4.0


@given(
    st.lists(st.tuples(st.sampled_from(["1", "2"]), st.integers(0, 20)), max_size=6),
    st.lists(st.tuples(st.sampled_from(["", "1", "2"]), st.integers(0, 20)), max_size=6),
)
def test_attempts_of_a_job_are_never_counted_twice_and_none_is_lost(
    theirs: list[tuple[str, int]], ours: list[tuple[str, int]]
) -> None:
    told = [noted(hour, job=job) for job, hour in ours]
    pairs = matched([at(hour, job=job) for job, hour in theirs], told)
    for job in ("1", "2"):
        most = max(sum(one[0] == job for one in several) for several in (theirs, ours))
        assert sum(job in (spent and spent.job, own and own.job) for spent, own in pairs) == most
    assert sorted(own.started for _, own in pairs if own) == sorted(one.started for one in told)


CELL = {"id": "a", "label": "pretrain rgb", "stage": "pretrain"}


def test_the_attempts_that_are_named_explain_all_that_the_books_differ_by() -> None:
    pairs = matched(
        [at(1, state="BOOT_FAIL"), at(3, 7200), at(6, 3700, job="8_0"), at(9, 3600, job="9_0")],
        [noted(0, job=""), noted(3, 600.0, how=books.LOST), noted(6, job="8_0"), noted(9, job="9_0")],
    )
    found = reconcile([(CELL, pairs)])
    assert {row["why"] for row in found["attempts"]} == {
        "ended before its task could note anything",
        "was killed: its own notes end at its last word",
        "the job's start and end around its task",
        "was no job of Slurm",
    }
    for key in ("gpu_hours", "node_hours", "cpu_hours"):
        assert sum(row[key] for row in found["attempts"]) == pytest.approx(found["difference"][key], abs=1e-5)
        assert found["difference"][key] == pytest.approx(found["sacct"][key] - found["own"][key], abs=1e-5)
    assert (found["sacct"]["attempts"], found["own"]["attempts"]) == (4, 4)
    assert found["difference"]["gpu_hours"] == pytest.approx(1 + 2 - 600 / 3600 + 100 / 3600 - 1, abs=1e-5)


def test_without_accounting_there_is_nothing_to_reconcile_and_attempts_at_work_are_in_no_sum() -> None:
    found = reconcile([(CELL, matched([], [noted(1), noted(2, seconds=None, how="")]))])  # type: ignore[arg-type]
    assert (found["sacct"], found["difference"], found["attempts"]) == (None, None, [])
    assert found["own"] == {"attempts": 1, "gpu_hours": 1.0, "node_hours": 1.0, "cpu_hours": 8.0}
