"""T6: what is asked for. What one job costs, and how often it had to run again, is taken from the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rtshpc.core.config import SiteConfig
from rtshpc.core.sizing.request import Item
from rtshpc.hpc.site import node_share, request
from rtshpc.report.allocation.evidence import NO_USAGE, SHOWN_JOBS, Evidence
from rtshpc.report.allocation.scaling import by_series, of_kind
from rtshpc.report.collect import dig
from rtshpc.report.entries import Entry, Table, missing, number, places_for, words

UNITS = {"GPU-hours": "gpu_hours", "core-hours": "cpu_hours", "node-hours": "node_hours"}
"""What is counted -> its key in usage.json; the first that a job held any of."""


@dataclass(frozen=True)
class Used:
    """What usage.json tells of one cell.

    Attributes:
        site: where it ran.
        gpu: name of the GPU, as its record spells it; empty without one.
        done: it has a record.
        clean: it was done in one attempt.
        hours: by unit; None where its attempts do not tell them.
    """

    source: str
    site: SiteConfig
    gpu: str
    done: bool
    clean: bool
    hours: Mapping[str, float | None]


@dataclass(frozen=True)
class Line:
    """One line of the request, worked out.

    Attributes:
        unit: one of UNITS.
        cost: hours of one job in one attempt, mean; None where no record tells.
        clean: jobs it is the mean of.
        rerun: hours of all attempts of all these jobs / (cost x jobs that were done).
        growth: efficiency at the measured count / efficiency at the asked one; None where it was not measured.
        worth: hours at the asked site that one measured hour stands for; None where its file does not say.
        price: of an hour, in the site's unit; None where its file tells none.
        reason: why it cannot be worked out; empty where it can.
        extrapolated: how it goes beyond what was measured; empty where it does not.
    """

    item: Item
    unit: str
    used: tuple[Used, ...]
    cost: float | None
    clean: int
    rerun: float
    growth: float | None
    worth: float | None
    price: float | None
    reason: str = ""
    extrapolated: tuple[str, ...] = ()

    @property
    def hours(self) -> float | None:
        """The subtotal, in `unit` at the asked site."""
        if self.cost is None or self.growth is None or self.worth is None:
            return None
        return self.cost * self.rerun * self.growth * self.worth * self.item.times * self.item.runs

    @property
    def source(self) -> str:
        """The figures of usage.json that it rests on."""
        return " | ".join(f"{one.source}.{UNITS[self.unit]}" for one in self.used)


def lines(evidence: Evidence) -> tuple[Line, ...]:
    """Every line of the request."""
    return tuple(_line(evidence, item) for item in evidence.request.items)


def _line(evidence: Evidence, item: Item) -> Line:
    used = tuple(_used(evidence, item))
    unit, hours = _counted(used)
    done = sum(one.done for one in used)
    if not done or not sum(hours):
        return Line(item, unit, used, None, 0, 1.0, None, None, None, _why_not(evidence, item, used))
    whole = [hour for one, hour in zip(used, hours, strict=True) if one.clean]
    cost, rerun = cost_and_rerun(hours, whole, done)
    growth, told = _growth(evidence, item, used)
    worth, foreign = _worth(evidence.site, used)
    return Line(
        item,
        unit,
        used,
        cost,
        len(whole),
        rerun,
        growth,
        worth,
        _price(evidence.site, item.stage, unit),
        "; ".join(one for one in (told if growth is None else "", foreign if worth is None else "") if one),
        _beyond(item, told if growth is not None else "", foreign if worth is not None else ""),
    )


def _counted(used: Sequence[Used]) -> tuple[str, list[float]]:
    """The first unit that a job held any of and that none leaves open, and the hours of each in it."""
    for unit in UNITS:
        hours = [one.hours[unit] for one in used]
        known = [hour for hour in hours if hour is not None]
        if any(known) and len(known) == len(hours):
            return unit, known
    return next(iter(UNITS)), [0.0] * len(used)


def cost_and_rerun(hours: Sequence[float], whole: Sequence[float], done: int) -> tuple[float, float]:
    """What one job costs in one attempt, h, and by how much its reruns and failures multiply that.

    Args:
        hours: of all attempts of each job, those that were never done included.
        whole: of them, of jobs that were done in one attempt. Where there are none nobody knows what a job costs alone:
            then its reruns are in the cost.
        done: jobs that were done, at least one.
    """
    cost = fmean(whole) if any(whole) else sum(hours) / done
    return cost, sum(hours) / (cost * done)


def _used(evidence: Evidence, item: Item) -> list[Used]:
    """Cells that an item stands for."""
    found: list[Used] = []
    for run in evidence.runs:
        if item.run not in ("", run.name):
            continue
        for source, facts in run.used():
            result = run.records.by_id.get(str(facts.get("id")))
            if result is None or result.cell.stage != item.stage:
                continue
            fits = item.modalities in ((), result.cell.modalities) and item.arm in ("", result.cell.arm)
            if fits:
                done, record = result.record is not None, result.record
                gpu = str((record.environment.get("gpu") if record else None) or "")
                hours = {unit: _hours(facts, key) for unit, key in UNITS.items()}
                clean = done and facts.get("attempts") == 1
                found.append(Used(source, run.config.site, gpu, done, clean, hours))
    return found


def _hours(facts: Mapping[str, Any], key: str) -> float | None:
    value = facts.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _why_not(evidence: Evidence, item: Item, used: tuple[Used, ...]) -> str:
    asked = [run for run in evidence.runs if item.run in ("", run.name)]
    if not used and all(run.usage is None for run in asked):
        return NO_USAGE
    if not used:
        return f"no run that is given has tried a cell of stage {item.stage} like this"
    if not any(one.done for one in used):
        return "none of its cells has a record"
    return "its attempts do not tell the cores or GPUs they held"


def _growth(evidence: Evidence, item: Item, used: tuple[Used, ...]) -> tuple[float | None, str]:
    """Efficiency at the count that was measured over that at the asked one, and what to say of it."""
    jobs = [request(one.site, item.stage) for one in used if one.done]
    measured = {job.nodes * max(1, job.gpus, job.tasks) for job in jobs}
    if item.gpus == 0 or measured == {item.gpus}:
        return 1.0, ""
    series = [{row.count: row for row in own} for own in by_series(of_kind(evidence, "strong"))]
    rows = next((own for own in series if measured | {item.gpus} <= set(own)), None)
    if len(measured) != 1 or rows is None:
        return None, f"{item.gpus} GPUs a job: T1 has no point at that count and at the one that was measured"
    return rows[measured.pop()].efficiency / rows[item.gpus].efficiency, ""


def _worth(site: SiteConfig, used: tuple[Used, ...]) -> tuple[float | None, str]:
    """What an hour on the measured GPU stands for at the asked site, by that site's own file."""
    foreign = sorted({one.gpu or "a CPU" for one in used if one.site.name != site.name and one.done})
    if not foreign:
        return 1.0, ""
    rates = {site.gpu_equivalents.get(name) for name in foreign}
    if len(rates) != 1 or None in rates:
        return None, f"measured on {', '.join(foreign)} of another site, and {site.name} names no gpu_equivalents of it"
    return rates.pop(), f"measured on {', '.join(foreign)} of another site, by {site.name}'s gpu_equivalents"


