"""What the page of a map run says: maps of the sites, counts and areas, scores, and what was not mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import write_text
from rtshpc.mapping import features as table
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import MAPPED, Outcome
from rtshpc.report import figures
from rtshpc.report.content import EMBED_LIMIT_BYTES, Content, Part
from rtshpc.report.entries import Entry, Table, csv_text, number, words
from rtshpc.report.overview.atlas import Drawing, draw, pictures_svg
from rtshpc.report.page import render_html

CLOSE_UPS = 24
"""Scenes that get a map of their own: those with most slumps."""
SLUMPS, GROUND = "layers/slumps.parquet", "layers/footprints.parquet"
_BINS = 20
_NOWHERE = "no site"


@dataclass(frozen=True)
class Threshold:
    """From which score on F1 was largest on the validation split of the model's training; `source`: where that stands."""

    score: float
    f1: float
    source: str


@dataclass(frozen=True)
class MapFacts:
    """All that the page tells.

    Attributes:
        title: of the run.
        setting: a line on the model and how it was used.
        outcomes: every scene.
        slumps: every instance.
        least: score below which nothing was mapped.
        threshold: None where the model's run does not say.
        looks: scene -> file of its picture, WebP.
        notes: what a reader must know.
        files: beside the page, for people.
        origin: (name, value) rows on what the map was made with.
    """

    title: str
    setting: str
    outcomes: Sequence[Outcome]
    slumps: Features
    least: float
    threshold: Threshold | None
    looks: Mapping[str, Path]
    notes: Sequence[str] = ()
    files: Sequence[str] = ()
    origin: Sequence[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def write_overview(paths: RunPaths, facts: MapFacts) -> list[str]:
    """Write the page and its table as CSV.

    Returns:
        Names of the files relative to the report's folder.
    """
    sites = site_table(facts)
    rows = [[entry.value if entry.value is not None else entry.text for entry in row] for row in sites.rows]
    written = {
        paths.report_page: render_html(build(facts, sites)),
        paths.report_table(sites.name): csv_text(sites.columns, rows),
    }
    for path, text in written.items():
        write_text(path, text)
    return sorted(str(path.relative_to(paths.report)) for path in written)


def build(facts: MapFacts, sites: Table) -> Content:
    """The page's content."""
    mapped = [outcome for outcome in facts.outcomes if outcome.state == MAPPED]
    grounds = {outcome.scene: outcome.ground for outcome in facts.outcomes if outcome.ground is not None}
    pictures, looks = pictures_svg(_fitting(facts, grounds), grounds)
    left_out = len(facts.outcomes) - len(mapped)
    warning = f"{left_out} of {len(facts.outcomes)} scenes were not mapped: see “Scenes that were not mapped”."
    drawings = [(one.name, one.title, one.caption, one.svg) for one in _drawings(facts, looks)]
    close = [(one.name, one.title, one.caption, one.svg) for one in _close_ups(facts, mapped, looks)]
    parts = [
        Part("map", "Overview map", maps=tuple(drawings)),
        Part("sites", "Counts and areas", tables=(sites,)),
        _scores(facts),
        Part("scenes", "Scenes with most slumps", maps=tuple(close)),
        *([Part("absent", "Scenes that were not mapped", tables=(_absent(facts),))] if left_out else []),
        Part("provenance", "Provenance", paragraphs=tuple(map(words, facts.notes)), tables=(_origin(facts),)),
    ]
    return Content(
        title=facts.title,
        setting=facts.setting,
        dated="",
        cards=_cards(facts, mapped),
        headlines=(),
        warnings=(warning,) if left_out else (),
        parts=tuple(part for part in parts if part.maps or part.tables or part.paragraphs),
        files=tuple(facts.files),
        pictures=pictures,
    )


def _fitting(facts: MapFacts, grounds: Mapping[str, Any]) -> dict[str, bytes]:
    """Pictures of scenes with most slumps first, as many as the page may hold."""
    room, kept = EMBED_LIMIT_BYTES, dict[str, bytes]()
    for scene in _by_count(facts, [scene for scene in facts.looks if scene in grounds]):
        size = facts.looks[scene].stat().st_size * 4 // 3
        if size <= room:
            kept[scene] = facts.looks[scene].read_bytes()
            room -= size
    return kept


def _by_count(facts: MapFacts, scenes: Sequence[str]) -> list[str]:
    rows = facts.slumps.rows_by(table.SCENE)
    return sorted(scenes, key=lambda scene: (-len(rows.get(scene, ())), scene))


def _cards(facts: MapFacts, mapped: Sequence[Outcome]) -> tuple[tuple[str, Entry], ...]:
    areas = facts.slumps[table.AREA]
    return (
        ("Scenes mapped", number(len(mapped), GROUND)),
        ("Ground mapped, km²", number(_mapped_m2(mapped), GROUND, 1, 1e6)),
        ("Slumps", number(len(facts.slumps), SLUMPS)),
        ("Slump area, ha", number(float(np.nansum(areas)), SLUMPS, 1, 1e4)),
    )


def _mapped_m2(outcomes: Sequence[Outcome]) -> float:
    return float(sum(one.valid_px * one.ground.resolution_m**2 for one in outcomes if one.ground is not None))


def _drawings(facts: MapFacts, looks: Mapping[str, str]) -> list[Drawing]:
    """A map a site."""
    placed = [outcome for outcome in facts.outcomes if outcome.ground is not None]
    rows, found = facts.slumps.rows_by(table.SITE), list[Drawing]()
    for number_of, site in enumerate(sorted({outcome.site for outcome in placed})):
        own = [outcome for outcome in placed if outcome.site == site]
        slumps = facts.slumps.take(rows.get(site, np.zeros(0, np.int64)))
        found.append(draw(f"site-{number_of}", site or _NOWHERE, own, slumps, looks))
    return found


def _close_ups(facts: MapFacts, mapped: Sequence[Outcome], looks: Mapping[str, str]) -> list[Drawing]:
    known, rows = {outcome.scene: outcome for outcome in mapped}, facts.slumps.rows_by(table.SCENE)
    chosen = [scene for scene in _by_count(facts, list(known)) if scene in rows][:CLOSE_UPS]
    return [
        draw(f"scene-{place}", scene, [known[scene]], facts.slumps.take(rows[scene]), looks)
        for place, scene in enumerate(chosen)
    ]


def site_table(facts: MapFacts) -> Table:
    """Counts and areas per site and date."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in facts.outcomes:
        rows.setdefault((outcome.site, outcome.date), []).append(outcome)
    slumps: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(facts.slumps[table.SITE], facts.slumps[table.DATE], strict=True)):
        slumps.setdefault(key, []).append(row)
    body: list[tuple[Entry, ...]] = []
    for (site, date), outcomes in sorted(rows.items()):
        mapped = [outcome for outcome in outcomes if outcome.state == MAPPED]
        areas = facts.slumps[table.AREA][np.array(slumps.get((site, date), []), np.int64)]
        ground = _mapped_m2(mapped)
        body.append(
            (
                words(site or _NOWHERE),
                words(date or "no date"),
                number(len(mapped), GROUND),
                number(len(outcomes) - len(mapped), GROUND),
                number(ground, GROUND, 2, 1e6),
                number(len(areas), SLUMPS),
                number(float(np.nansum(areas)), SLUMPS, 2, 1e4),
                number(float(np.nanmedian(areas)) if len(areas) else None, SLUMPS, 0, reason="no slump"),
                number(len(areas) / ground * 1e8 if ground else None, SLUMPS, 2, reason="nothing was mapped"),
            )
        )
    columns = (
        "Site",
        "Date",
        "Scenes",
        "Not mapped",
        "Ground, km²",
        "Slumps",
        "Slump area, ha",
        "Median area, m²",
        "Slumps per 100 km²",
    )
    return Table("map_sites", "What was found, by site and date. Ground: pixels that hold data.", columns, tuple(body))


def _scores(facts: MapFacts) -> Part:
    """Histogram of scores, and the best threshold that is known."""
    scores, best = facts.slumps[table.SCORE], facts.threshold
    if best is None:
        told = words("The model's run does not say which threshold makes the largest F1 on its validation split.")
    else:
        kept = int(np.count_nonzero(scores >= best.score))
        text = f"From score {best.score:.3f} on, F1 was largest on the validation split ({best.f1:.1f} %): {kept} of {len(scores)} slumps are at or above it"
        below = ", and lower ones were not mapped at all" if best.score < facts.least else ""
        told = words(f"{text}; the map starts at {facts.least:g}{below}.", source=best.source)
    return Part("scores", "Scores", (told,), charts=(_histogram(facts),) if len(scores) else ())


def _histogram(facts: MapFacts) -> figures.Picture:
    scores, best = facts.slumps[table.SCORE], facts.threshold
    with mpl.rc_context(figures.STYLE):
        figure, axes = figures.axes_of(2.6)
        axes.hist(scores, bins=_BINS, range=(0, 1), color=figures.PALETTE[0], edgecolor=figures.INK, linewidth=0.5)
        axes.axvline(facts.least, color=figures.INK, linewidth=1, linestyle=":", label="map starts here")
        if best is not None:
            axes.axvline(best.score, color=figures.PALETTE[1], linewidth=1.8, label="largest F1, validation split")
        axes.set_xlim(0, 1)
        axes.set_xlabel("score")
        axes.set_ylabel("slumps")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", fontsize=8)
        svg = figures.saved(figure)
    caption = f"Scores of {len(scores)} slumps, in {_BINS} steps."
    return figures.Picture("scores-chart", "Scores of the slumps", caption, svg)


def _absent(facts: MapFacts) -> Table:
    left_out = sorted((one for one in facts.outcomes if one.state != MAPPED), key=lambda one: (one.site, one.scene))
    body = [
        (words(one.scene), words(one.site), words(one.date), words(one.state), words(one.reason), words(one.detail))
        for one in left_out
    ]
    columns = ("Scene", "Site", "Date", "State", "Reason", "Detail")
    return Table("map_absent", "Scenes without a map, and why.", columns, tuple(body))


def _origin(facts: MapFacts) -> Table:
    body = tuple((words(name), words(value)) for name, value in facts.origin)
    return Table("provenance", "What the map was made with.", ("What", "Value"), body)
