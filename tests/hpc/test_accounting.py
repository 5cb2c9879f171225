"""squeue and sacct as several versions of Slurm answer, and as they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rtshpc.hpc.accounting import ask_books, ask_queue, gpus_of, how_ended, seconds, size, tres, why_waiting

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0:00", 0),
        ("03:04", 184),
        ("03:04.250", 184.25),
        ("1:02:03", 3723),
        ("2-03", 2 * 86400 + 3 * 3600),
        ("2-03:04", 2 * 86400 + 3 * 3600 + 240),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_slurms_times_are_read(text: str, value: float | None) -> None:
    assert seconds(text) == value


def test_slurms_sizes_and_resources_are_read() -> None:
    assert [size(text) for text in ("0", "12K", "1.50G", "2T", "", "x")] == [
        0,
        12288,
        1.5 * GIB,
        2048 * GIB,
        None,
        None,
    ]
    assert size("400", "M") == 400 << 20
    assert tres("billing=8,cpu=8,gres/gpu=2,mem=32G,node=1")["mem"] == 32 * GIB
    assert gpus_of(tres("cpu=8,gres/gpu:a100=2,gres/gpu:a5000=1")) == 3
    assert gpus_of(tres("cpu=8,gres/gpu=2,gres/gpu:a100=2")) == 2
    assert tres("") == {}


def test_one_squeue_tells_of_every_element_what_waits_why_and_since_when(programs: Any) -> None:
    programs.says(
        "squeue",
        "7_0|RUNNING|None|2026-01-02T03:04:05|1:00:01|8:00:00|a5n1\n"
        "7_1|PENDING|Priority|2026-01-03T00:00:00|0:00|8:00:00|\n"
        "7_2|PENDING|Resources|N/A|0:00|UNLIMITED|\n"
        "8|OUT_OF_MEMORY|OutOfMemory|2026-01-02T03:04:05|0:07|10:00|a5n1\n"
        "9_0|RUNNING|None|2026-01-02T03:04:05|1:00|8:00:00|other\n"
        "slurm_load_jobs warning | torn\n",
    )
    found = ask_queue(["7_0", "7_1", "7_2", "8"])
    assert found is not None and set(found) == {"7_0", "7_1", "7_2", "8"}
    assert (found["7_0"].running, found["7_0"].elapsed_s, found["7_0"].limit_s) == (True, 3601, 28800)
    assert (found["7_0"].reason, found["7_0"].nodes) == ("", "a5n1")
    assert (found["7_1"].held, found["7_1"].running, found["7_1"].start) == (True, False, "2026-01-03T00:00:00")
    assert (found["7_2"].start, found["7_2"].limit_s) == (None, None)
    assert not found["8"].held
    assert len(programs.asked("squeue")) == 1 and "--jobs=7,8" in programs.asked("squeue")[0]


@pytest.mark.parametrize(
    ("code", "error", "known"),
    [(1, "Unable to contact slurm controller", False), (1, "Invalid job id specified", True)],
)
def test_a_squeue_that_fails_is_no_answer_but_one_that_forgot_the_jobs_is(
    programs: Any, code: int, error: str, known: bool
) -> None:
    programs.says("squeue", "", code, f"slurm_load_jobs error: {error}")
    assert ask_queue(["7"]) == ({} if known else None)


def test_without_slurm_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_queue(["7"]) is None and ask_books(["7"]) is None
    assert ask_queue([]) == {} and ask_books([]) == []


SACCT = """\
7_0|NODE_FAIL|2026-01-02T03:00:00|600|08:00:00|8|billing=8,cpu=8,gres/gpu=1,mem=32G,node=1|32G|1||00:00:00||a5n1
7_0|COMPLETED|2026-01-02T03:20:00|3600|08:00:00|8|billing=8,cpu=8,gres/gpu=1,mem=32G,node=1|32G|1||02:00:00||a5n2
7_0.batch|COMPLETED|2026-01-02T03:20:00|3600||8|cpu=8,mem=32G,node=1||1|9437184K|02:00:00|cpu=02:00:00,gres/gpumem=9G,gres/gpuutil=55|a5n2
7_0.extern|COMPLETED|2026-01-02T03:20:00|3600||8|cpu=8||1|100K|00:00:00||a5n2
7_1|CANCELLED by 0|2026-01-02T03:00:00|5|UNLIMITED|2||4Gc|1||00:01.500||a5n1
7_[2-3%2]|PENDING|Unknown|0|08:00:00|0|||1||00:00:00||None assigned
6_0|COMPLETED|2026-01-02T03:00:00|5|10:00|2||1Gn|2||00:01||another
torn line
"""


def test_sacct_tells_every_attempt_with_what_its_steps_used(programs: Any) -> None:
    programs.says("sacct", SACCT)
    found = ask_books(["7_0", "7_1", "7_2"])
    assert found is not None
    lost, done, cancelled = found
    assert (lost.state, lost.elapsed_s, lost.gpus, lost.peak_bytes) == ("NODE_FAIL", 600, 1, None)
    assert (done.state, done.elapsed_s, done.cpu_s, done.limit_s) == ("COMPLETED", 3600, 7200, 28800)
    assert (done.memory_bytes, done.peak_bytes, done.gpu_share) == (32 * GIB, 9 * GIB, 0.55)
    assert (cancelled.state, cancelled.memory_bytes, cancelled.limit_s) == ("CANCELLED", 8 * GIB, None)
    asked = programs.asked("sacct")
    assert len(asked) == 1 and "--duplicates" in asked[0] and asked[0].endswith("--jobs=7")


def test_a_cluster_without_accounting_is_no_answer(programs: Any) -> None:
    programs.says("sacct", "", 1, "Slurm accounting storage is disabled")
    assert ask_books(["7"]) is None


def test_every_reason_is_told_in_words_with_slurms_own_word_behind() -> None:
    assert why_waiting("Priority") == "others are ahead of it (Priority)"
    assert why_waiting("AssocGrpGRESMinutes") == "the account's or QOS's budget of hours is spent (AssocGrpGRESMinutes)"
    assert why_waiting("QOSMaxGRESPerUser").startswith("you have as many jobs or GPUs")
    assert why_waiting("QOSGrpGRES").startswith("your group has as many")
    assert why_waiting("ReqNodeNotAvail, Reserved for maintenance").endswith("(ReqNodeNotAvail)")
    assert why_waiting("SomethingNew") == "SomethingNew"
    assert how_ended("TIMEOUT") == "stopped at its time limit (TIMEOUT)"
    assert how_ended("WEIRD") == "ended as WEIRD"