def _beyond(item: Item, *told: str) -> tuple[str, ...]:
    found = [one for one in told if one]
    if item.times != 1:
        found.append(f"a job of {item.times:g} times the measured work")
    return tuple(found)


def _price(site: SiteConfig, stage: str, unit: str) -> float | None:
    """What an hour of `unit` costs by the site's file."""
    if site.charge_per_gpu_hour:
        return site.charge_per_gpu_hour if unit == "GPU-hours" else None
    if not site.charge_per_node_hour:
        return None
    asked = request(site, stage)
    cpus = asked.cpus * asked.tasks
    held = {"GPU-hours": asked.gpus, "core-hours": cpus, "node-hours": 1}[unit]
    return site.charge_per_node_hour * node_share(site, asked.gpus, cpus, asked.memory_gb) / held if held else None


def unit_of(site: SiteConfig) -> str:
    """What charges are counted in."""
    return site.charge_unit or "the site's units"


def request_table(evidence: Evidence, asked: tuple[Line, ...]) -> Table:
    """One row a line of the request, and the sums."""
    site = evidence.site
    body = [_row(line, site) for line in asked]
    for unit in dict.fromkeys(line.unit for line in asked if line.hours is not None):
        own = [line for line in asked if line.unit == unit and line.hours is not None]
        source = " | ".join(line.source for line in own)
        total = _amount(sum(line.hours or 0 for line in own), source, note=unit)
        blank = [words("")] * 6
        body.append((words("Sum"), *blank, total, _charge(own, site, source)))
    notes = (
        "Cost of a job: mean over those that were done in one attempt. Rerun factor: hours of all attempts, failed and "
        "interrupted ones too, over that cost times the jobs that were done; so cost times factor is what a result has "
        "taken in fact. Subtotal = cost x factor x jobs x work (x growth with the GPUs of a job x worth of another GPU).",
        f"Prices and equivalences of GPUs are the site's ({site.name}), from its file."
        if site.charge_per_gpu_hour or site.charge_per_node_hour
        else f"The file of site {site.name} names no price, so no charge is given.",
    )
    columns = (
        "Item",
        "Stage",
        "Cost of a job, h",
        "Jobs",
        "Work",
        "Rerun factor",
        "Growth",
        "Subtotal, h",
        f"Charge, {unit_of(site)}",
    )
    caption = "The request. Hours are GPU-hours; core-hours (or node-hours) where jobs held no GPU."
    return evidence.traced(Table("T6", caption, columns, tuple(body), notes))


