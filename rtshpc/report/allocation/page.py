"""What the allocation report says, part by part, and its files: HTML, Markdown, CSV, SVG and PDF."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from rtshpc.core.errors import RunError
from rtshpc.core.paths import AllocationPaths, make_private
from rtshpc.core.records import locked, replacing, write_text
from rtshpc.report import figures
from rtshpc.report.allocation import arms, demand, origin, scaling, storage, texts
from rtshpc.report.allocation.charts import cumulative_chart, scaling_chart
from rtshpc.report.allocation.evidence import Evidence
from rtshpc.report.content import Content, Part
from rtshpc.report.entries import Entry, Table, csv_text, missing, number, places_for, words
from rtshpc.report.page import flat, render_html, render_markdown

NO_PDF = "no PDF: WeasyPrint (extra `pdf`) or the Pango it needs is not installed"

LOCK_SECONDS = 30.0
"""How long a report waits for another one to leave its folder."""


def write_allocation(paths: AllocationPaths, evidence: Evidence) -> list[str]:
    """Write every file of the report; the same records and request give the same bytes.

    Returns:
        Their names relative to the report's folder.

    Raises:
        ConfigError: the request's texts name a field that the programme has not.
        RunError: another process writes its report into the same folder, or it is somebody else's, or for other files.
    """
    make_private(paths.root)
    if any(paths.root.iterdir()) and not (paths.lock.exists() or paths.page.exists()):
        raise RunError(f"{paths.root}: holds other files and no report; give a new or an empty folder (--out DIR)")
    pdf = printer()
    content = build(evidence, pdf is not None)
    page = render_html(content)
    files = {paths.page: page, paths.markdown: render_markdown(content)}
    for part in content.parts:
        files.update((paths.figure(chart.name), chart.standalone()) for chart in part.charts)
        files.update((paths.table(table.name), csv_text(*flat(table))) for table in (*part.tables, *part.folded))
    with locked(paths.lock, LOCK_SECONDS, f"{paths.root}: another process writes its report into this folder"):
        # What an earlier report left, and these records do not give, would be a number without a record.
        tables, charts = paths.table("any").parent, paths.figure("any").parent
        leftovers = (found for folder in (tables, charts) for found in folder.glob(".*.tmp"))
        for old in (*tables.glob("*.csv"), *charts.glob("*.svg"), *leftovers, paths.pdf):
            if old not in files:
                old.unlink(missing_ok=True)
        for path, text in files.items():
            write_text(path, text)
        if pdf is not None:
            with replacing(paths.pdf) as temporary:
                pdf.HTML(string=figures.printed(page), url_fetcher=_refuse).write_pdf(temporary)
    return sorted(str(path.relative_to(paths.root)) for path in (*files, *([paths.pdf] if pdf else [])))


def printer() -> Any | None:
    """WeasyPrint; None where it, or a library of the system that it needs, is not here."""
    try:
        import weasyprint
    except (ImportError, OSError):
        return None
    logging.getLogger("weasyprint").setLevel(logging.ERROR)  # it names every rule for screens that it passes over
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    return weasyprint


def _refuse(url: str, *_: Any, **__: Any) -> Any:
    """The page holds all it shows: nothing is fetched."""
    raise ValueError(f"{url[:60]} is not fetched")


def build(evidence: Evidence, printed: bool = True) -> Content:
    """Everything the report says.

    Args:
        evidence: the runs and the request.
        printed: a PDF is made.
    """
    asked = demand.lines(evidence)
    why = [*scaling.gaps(evidence), *arms.gaps(evidence), *storage.gaps(evidence)]
    why += [*demand.gaps(asked, evidence.site), *origin.gaps(evidence)]
    unwritten = texts.unwritten(evidence)
    no_gpu = _without_gpu(evidence, asked)
    warnings = (
        [f"INCOMPLETE: {len(why)} reason{'' if len(why) == 1 else 's'}, under “What is incomplete”."] if why else []
    )
    if unwritten:
        warnings.append(
            f"{len(unwritten)} field{'' if len(unwritten) == 1 else 's'} of the programme must still be written by a person."
        )
    files = ("allocation.md", *(["allocation.pdf"] if printed else []), "*.csv", "figures/*.svg")
    return Content(
        title=evidence.request.title,
        setting=_setting(evidence),
        dated=origin.last_started(evidence),
        cards=_cards(evidence, asked),
        headlines=(),
        warnings=(*warnings, *(() if printed else (f"{NO_PDF}.",))),
        parts=tuple(_parts(evidence, asked, (why, unwritten, no_gpu))),
        files=files,
        kind=f"{evidence.programme.title} · rtshpc",
    )


def _setting(evidence: Evidence) -> str:
    runs = ", ".join(run.name for run in evidence.runs)
    sites = ", ".join(dict.fromkeys(run.config.site.name for run in evidence.runs))
    return f"Asked of site {evidence.site.name}, on the grounds of run{'' if len(evidence.runs) == 1 else 's'} {runs} at {sites}."


def _cards(evidence: Evidence, asked: tuple[demand.Line, ...]) -> tuple[tuple[str, Entry], ...]:
    found: list[tuple[str, Entry]] = []
    for unit in dict.fromkeys(line.unit for line in asked if line.hours is not None):
        own = [line for line in asked if line.unit == unit and line.hours is not None]
        source = " | ".join(line.source for line in own)
        note = "" if len(own) == len(asked) else f"{len(own)} of {len(asked)} items"
        total = sum(line.hours or 0 for line in own)
        found.append((f"Requested, {unit}", number(total, source, places_for(total), note=note)))
    if not found:
        found.append(("Requested", missing("no item of the request could be worked out")))
    for kind in scaling.KINDS[:2]:
        rows = scaling.of_kind(evidence, kind.name)
        last = max(rows, key=lambda row: row.count, default=None)
        label = f"{kind.name.capitalize()} scaling, efficiency"
        if last is None:
            found.append((label, missing("not run")))
        else:
            note = f"at {last.count} {'GPUs' if last.device == 'cuda' else 'processes on CPUs'}"
            shown = f"{100 * last.efficiency:.1f} %"
            found.append((label, Entry(shown, "number", " | ".join(last.sources), note, last.efficiency)))
    jobs = {(run.name, job.number) for run in evidence.runs for job in run.jobs.values()}
    found.append(("Jobs behind the figures", words(len(jobs))))
    return tuple(found)


def _without_gpu(evidence: Evidence, asked: tuple[demand.Line, ...]) -> list[str]:
    """What the report shows, and has no figure of a GPU for."""
    found = [
        f"{name}: every figure was measured on CPUs"
        for name in (*scaling.without_gpu(evidence), *arms.without_gpu(evidence))
    ]
    if any(line.unit != "GPU-hours" for line in asked if line.cost is not None):
        found.append("T6 The request: items without GPU-hours: their jobs held no GPU")
    if not any(result.record and result.record.environment.get("gpu") for result in evidence.records.done):
        found.append("T0 Provenance: GPU, driver, CUDA")
    return found


def _parts(evidence: Evidence, asked: tuple[demand.Line, ...], notes: tuple[list[str], ...]) -> Iterator[Part]:
    yield from _incomplete(evidence, *notes)
    yield Part("answers", "What the programme asks", sections=texts.answers(evidence))
    yield Part("T0", "T0 Provenance", tables=(origin.origin_table(evidence),))
    yield from _scaling(evidence)
    yield Part(
        "T4", "T4 Memory", arms.memory_words(evidence), arms.memory_tables(evidence), arms.memory_charts(evidence)
    )
    reading = storage.reading_table(evidence)
    yield Part("T5", "T5 Reading and storage", tables=tuple(filter(None, (storage.storage_table(evidence), reading))))
    yield _request(evidence, asked)
    pairs = arms.arms_table(evidence)
    absent = () if pairs else (missing("no cell was trained both on frozen backbones and in full"),)
    yield Part("T7", "T7 Frozen against full", absent, (pairs,) if pairs else ())
    yield Part("formulas", "Appendix: formulas", tables=(texts.formulas(),))
    yield Part("jobs", "Appendix: jobs", tables=(origin.jobs_table(evidence),))
    yield _scripts(evidence)


def _incomplete(evidence: Evidence, why: list[str], unwritten: list[str], no_gpu: list[str]) -> Iterator[Part]:
    refused = origin.refused_table(evidence)
    tables = [
        _listed("incomplete", "Why this report is INCOMPLETE.", why),
        _listed("to_write", "What a person must still write.", unwritten),
        _listed("no_gpu", "What has no figure of a GPU.", no_gpu),
        refused,
    ]
    shown = tuple(table for table in tables if table)
    if shown:
        yield Part("incomplete", "What is incomplete", tables=shown)


def _listed(name: str, caption: str, lines: list[str]) -> Table | None:
    """`Where: what.` in two columns; None without a line."""
    rows = tuple((words(where), words(what)) for where, _, what in (line.partition(": ") for line in lines))
    return Table(name, caption, ("Where", "What"), rows) if rows else None


def _scaling(evidence: Evidence) -> Iterator[Part]:
    found = {kind.name: scaling.scaling_table(evidence, kind) for kind in scaling.KINDS}
    charts = {
        kind.name: scaling_chart(kind, scaling.of_kind(evidence, kind.name))
        for kind in scaling.KINDS
        if found[kind.name]
    }
    for kinds in (scaling.KINDS[:1], scaling.KINDS[1:2], scaling.KINDS[2:]):
        names = [kind.name for kind in kinds]
        yield Part(
            kinds[0].table,
            kinds[0].title,
            tuple(scaling.absent(kind) for kind in kinds if found[kind.name] is None),
            tuple(table for name in names if (table := found[name])),
            tuple(charts[name] for name in names if name in charts),
        )


def _request(evidence: Evidence, asked: tuple[demand.Line, ...]) -> Part:
    periods = demand.period_table(evidence, asked)
    units = list(dict.fromkeys(line.unit for line in asked if line.hours is not None))
    names = demand.period_names(evidence)
    charts = tuple(cumulative_chart(names, demand.by_period(evidence, asked, unit), unit) for unit in units)
    tables = (demand.request_table(evidence, asked), periods, demand.spent_table(evidence))
    return Part("T6", "T6 The request", tables=tuple(filter(None, tables)), charts=charts)


def _scripts(evidence: Evidence) -> Part:
    found = origin.scripts(evidence)
    absent = () if found else (missing("no run that is given has batch scripts: its tasks were no Slurm jobs"),)
    return Part("scripts", "Appendix: batch scripts", absent, preformatted=found)
