"""What `status`, `logs`, `cancel`, `retry` and `usage` make of a run that Slurm had, with and without its programs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RunError
from rtshpc.core.grid import cells
from rtshpc.core.load import load_run, write_run_config
from rtshpc.core.records import Record, append_line, read_json, write_json, write_record
from rtshpc.hpc.executor import Job
from rtshpc.launch.__main__ import main
from rtshpc.launch.commands.status import clock
from rtshpc.launch.jobs import choose, with_more_memory
from rtshpc.launch.plan import Plan, make_plan
from rtshpc.launch.status import find_planned, run_status
from rtshpc.launch.submit import Ledger, prepare
from rtshpc.launch.usage import Taken, charge

from .conftest import Launcher

QUIET = "Invalid job id specified"


@pytest.fixture
def plan(launcher: Launcher, programs: Any) -> Plan:
    """A run of which every cell was submitted: job `1_0` is the first cell's, and so on; Slurm knows none of them."""
    found = make_plan(load_run(launcher.sweep), launcher.runs)
    prepare(found)
    ledger = Ledger(found.paths)
    for number, cell in enumerate(found.cells):
        ledger.add(cell, Job(f"{number + 1}_0", found.paths.logs / cell.stage / f"{number + 1}_0.out", None), "slurm")
    programs.says("squeue", "", 1, QUIET)
    programs.says("sacct", "", 1, "Slurm accounting storage is disabled")
    return found


def job_of(plan: Plan, cell: Cell) -> str:
    return f"{plan.cells.index(cell) + 1}_0"


def stage(plan: Plan, name: str) -> Cell:
    return next(cell for cell in plan.cells if cell.stage == name)


def measured(plan: Plan) -> list[Cell]:
    """The first two of the cells that build on nothing."""
    return [cell for cell in plan.cells if cell.stage == "measure"][:2]


def finish(plan: Plan, cell: Cell) -> None:
    """A valid record of a cell that has no files to lose."""
    facts = {"label": cell.label, "started": "2026-01-02T03:04:05+00:00", "seconds": 62.0}
    version = RESULT_VERSION[cell.stage]
    record = Record(cell=cell.id, stage=cell.stage, result_version=version, results={}, **facts)  # type: ignore[arg-type]
    write_record(plan.paths.cell(cell.id).record, record)


def row(plan: Plan, cell: Cell) -> dict[str, Any]:
    return next(row for row in run_status(plan.paths)["cells"] if row["id"] == cell.id)


def queue(programs: Any, *lines: str) -> None:
    programs.says("squeue", "".join(f"{line}\n" for line in lines))


def test_a_cell_that_waits_says_why_and_when_it_may_start(plan: Plan, programs: Any) -> None:
    cell = stage(plan, "measure")
    queue(programs, f"{job_of(plan, cell)}|PENDING|Priority|2026-01-03T00:00:00|0:00|8:00:00|")
    found = row(plan, cell)
    assert (found["state"], found["reason"]) == ("submitted", "others are ahead of it (Priority)")
    assert (found["start"], found["limit_seconds"]) == ("2026-01-03T00:00:00", 28800)