def _row(line: Line, site: SiteConfig) -> tuple[Entry, ...]:
    item, source = line.item, line.source
    head = (words(item.name, note=item.why), words(item.stage))
    if line.cost is None:
        return (*head, missing(line.reason), *_asked(item), words(""), words(""), missing(""), missing(""))
    of = f"{line.unit}, mean of {line.clean}" if line.clean else f"{line.unit}, reruns included"
    growth = number(line.growth, source, 3, reason="not measured") if item.gpus else words("–")
    if line.worth not in (None, 1.0):
        growth = number((line.growth or 1) * (line.worth or 1), source, 3, note="with the worth of another GPU")
    return (
        *head,
        number(line.cost, source, 4, note=of),
        *_asked(item),
        number(line.rerun, source, 3),
        growth,
        _amount(line.hours, source, reason=line.reason),
        _charge([line], site, source),
    )


def _amount(value: float | None, source: str, note: str = "", reason: str = "") -> Entry:
    """Hours or a charge, four figures of it."""
    return number(value, source, places_for(value or 0), note=note, reason=reason)


def _asked(item: Item) -> tuple[Entry, ...]:
    plan = "request.yaml"
    return number(item.runs, plan), words(f"×{item.times:g}")


def _charge(own: list[Line], site: SiteConfig, source: str) -> Entry:
    amounts = [line.hours * line.price for line in own if line.hours is not None and line.price is not None]
    if len(amounts) < len(own) or not amounts:
        return missing(
            f"its file has no price for {own[0].unit}" if own[0].price is None else "a subtotal is not known"
        )
    return _amount(sum(amounts), source)


def by_period(evidence: Evidence, asked: tuple[Line, ...], unit: str) -> list[float]:
    """Hours of `unit` in each period."""
    sums = [0.0] * evidence.request.periods
    for line in asked:
        weights = line.item.periods or (1.0,) * len(sums)
        if line.unit == unit and line.hours is not None:
            sums = [held + line.hours * weight / sum(weights) for held, weight in zip(sums, weights, strict=True)]
    return sums


