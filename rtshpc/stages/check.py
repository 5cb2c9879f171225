"""Tool: judge rasters, image + label pairs or a whole data set without running anything."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import DataError, RtshpcError, SceneRejected
from rtshpc.core.load import load_data
from rtshpc.core.scenes import RASTER_SUFFIXES, Scene, list_scenes
from rtshpc.geo.crs import Finding, georeference
from rtshpc.geo.judge import Verdict, label_findings, raster_findings, scene_findings, verdict
from rtshpc.geo.raster import MAX_PIXELS, open_raster

IMAGE = "image.tif"
LABELS = {"mask.tif": "mask", "labels.geojson": "vector", "instances.tif": "instances"}
"""Label files of a sample folder, and what each holds."""

_STYLES = {"accept": "green", "warn": "yellow", "reject": "red"}


def main(arguments: Sequence[str]) -> int:
    """Judge what is named and print `[{path, verdict, reasons}]` or a table. Exit code 0 whatever the verdicts.

    Raises:
        RtshpcError: an argument names nothing, or the data config is wrong.
    """
    options = _parser().parse_args(list(arguments))
    # What GDAL grumbles about a broken file is told in the verdict's words.
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    logging.getLogger("pyogrio").setLevel(logging.CRITICAL)
    if options.labels and len(options.inputs) != 1:
        raise DataError("--mask and --labels go with exactly one image")
    verdicts: list[Verdict] = []
    for name in options.inputs:
        verdicts += _judge(name, options)
    verdicts = _told_of_copies(verdicts)
    if options.json:
        print(json.dumps([asdict(one) for one in verdicts], indent=1))
    else:
        _show(verdicts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check", description="Judge rasters, image + label pairs or a data set.")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|FOLDER|DATA_CONFIG",
        help=f"raster; folder with {IMAGE} and {', '.join(LABELS)}; folder of those; data config",
    )
    parser.add_argument(
        "--mask", "--labels", dest="labels", action="append", default=[], help="label file of the one image"
    )
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override of a data config"
    )
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger rasters are taken for size bombs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _judge(name: str, options: argparse.Namespace) -> Iterator[Verdict]:
    path = Path(name)
    if path.is_dir():
        yield from _judge_folder(path, options.max_pixels)
    elif path.suffix.lower() in (".yaml", ".yml") or not (path.exists() or path.suffix or len(path.parts) > 1):
        yield from _judge_data(load_data(name, options.sets))
    elif options.labels:
        found = raster_findings(path, options.max_pixels, sample=True)
        for label in options.labels:
            found += label_findings(path, label, max_pixels=options.max_pixels)
        yield verdict(path, found)
    else:
        yield verdict(path, raster_findings(path, options.max_pixels))


def _judge_folder(folder: Path, max_pixels: int) -> Iterator[Verdict]:
    """A sample folder is one sample; any other folder is all samples and rasters in it."""
    if (folder / IMAGE).exists():
        yield _judge_sample(folder, max_pixels)
        return
    samples = sorted(child for child in folder.iterdir() if child.is_dir() and (child / IMAGE).exists())
    rasters = sorted(child for child in folder.iterdir() if child.is_file() and child.suffix.lower() in RASTER_SUFFIXES)
    if not samples and not rasters:
        raise DataError(f"{folder}: no raster and no sample ({IMAGE}) in this folder")
    for sample in samples:
        yield _judge_sample(sample, max_pixels)
    for raster in rasters:
        yield verdict(raster, raster_findings(raster, max_pixels))


def _judge_sample(folder: Path, max_pixels: int) -> Verdict:
    image = folder / IMAGE
    found = raster_findings(image, max_pixels, sample=True)
    labels = [(folder / name, kind) for name, kind in LABELS.items() if (folder / name).exists()]
    if not labels:
        found += label_findings(image, None)
    for label, kind in labels:
        found += label_findings(image, label, kind, max_pixels)
    return verdict(folder, found)


def _told_of_copies(verdicts: list[Verdict]) -> list[Verdict]:
    """Warn of samples of which every file also is in another sample: the same sample under another name.

    Samples beside a named one are looked at too: a copy is found out only in company. Of two equal samples
    the first by name is the original.
    """
    named = {Path(one.path).resolve(): one for one in verdicts if (Path(one.path) / IMAGE).is_file()}
    company = sorted(
        {sibling for folder in named for sibling in folder.parent.glob(f"*/{IMAGE}")} | {f / IMAGE for f in named}
    )
    hashes: dict[Path, str] = {}
    result: list[Verdict] = []
    for one in verdicts:
        folder = Path(one.path).resolve()
        original = _original(folder, [image.parent for image in company], hashes) if folder in named else None
        if original is not None and (folder / IMAGE).stat().st_size > 0:
            detail = f"duplicate: every file is in {original.name} too; keep the two in one split"
            worst = "reject" if one.verdict == "reject" else "warn"
            one = Verdict(one.path, worst, [*one.reasons, detail])
        result.append(one)
    return result


def _original(folder: Path, company: Sequence[Path], hashes: dict[Path, str]) -> Path | None:
    mine = _contents(folder)
    for other in company:
        if other == folder:
            continue
        theirs = _contents(other)
        if not mine.keys() <= theirs.keys() or any(mine[name] != theirs[name] for name in mine):
            continue
        if mine.keys() == theirs.keys() and other > folder:
            continue
        if all(_hash(folder / name, hashes) == _hash(other / name, hashes) for name in mine):
            return other
    return None


def _contents(folder: Path) -> dict[str, int]:
    return {child.name: child.stat().st_size for child in folder.iterdir() if child.is_file()}


def _hash(path: Path, known: dict[Path, str]) -> str:
    if path not in known:
        with path.open("rb") as file:
            known[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[path]


def _judge_data(data: DataConfig) -> Iterator[Verdict]:
    """Every scene of a data set, and scenes of the same ground and date that its rule may split."""
    if data.scenes.generated is not None:
        raise DataError(f"{data.name} draws its scenes when it is run; there is no file to check yet")
    scenes = list_scenes(data, None)
    twins = _twins(data, scenes)
    for scene in scenes:
        found = [one for one in raster_findings(scene.image, data.max_pixels) if one.reason != "only_rgb"]
        fatal = scene_findings(scene, data)
        # Undeclared zeros are declared by the config.
        if data.missing_value is not None:
            found = [one for one in found if one.reason != "undeclared_missing"]
        yield verdict(scene.image, [*found, *fatal, *twins.get(scene.id, [])])


def _twins(data: DataConfig, scenes: Sequence[Scene]) -> dict[str, list[Finding]]:
    """Scenes of one footprint and date that may end in different splits."""
    places: dict[Any, list[Scene]] = {}
    for scene in scenes:
        try:
            with open_raster(scene.image, data.max_pixels) as dataset:
                grid, _ = georeference(dataset)
        except SceneRejected:
            continue
        if grid is not None:
            key = (
                grid.crs_wkt,
                tuple(round(value, 6) for value in grid.transform),
                grid.width,
                grid.height,
                scene.date,
            )
            places.setdefault(key, []).append(scene)
    found: dict[str, list[Finding]] = {}
    for same in places.values():
        for one in same:
            others = [two for two in same if two is not one and _may_part(data, one, two)]
            if others:
                detail = f"{one.id} has the footprint and date of {others[0].id}, and the two may be split"
                found[one.id] = [Finding("warn", "duplicate", detail)]
    return found


def _may_part(data: DataConfig, one: Scene, two: Scene) -> bool:
    """Whether the split rule can put two scenes in different splits."""
    if data.split.allow_leakage:
        return True
    if data.split.rule == "column":
        return one.split != two.split
    if data.split.rule == "site":
        return _side(data, one.site) != _side(data, two.site)
    return not one.group or one.group != two.group


def _side(data: DataConfig, site: str) -> str:
    return "test" if site in data.split.test_sites else "val" if site in data.split.val_sites else "train"


def _show(verdicts: Sequence[Verdict]) -> None:
    console = Console()
    table = Table(show_lines=False)
    table.add_column("verdict")
    table.add_column("path", overflow="fold")
    table.add_column("reasons", overflow="fold")
    for one in verdicts:
        style = _STYLES[one.verdict]
        table.add_row(f"[{style}]{one.verdict}[/]", escape(one.path), escape("\n".join(one.reasons)))
    console.print(table)
    counts = {name: sum(one.verdict == name for one in verdicts) for name in _STYLES}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    import sys

    try:
        sys.exit(main(sys.argv[1:]))
    except RtshpcError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
