"""Tool: how well a map agrees with reference polygons; see docs/compare.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rtshpc.core.errors import ConfigError, unknown
from rtshpc.mapping import features as table
from rtshpc.mapping.compare.assess import Score, assess
from rtshpc.mapping.compare.sources import Source, read_layer, read_source, words
from rtshpc.mapping.features import Features

SHARES = ("precision", "recall", "f1", "area_precision", "area_recall", "area_f1")


def main(arguments: Sequence[str]) -> int:
    """Prints a table by site, or JSON `{map, reference, iou, sites: {site: figures}}`.

    Raises:
        ConfigError: an option does not fit the files.
        DataError: a file cannot be read.
    """
    given = _parser().parse_args(list(arguments))
    if not 0 < given.iou <= 1:
        raise ConfigError(f"--iou = {given.iou:g} must be above 0 and at most 1")
    source = _chosen(read_source(Path(given.map)), given.date, given.least_score)
    reference, ignore = read_layer(Path(given.reference)), None
    if given.ignore_property:
        hidden = np.isin(words(reference, given.ignore_property, given.reference), given.ignore_when)
        reference, ignore = reference.take(~hidden), reference.take(hidden)
    if given.ignore:
        ignore = read_layer(Path(given.ignore))
    scores = assess(source, reference, ignore, given.iou)
    if given.json:
        sites = {site: score.figures() for site, score in scores.items()}
        print(json.dumps({"map": given.map, "reference": given.reference, "iou": given.iou, "sites": sites}, indent=1))
    else:
        Console().print(_shown(scores, given.iou))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="assess", description="Compare a map with reference polygons.")
    parser.add_argument("map", metavar="MAP", help="folder of a map run, or a file of polygons")
    parser.add_argument("reference", metavar="REFERENCE", help="file of polygons: GeoPackage, GeoJSON, Shapefile, ...")
    parser.add_argument("--iou", type=float, default=0.5, help="least IoU of a right instance, default 0.5")
    parser.add_argument("--least-score", type=float, default=0.0, metavar="S", help="leave out instances below")
    parser.add_argument("--date", help="of a map of several dates: the one to compare")
    regions = parser.add_mutually_exclusive_group()
    regions.add_argument("--ignore", metavar="FILE", help="polygons of ground that is not known")
    regions.add_argument("--ignore-property", metavar="NAME", help="column of REFERENCE that marks such polygons")
    parser.add_argument("--ignore-when", nargs="+", default=["1"], metavar="VALUE", help="its values there, default 1")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _chosen(source: Source, date: str | None, least_score: float) -> Source:
    """The instances and grounds of one date, with at least a score."""
    features, grounds = source.features, source.grounds
    if least_score > 0:
        if table.SCORE not in features.columns:
            raise ConfigError(f"--least-score: {source.name} has no column {table.SCORE}")
        features = features.take(features[table.SCORE] >= least_score)
    dates = sorted({str(day) for one in (features, grounds) if one is not None for day in _dates(one)})
    if date is None and len(dates) > 1:
        raise ConfigError(f"{source.name}: a map of several dates: choose one with --date: {', '.join(dates)}")
    if date is not None and date not in dates:
        raise ConfigError(unknown("--date", date, dates))
    if date is None:
        return Source(source.name, features, grounds)
    return Source(source.name, _at(features, date), None if grounds is None else _at(grounds, date))


def _dates(features: Features) -> list[str]:
    return [str(day) for day in features.columns.get(table.DATE, ())]


def _at(features: Features, date: str) -> Features:
    return features.take(np.array([day == date for day in _dates(features)], np.bool_))


def _shown(scores: Mapping[str, Score], iou: float) -> Table:
    """One row a site."""
    made = Table(title=f"right: IoU of at least {iou:g}; shares in percent")
    made.add_column("site")
    for name in ("mapped", "right", "reference", "found", *SHARES, "mapped m2", "reference m2"):
        made.add_column(name.replace("_", " "), justify="right")
    for number, (site, score) in enumerate(scores.items()):
        if number == len(scores) - 1:
            made.add_section()
        figures = score.figures()
        counts = (str(figures[name]) for name in ("mapped", "right", "reference", "found"))
        shares = (_percent(figures[name]) for name in SHARES)
        made.add_row(site or "-", *counts, *shares, f"{score.mapped_m2:.0f}", f"{score.reference_m2:.0f}")
    return made


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