def period_names(evidence: Evidence) -> list[str]:
    """`2027-01 to 2027-03`, or `period 1` where no start is named."""
    asked, names = evidence.request, list[str]()
    for place in range(asked.periods):
        if not asked.start:
            names.append(f"period {place + 1}")
            continue
        year, month = map(int, asked.start.split("-"))
        first = year * 12 + month - 1 + place * asked.period_months
        last = first + asked.period_months - 1
        names.append(" to ".join(dict.fromkeys(f"{at // 12}-{at % 12 + 1:02d}" for at in (first, last))))
    return names


def period_table(evidence: Evidence, asked: tuple[Line, ...]) -> Table | None:
    """Hours and charge by period, and their sums up to its end; None where nothing could be worked out."""
    known = [line for line in asked if line.hours is not None]
    if not known:
        return None
    source, names = " | ".join(line.source for line in known), period_names(evidence)
    units = list(dict.fromkeys(line.unit for line in known))
    columns, found = ["Period"], [[words(name)] for name in names]
    for unit in units:
        total = 0.0
        columns += [unit, f"{unit}, sum"]
        for row, amount in zip(found, by_period(evidence, asked, unit), strict=True):
            total += amount
            row += [_amount(amount, source), _amount(total, source)]
    return Table("T6_periods", "The request by period.", tuple(columns), tuple(map(tuple, found)))


def spent_table(evidence: Evidence) -> Table | None:
    """What the runs have taken, by Slurm's accounting and by the tasks' own notes; None where no run has a usage.json."""
    body: list[tuple[Entry, ...]] = []
    for run in evidence.runs:
        if run.usage is None:
            continue
        file = f"{run.name}/usage.json"
        books = dig(run.usage, "reconciled") or {}
        sides = (("all attempts", "total"), ("by sacct", "reconciled.sacct"), ("by the tasks' notes", "reconciled.own"))
        for name, key in (*sides, ("difference", "reconciled.difference")):
            held = dig(run.usage, key)
            if key != "total" and not (books and books.get("sacct")):
                continue
            told = held if isinstance(held, Mapping) else {}
            unknown = "its attempts do not tell what they held"
            amounts = (_held(told.get(one), f"{file}#{key}.{one}", unknown) for one in UNITS.values())
            tries = number(told.get("attempts"), f"{file}#{key}.attempts") if "attempts" in told else words("–")
            body.append((words(run.name), words(name), tries, *amounts))
        body += _explained(run.name, file, books)
    columns = ("Run", "By", "Attempts", *UNITS)
    caption = "What the runs have taken so far, failed and requeued attempts included."
    return Table("T6_spent", caption, columns, tuple(body)) if body else None


def _held(hours: Any, source: str, reason: str = "") -> Entry:
    """Hours of usage.json: of few as many decimals as show them."""
    places = places_for(hours, 2) if isinstance(hours, int | float) else 0
    return number(hours, source, max(3, places), reason=reason)


def _explained(run: str, file: str, books: Mapping[str, Any]) -> list[tuple[Entry, ...]]:
    """The attempts that explain most of what both books differ by."""
    found: list[tuple[Entry, ...]] = []
    for place, row in enumerate(list(books.get("attempts") or ())[:SHOWN_JOBS]):
        source = f"{file}#reconciled.attempts.{place}"
        name = words(f"of it, job {row.get('job')}", note=str(row.get("why", "")), source=source)
        amounts = (_held(row.get(key), f"{source}.{key}") for key in UNITS.values())
        found.append((words(run), name, words("–"), *amounts))
    return found


def gaps(asked: tuple[Line, ...], site: SiteConfig) -> list[str]:
    """Why T6 is incomplete."""
    found = [f"T6: “{line.item.name}” is not worked out: {line.reason}." for line in asked if line.hours is None]
    found += [f"T6: extrapolation in “{line.item.name}”: {told}." for line in asked for told in line.extrapolated]
    if not (site.charge_per_gpu_hour or site.charge_per_node_hour):
        found.append(f"T6: the file of site {site.name} names no charge_per_gpu_hour or charge_per_node_hour.")
    return found