def test_a_cell_that_runs_says_since_when_where_and_how_well(plan: Plan, programs: Any) -> None:
    cell = stage(plan, "pretrain")
    queue(programs, f"{job_of(plan, cell)}|RUNNING|None|2026-01-03T00:00:00|1:00:00|8:00:00|a5n1")
    folder = plan.paths.cell(cell.id)
    append_line(folder.metrics, {"kind": "val", "epoch": 3, "step": 9, "ap50": 41.25, "ap": 20.0})
    append_line(folder.metrics, {"kind": "train", "epoch": 4, "step": 10, "loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "train", "ep')
    found = row(plan, cell)
    assert (found["state"], found["elapsed_seconds"], found["limit_seconds"]) == ("running", 3600, 28800)
    assert (found["node"], found["metric"]) == ("a5n1", "epoch 4, loss 0.500, AP50 41.2")


def test_completed_without_a_valid_record_is_failed_and_a_record_is_done_whatever_slurm_says(
    plan: Plan, programs: Any
) -> None:
    done, empty = measured(plan)
    queue(
        programs,
        f"{job_of(plan, done)}|FAILED|NonZeroExitCode|2026-01-03T00:00:00|1:00|8:00:00|n",
        f"{job_of(plan, empty)}|COMPLETED|None|2026-01-03T00:00:00|1:00|8:00:00|n",
    )
    finish(plan, done)
    assert row(plan, done)["state"] == "done"
    assert row(plan, empty)["state"] == "failed"
    assert "left no valid record" in row(plan, empty)["error"]
    plan.paths.cell(done.id).record.write_text("{")
    assert row(plan, done)["state"] == "failed"


def test_what_squeue_has_forgotten_sacct_tells(plan: Plan, programs: Any) -> None:
    cell = stage(plan, "measure")
    job = job_of(plan, cell)
    tail = "2026-01-03T00:00:00|60|08:00:00|8|cpu=8|32G|1||00:00:00||n"
    programs.says("sacct", f"{job}|NODE_FAIL|{tail}\n{job}|TIMEOUT|{tail}\n")
    found = row(plan, cell)
    assert (found["state"], found["error"]) == ("failed", "stopped at its time limit (TIMEOUT)")
    assert len(programs.asked("squeue")) == len(programs.asked("sacct")) == 1


def test_without_squeue_and_sacct_the_cells_own_word_counts(plan: Plan, programs: Any) -> None:
    programs.says("squeue", "", 1, "Unable to contact slurm controller")
    first, second = measured(plan)
    finish(plan, first)
    write_json(plan.paths.cell(second.id).failure, {"error": "no such file", "kind": "DataError"})
    facts = run_status(plan.paths)
    states = {one["id"]: one["state"] for one in facts["cells"]}
    assert facts["slurm"] == "silent"
    assert (states[first.id], states[second.id]) == ("done", "failed")
    assert states[stage(plan, "gather").id] == "unknown"


def test_a_job_that_slurm_forgot_ended_without_a_word_if_it_had_begun(plan: Plan) -> None:
    begun, never = measured(plan)
    line = {"started": "2026-01-02T03:04:05+00:00", "host": "n", "pid": 1, "job": job_of(plan, begun)}
    append_line(plan.paths.cell(begun.id).attempts, line)
    assert row(plan, begun)["state"] == "failed"
    assert "ended without a word" in row(plan, begun)["error"]
    assert row(plan, never)["state"] == "waiting"
    assert "which never started" in row(plan, never)["reason"]


def test_what_builds_on_a_failed_cell_is_blocked_also_where_slurm_cancelled_it(plan: Plan, programs: Any) -> None:
    cell, on_it = stage(plan, "gather"), stage(plan, "pretrain")
    finish(plan, stage(plan, "preprocess"))
    write_json(plan.paths.cell(cell.id).failure, {"error": "nothing accepted", "kind": "DataError"})
    queue(programs, f"{job_of(plan, on_it)}|CANCELLED|DependencyNeverSatisfied|N/A|0:00|8:00:00|")
    assert row(plan, cell)["state"] == "failed"
    assert row(plan, on_it)["state"] == "blocked"


def test_a_retry_takes_the_kinds_asked_for_and_what_builds_on_them(plan: Plan, programs: Any) -> None:
    trained = stage(plan, "pretrain")
    small, gone = measured(plan)
    summary = stage(plan, "summarise").id
    finish(plan, stage(plan, "preprocess"))
    finish(plan, stage(plan, "gather"))
    plan.paths.index.write_text(json.dumps({"chips": [1], "shards": {"config.yaml": {}}}))
    (plan.paths.shards / "config.yaml").touch()
    plan.paths.rejected.write_text("[]")
    write_json(plan.paths.cell(trained.id).failure, {"error": "loss is not finite", "kind": "RunError"})
    error = "CUDA out of memory. Tried to allocate 2 GiB"
    write_json(plan.paths.cell(small.id).failure, {"error": error, "kind": "OutOfMemoryError"})
    assert choose(plan.paths, ["oom"]) == {small.id, summary}
    failed = choose(plan.paths, ["failed"])
    assert {small.id, trained.id, summary} < failed and gone.id not in failed
    tuned = [cell for cell in plan.cells if trained.id in cell.needs]
    assert len(tuned) == 2 and all((cell.id in failed) == (cell.stage == "evaluate") for cell in tuned)
    other = next(cell for cell in plan.cells if cell.stage == "pretrain" and cell != trained)
    assert choose(plan.paths, ["missing"]) >= {gone.id, other.id}
    assert small.id not in choose(plan.paths, ["missing"])
    queue(programs, f"{job_of(plan, trained)}|PENDING|Priority|N/A|0:00|8:00:00|")
    assert choose(plan.paths, ["oom"]) == {small.id, trained.id, summary}
    finish(plan, small)
    with pytest.raises(RunError, match="no cell that could run again is oom"):
        choose(plan.paths, ["oom"])


def test_cancel_ends_what_slurm_has_and_names_what_goes_with_it(
    plan: Plan, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, on_it, other = stage(plan, "gather"), stage(plan, "pretrain"), stage(plan, "measure")
    programs.says("scancel", "")
    queue(programs, *(f"{job_of(plan, one)}|PENDING|Dependency|N/A|0:00|8:00:00|" for one in (cell, on_it, other)))
    run = str(plan.paths.root)
    assert main(["cancel", run, cell.id[:6]]) == 0
    out = capsys.readouterr().out
    assert (
        f"job {job_of(plan, cell)} cancelled" in out and f"with it goes pretrain rgb (job {job_of(plan, on_it)})" in out
    )
    assert main(["cancel", run]) == 0
    one, two, three = (job_of(plan, cell) for cell in (cell, on_it, other))
    assert programs.asked("scancel") == [f"{two} {one}", f"{three} {two} {one}"]
    queue(programs)
    states = {row["id"]: row["state"] for row in run_status(plan.paths)["cells"]}
    assert [states[one.id] for one in (cell, on_it, other)] == ["cancelled", "blocked", "cancelled"]
    assert main(["cancel", run, cell.label]) == 0
    assert "Slurm has no job of it" in capsys.readouterr().out


def test_logs_prints_the_last_jobs_log_also_of_a_run_folder_that_was_moved(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = stage(plan, "gather")
    assert main(["logs", str(plan.paths.root), "gather"]) == 1
    assert "no log yet; waiting" in capsys.readouterr().err
    log = plan.paths.logs / "gather" / f"{job_of(plan, cell)}.out"
    log.parent.mkdir()
    log.write_text("all chips\ncounted")
    moved = plan.paths.root.rename(plan.paths.root.with_name("moved $1 'run'"))
    assert main(["logs", str(moved), "gather"]) == 0
    assert capsys.readouterr().out == "all chips\ncounted\n"
    assert main(["logs", "-f", str(moved), "gather"]) == 0
    assert capsys.readouterr().out == "all chips\ncounted"


def test_a_cell_is_named_by_id_beginning_label_or_words_of_it(plan: Plan) -> None:
    cell = stage(plan, "evaluate")
    assert find_planned(plan.paths, cell.id[:8])["id"] == cell.id
    assert find_planned(plan.paths, cell.label)["id"] == cell.id
    with pytest.raises(RunError, match=r"may mean \d+ cells: "):
        find_planned(plan.paths, "evaluate")
    with pytest.raises(RunError, match="no cell gathr here"):
        find_planned(plan.paths, "gathr")


def refused(path: Any, value: Any) -> None:
    """Stands for a folder that cannot be written."""
    raise PermissionError(13, "Permission denied", str(path))


def test_status_keeps_what_a_finished_run_has_cost_and_asks_again_only_for_new_attempts(
    study: Any, programs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = study()
    plan = read_json(paths.plan)
    write_json(paths.plan, plan | {"cells": [cell for cell in plan["cells"] if cell["stage"] == "scale"]})
    programs.says("sacct", "")
    cell = next(paths.cells.iterdir())
    begin = {"started": "2026-01-02T03:00:00+00:00", "job": "", "cpus": 4, "nodes": 2}
    append_line(cell / "attempts.jsonl", begin)
    append_line(cell / "spent.jsonl", {"attempt": 1, "ended": "2026-01-02T04:00:00+00:00", "how": "failed"})
    assert main(["status", str(paths.root)]) == 0
    kept = read_json(paths.usage)
    assert (kept["total"]["node_hours"], kept["total"]["cpu_hours"], kept["by_end"]["failed"]) == (2.0, 4.0, 4.0)
    before = paths.usage.stat().st_mtime_ns
    assert main(["status", str(paths.root)]) == 0
    assert paths.usage.stat().st_mtime_ns == before
    append_line(cell / "attempts.jsonl", begin | {"started": "2026-01-02T05:00:00+00:00"})
    append_line(cell / "spent.jsonl", {"attempt": 2, "ended": "2026-01-02T06:00:00+00:00", "how": "done"})
    assert main(["status", str(paths.root)]) == 0
    assert read_json(paths.usage)["total"]["node_hours"] == 4.0
    paths.usage.unlink()
    monkeypatch.setattr("rtshpc.launch.usage.run.write_json", refused)
    assert main(["status", str(paths.root)]) == main(["usage", str(paths.root)]) == 0
    assert not paths.usage.exists()


def test_usage_adds_up_every_attempt_by_sacct_or_else_by_what_the_tasks_noted(
    plan: Plan, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, other = measured(plan)
    finish(plan, cell)
    noted = {"started": "2026-01-02T03:00:00+00:00", "job": job_of(plan, other), "gpus": 2, "cpus": 4}
    append_line(plan.paths.cell(other.id).attempts, noted)
    append_line(plan.paths.cell(other.id).spent, {"attempt": 1, "ended": "2026-01-02T04:00:00+00:00", "how": "failed"})
    run = str(plan.paths.root)

    def asked() -> dict[str, Any]:
        assert main(["usage", run, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    facts = asked()
    assert (facts["source"], facts["total"]["gpu_hours"], facts["by_end"]["failed"]) == ("own books", 2.0, 2.0)
    tail = "8|cpu=8,gres/gpu=1,mem=32G|32G|1||01:00:00||n\n"
    job = job_of(plan, cell)
    rows = f"{job}|NODE_FAIL|2026-01-02T03:00:00|1800|08:00:00|{tail}{job}|COMPLETED|2026-01-02T03:40:00|3600|08:00:00|{tail}"
    programs.says("sacct", rows)
    facts = asked()
    assert (facts["source"], facts["total"]["gpu_hours"], facts["total"]["attempts"]) == ("both", 3.5, 3)
    assert facts["by_end"] == {"done": 1.0, "failed": 2.0, "interrupted": 0.5, "running": 0.0}
    assert facts["charge"] is None
    priced = plan.config.site.model_copy(update={"charge_per_gpu_hour": 2.0})
    write_run_config(plan.paths.config, plan.config.model_copy(update={"site": priced}), {})
    assert asked()["charge"] == 7.0
    assert main(["usage", run]) == 0
    out = capsys.readouterr().out
    assert "3.50 GPU-hours" in out and "7.00 charged" in out
    silent = plan.config.site.model_copy(update={"accounting": False})
    write_run_config(plan.paths.config, plan.config.model_copy(update={"site": silent}), {})
    questions = len(programs.asked("sacct"))
    assert (asked()["source"], asked()["total"]["gpu_hours"]) == ("both", 3.5)  # usage.json has not forgotten
    plan.paths.usage.unlink()
    assert asked()["source"] == "own books" and len(programs.asked("sacct")) == questions


def test_node_hours_are_charged_by_the_largest_share_of_a_node_that_an_attempt_held() -> None:
    facts = {"charge_per_node_hour": 10, "node_gpus": 4, "node_cpus": 64, "node_memory_gb": 256}
    site = SiteConfig.model_validate(facts)
    whole = Taken(end="done", oom=False, seconds=1800, gpus=8, cpus=16)
    by_memory = Taken(end="failed", oom=True, seconds=3600, gpus=1, cpus=16, memory_bytes=192 << 30)
    by_cores = Taken(end="done", oom=False, seconds=7200, gpus=0, cpus=8)
    assert charge([whole], site) == 10.0
    assert charge([by_memory], site) == 7.5
    assert charge([by_cores, whole], site) == 12.5
    assert charge([whole], SiteConfig()) is None


def test_status_prints_a_line_a_cell_by_stage_and_watch_ends_when_nothing_works(
    plan: Plan, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = stage(plan, "measure")
    finish(plan, cell)
    run = str(plan.paths.root)
    assert main(["status", run, "--watch"]) == 0
    out = capsys.readouterr().out
    assert f"  done       {cell.id}  {cell.label}  1:02" in out
    left = sum(one.stage == "measure" for one in plan.cells) - 1
    assert f"measure: 1 done, {left} waiting" in out
    programs.says("squeue", "", 1, "Unable to contact slurm controller")
    assert main(["status", run]) == 0
    assert "squeue cannot be asked" in capsys.readouterr().out


def test_clocks_are_written_as_slurm_writes_them() -> None:
    assert [clock(value) for value in (0, 59.9, 60, 3661, 90061)] == ["0 s", "59 s", "1:00", "1:01:01", "1-01:01:01"]


def test_a_retry_for_memory_gives_twice_of_it_and_names_the_way_out_for_a_gpus(plan: Plan, programs: Any) -> None:
    small, large = measured(plan)
    job = f"{job_of(plan, small)}|OUT_OF_MEMORY|OutOfMemory|2026-01-03T00:00:00|1:00|8:00:00|n"
    queue(programs, job)
    rows = run_status(plan.paths)["cells"]
    assert [one["oom"] for one in rows if one["id"] == small.id] == ["node"]
    assert with_more_memory(plan.config, rows, plan.paths).site.memory_gb == 2 * plan.config.site.memory_gb
    error = {"error": "CUDA out of memory. Tried to allocate 2 GiB", "kind": "OutOfMemory"}
    write_json(plan.paths.cell(large.id).failure, error)
    with pytest.raises(RunError, match=r"1 cells ran out of a GPU's memory, measure .* at once: .*--site NAME"):
        with_more_memory(plan.config, run_status(plan.paths)["cells"], plan.paths)


def test_no_more_memory_is_asked_for_than_a_node_has(plan: Plan, programs: Any) -> None:
    cell, _ = measured(plan)
    queue(programs, f"{job_of(plan, cell)}|OUT_OF_MEMORY|OutOfMemory|2026-01-03T00:00:00|1:00|8:00:00|n")
    rows = run_status(plan.paths)["cells"]
    given: list[int] = []
    for most in (12, 64):
        site = plan.config.site.model_copy(update={"memory_gb": 8, "node_memory_gb": most})
        given.append(with_more_memory(plan.config.model_copy(update={"site": site}), rows, plan.paths).site.memory_gb)
    assert given == [12, 16]
    whole = plan.config.site.model_copy(update={"memory_gb": 8, "node_memory_gb": 8})
    with pytest.raises(RunError, match=r"site.memory_gb = 8 is all that a node has"):
        with_more_memory(plan.config.model_copy(update={"site": whole}), rows, plan.paths)


def test_a_training_that_ran_out_of_a_gpus_memory_takes_half_as_many_chips_at_once_and_stays_the_same_cell(
    plan: Plan, programs: Any
) -> None:
    cell = stage(plan, "pretrain")
    error = {"error": "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB", "kind": "OutOfMemory"}
    write_json(plan.paths.cell(cell.id).failure, error)
    rows = run_status(plan.paths)["cells"]
    config, taken = plan.config, []
    for _ in range(2):
        config = with_more_memory(config, rows, plan.paths)
        taken.append(config.site.micro_batch)
    batch = config.pretrain.batch_size
    assert taken == [batch // 2, batch // 4] and config.site.memory_gb == plan.config.site.memory_gb
    assert [one.id for one in cells(config, plan.fingerprint)] == [one.id for one in plan.cells]
    with pytest.raises(RunError, match="with one chip on it at once"):
        with_more_memory(
            config.model_copy(update={"site": config.site.model_copy(update={"micro_batch": 1})}), rows, plan.paths
        )
    wide = config.site.model_copy(update={"nodes": 2, "gpus": 2, "micro_batch": 0, "executor": "slurm"})
    with_nodes = with_more_memory(config.model_copy(update={"site": wide}), rows, plan.paths)
    assert with_nodes.site.micro_batch == -(-batch // 4) // 2


def test_a_retry_changes_nothing_but_the_site(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retry", str(plan.paths.root), "--set", "finetune.epochs=9"]) == 2
    assert "retry takes keys of the site alone" in capsys.readouterr().err
