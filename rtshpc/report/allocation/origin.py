"""T0: with what, where and when every figure was made, and the jobs and scripts that made it."""

from __future__ import annotations

from collections.abc import Iterable

from rtshpc.report.allocation.evidence import NO_USAGE, Evidence, Run
from rtshpc.report.entries import Entry, Table, code, words

_KEYS = (
    ("GPU", "gpu", "none was used"),
    ("driver", "driver", "none was used"),
    ("CUDA", "cuda", "none was used"),
    ("torch", "torch", "not recorded"),
    ("Python", "python", "not recorded"),
    ("processor", "cpu", "not recorded"),
    ("system", "system", "not recorded"),
    ("image", "image.path", "none"),
    ("image, SHA-256", "image.sha256", "–"),
    ("code of the image", "image.commit", "–"),
    ("code in place of the image's", "image.dev_bind", "–"),
)
"""What the records' environments tell: (name for people, dotted key, what to say where no record has it)."""


def origin_table(evidence: Evidence) -> Table:
    """One column a run."""
    runs = evidence.runs
    body: list[tuple[Entry, ...]] = [(words("site"), *(words(run.config.site.name) for run in runs))]
    body.append((words("partition"), *(words(run.config.site.partition or "the cluster's default") for run in runs)))
    body.append((words("executor"), *(words(run.config.site.executor) for run in runs)))
    body.append((words("a training job"), *(words(_shape(run)) for run in runs)))
    for name, key, without in _KEYS:
        body.append((words(name), *(distinct(run, key, without) for run in runs)))
    commits = [_commits(run) for run in runs]
    body.append((words("commit"), *(code(", ".join(own)) if own else words("not recorded") for own in commits)))
    body.append((words("uncommitted changes"), *(words(_dirty(own)) for own in commits)))
    body.append((words("data set"), *(words(run.config.data.name) for run in runs)))
    prints = [str(run.provenance.get("data_fingerprint") or "") for run in runs]
    body.append((words("data fingerprint"), *(code(one) if one else words("not recorded") for one in prints)))
    body.append((words("started, UTC"), *(words(_span(run)) for run in runs)))
    body.append((words("jobs"), *(words(_jobs(run)) for run in runs)))
    body.append((words("batch scripts"), *(words(str(len(run.scripts)) if run.scripts else "none") for run in runs)))
    caption = "Provenance, from the runs' configs and the environments of their records."
    return Table("T0", caption, ("What", *(run.name for run in runs)), tuple(body))


def _shape(run: Run) -> str:
    site = run.config.site
    held = f"{site.gpus} GPU{'' if site.gpus == 1 else 's'} a node" if site.gpus else "no GPU"
    return f"{site.nodes} node{'' if site.nodes == 1 else 's'}, {held}, {site.cpus} core{'' if site.cpus == 1 else 's'} a task, {site.memory_gb} GB a task"


def distinct(run: Run, key: str, without: str) -> Entry:
    """Every value that the records of a run have under a key of their environment, with its number of cells if there are several."""
    counts: dict[str, int] = {}
    for result in run.records.done:
        value: object = result.record.environment if result.record else None
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, ""):
            counts[str(value)] = counts.get(str(value), 0) + 1
    if not counts:
        return words(without)
    if len(counts) == 1:
        return code(next(iter(counts)))
    return code("; ".join(f"{value} ({count} cells)" for value, count in sorted(counts.items())))


def _commits(run: Run) -> list[str]:
    found = {str(result.record.environment.get("commit") or "") for result in run.records.done if result.record}
    return sorted(found - {""})


def _dirty(commits: Iterable[str]) -> str:
    known = list(commits)
    changed = [commit for commit in known if commit.endswith("-dirty")]
    if not known:
        return "not known"
    return f"yes: {', '.join(map(_short, changed))}" if changed else "none"


def _short(commit: str) -> str:
    """As much of a commit as names it."""
    digest, dash, rest = commit.partition("-")
    return f"{digest[:12]}{dash}{rest}"


def _span(run: Run) -> str:
    days = sorted(result.record.started[:19].replace("T", " ") for result in run.records.done if result.record)
    return f"{days[0]} to {days[-1]}" if days else "no record"


def _jobs(run: Run) -> str:
    return f"{len({job.number for job in run.jobs.values()})}, see “Jobs”"


def jobs_table(evidence: Evidence) -> Table:
    """Every cell with a record: its job, node, attempts and files."""
    body: list[tuple[Entry, ...]] = []
    for run in evidence.runs:
        for result in run.records.done:
            job = run.jobs.get(result.cell.id)
            assert result.record is not None
            body.append(
                (
                    words(run.name),
                    words(result.cell.label),
                    code(result.cell.id, result.source),
                    code(job.number if job else "by hand"),
                    words(job.host if job else result.record.environment.get("host")),
                    words(result.record.started[:19].replace("T", " "), source=f"{result.source}#started"),
                    words(job.attempts if job else result.record.attempts),
                )
            )
    columns = ("Run", "What", "Cell", "Job", "Node", "Started, UTC", "Attempts")
    return Table(
        "jobs",
        "Jobs behind the figures, one row a cell; its record is cells/CELL/record.json of the run.",
        columns,
        tuple(body),
    )


def refused_table(evidence: Evidence) -> Table | None:
    """Records that no report may use; None where there is none."""
    rows = tuple((code(source), words(why)) for source, why in evidence.refused)
    return Table("refused", "Records that are not used, and why.", ("Record", "Why"), rows) if rows else None


def scripts(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """(title, text) of every batch script; one that several jobs shared is shown once."""
    found: dict[str, list[str]] = {}
    for run in evidence.runs:
        for name, text in run.scripts:
            found.setdefault(text, []).append(f"{run.name}/{name}")
    return tuple((", ".join(names), text) for text, names in found.items())


def last_started(evidence: Evidence) -> str:
    """When the last cell was started; empty where there is no record."""
    days = [result.record.started for run in evidence.runs for result in run.records.done if result.record]
    return max(days, default="")[:19].replace("T", " ")


def gaps(evidence: Evidence) -> list[str]:
    """Why T0 is incomplete, and what stands against the figures."""
    found: list[str] = []
    for run in evidence.runs:
        changed = [commit for commit in _commits(run) if commit.endswith("-dirty")]
        if changed:
            found.append(
                f"T0: run {run.name} has records of code with uncommitted changes: {', '.join(map(_short, changed))}."
            )
        if len(_commits(run)) > 1:
            found.append(f"T0: run {run.name} has records of {len(_commits(run))} versions of the code.")
    prints = {str(run.provenance.get("data_fingerprint") or "") for run in evidence.runs} - {""}
    if len(prints) > 1:
        found.append(f"T0: mixed inputs: the runs read {len(prints)} different data sets.")
    gpus = {str(one.record.environment.get("gpu") or "") for one in evidence.records.done if one.record} - {""}
    if len(gpus) > 1:
        found.append(f"T0: mixed GPU models: {', '.join(sorted(gpus))}.")
    found += [line for run in evidence.runs for line in _open(run)]
    found += [f"{source} is not used: {why}." for source, why in evidence.refused]
    return found


def _open(run: Run) -> list[str]:
    """What a run has not got to (yet)."""
    undone, planned = run.undone
    told: list[str] = []
    if not run.records.done:
        told.append(f"T0: run {run.name} holds no record that can be used.")
    elif undone:
        told.append(
            f"T0: {undone} of the {planned} cells that run {run.name} has planned have no record that can be used."
        )
    return told if run.usage else [*told, f"T6: run {run.name}: {NO_USAGE}."]
