"""Tool: slumps of several dates as one table and layer; see docs/compare.md."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rtshpc.core.errors import ConfigError
from rtshpc.core.records import write_text
from rtshpc.mapping.compare.sources import read_source
from rtshpc.mapping.compare.track import LEAST_SHARE, summary, track
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import write_layer

NAME = "tracks"


def main(arguments: Sequence[str]) -> int:
    """Writes `tracks.gpkg`, `tracks.parquet` and `tracks.csv` and prints what is in them.

    Raises:
        ConfigError: an option is not allowed.
        DataError: a map cannot be read or has no dates.
    """
    given = _parser().parse_args(list(arguments))
    if not 0 < given.share <= 1:
        raise ConfigError(f"--share = {given.share:g} must be above 0 and at most 1")
    tracks = track([read_source(Path(name)) for name in given.map], given.share)
    folder = Path(given.out)
    files = write_layer(folder, NAME, tracks)
    files["csv"] = folder / f"{NAME}.csv"
    write_text(files["csv"], _csv(tracks))
    told = summary(tracks)
    if given.json:
        print(json.dumps(told | {"files": {kind: str(path) for kind, path in files.items()}}, indent=1))
        return 0
    print(f"{told['slumps']} slumps at {len(told['dates'])} dates: {', '.join(told['dates'])}")
    print(", ".join(f"{count} {change}" for change, count in told["changes"].items()) or "nothing was mapped")
    print(f"growth {told['growth_m2']:.0f} m2 in all")
    for path in files.values():
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="track", description="Link the slumps of maps of several dates.")
    parser.add_argument("map", nargs="+", metavar="MAP", help="folder of a map run, or a file of polygons with dates")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the table and the layer")
    text = f"common area of a slump at two dates, least share of the smaller, default {LEAST_SHARE:g}"
    parser.add_argument("--share", type=float, default=LEAST_SHARE, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _csv(tracks: Features) -> str:
    """All columns but the outlines; not known = nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(tracks.columns)
    for row in zip(*(values.tolist() for values in tracks.columns.values()), strict=True):
        writer.writerow(["" if value != value else value for value in row])
    return text.getvalue()
