"""Tool: judge rasters, image + label pairs or a whole data set without running anything."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import DataError, RtshpcError, SceneRejected
from rtshpc.core.load import load_data
from rtshpc.core.records import file_sha256
from rtshpc.core.scenes import RASTER_SUFFIXES, Scene, list_scenes
from rtshpc.geo.crs import Finding, georeference
from rtshpc.geo.judge import Verdict, label_findings, pixels_key, raster_findings, verdict
from rtshpc.geo.raster import MAX_PIXELS, open_raster, rejecting

IMAGE = "image.tif"
LABELS = {"mask.tif": "mask", "labels.geojson": "vector", "instances.tif": "instances"}
"""Label files of a sample folder, and what each holds."""

_STYLES = {"accept": "green", "warn": "yellow", "reject": "red"}


def main(arguments: Sequence[str]) -> int:
    """Judge what is named and print `[{path, verdict, reasons}]` or a table. Exit code 0 whatever the verdicts.

    An argument that names nothing, or a data config that is wrong, is a verdict too: the others still get theirs.

    Raises:
        RtshpcError: labels are given for several images.
    """
    options = _parser().parse_args(list(arguments))
    # What GDAL grumbles about a broken file is told in the verdict's words.
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    logging.getLogger("pyogrio").setLevel(logging.CRITICAL)
    if options.labels and len(options.inputs) != 1:
        raise DataError("--mask and --labels go with exactly one image")
    verdicts: list[Verdict] = []
    for name in options.inputs:
        verdicts += _judged(name, options)
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


def _judged(name: str, options: argparse.Namespace) -> list[Verdict]:
    found: list[Verdict] = []
    try:
        with rejecting(name):
            for one in _judge(name, options):
                found.append(one)
    except SceneRejected as error:
        found.append(verdict(name, [Finding("reject", error.reason, error.detail)]))
    except RtshpcError as error:
        found.append(verdict(name, [Finding("reject", "unusable", str(error))]))
    return found


def _judge(name: str, options: argparse.Namespace) -> Iterator[Verdict]:
    path = Path(name)
    if os.path.isdir(path):
        yield from _judge_folder(path, options.max_pixels)
    elif path.suffix.lower() in (".yaml", ".yml") or not (os.path.exists(path) or path.suffix or len(path.parts) > 1):
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
    # The functions of os.path answer no where those of Path raise: loops of links, folders without permission.
    if os.path.exists(folder / IMAGE):
        yield _judge_sample(folder, max_pixels)
        return
    inside = sorted(folder.iterdir())
    samples = [child for child in inside if os.path.exists(child / IMAGE)]
    rasters = [child for child in inside if os.path.isfile(child) and child.suffix.lower() in RASTER_SUFFIXES]
    if not samples and not rasters:
        raise DataError(f"{folder}: no raster and no sample ({IMAGE}) in this folder")
    for sample in samples:
        yield _judge_sample(sample, max_pixels)
    for raster in rasters:
        yield verdict(raster, raster_findings(raster, max_pixels))


def _judge_sample(folder: Path, max_pixels: int) -> Verdict:
    image = folder / IMAGE
    found = raster_findings(image, max_pixels, sample=True)
    labels = [(folder / name, kind) for name, kind in LABELS.items() if os.path.lexists(folder / name)]
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
    named = {Path(os.path.realpath(one.path)) for one in verdicts if os.path.isfile(Path(one.path) / IMAGE)}
    company = sorted({beside for folder in named for beside in folder.parent.glob(f"*/{IMAGE}")})
    alike: dict[Any, list[Path]] = {}
    for image in company:
        alike.setdefault(_header(image), []).append(image.parent)
    keys: dict[tuple[Path, bool], Any] = {}
    result: list[Verdict] = []
    for one in verdicts:
        if os.path.isfile(Path(one.path) / IMAGE):
            folder = Path(os.path.realpath(one.path))
            original = _original(folder, alike.get(_header(folder / IMAGE), []), keys)
            if original is not None and (folder / IMAGE).stat().st_size > 0:
                detail = f"duplicate: every file is in {original.name} too; keep the two in one split"
                worst = "reject" if one.verdict == "reject" else "warn"
                one = Verdict(one.path, worst, [*one.reasons, detail])
        result.append(one)
    return result


def _header(path: Path) -> Any:
    """What a raster says of itself before its pixels are read; the size of a file that is no raster."""
    try:
        with rejecting(path.name), open_raster(path) as dataset:
            return str(dataset.crs), tuple(dataset.transform), dataset.shape, dataset.dtypes
    except SceneRejected:
        return os.path.getsize(path) if os.path.isfile(path) else None


def _original(folder: Path, company: Sequence[Path], keys: dict[tuple[Path, bool], Any]) -> Path | None:
    """The sample that holds every file of `folder`, byte by byte, or the same files with the same pixels."""
    mine = _files(folder)
    for other in company:
        theirs = _files(other)
        if other == folder or not mine or not mine <= theirs or (mine == theirs and other > folder):
            continue
        ways = (False, True) if mine == theirs else (False,)
        if all(any(_key(folder / n, way, keys) == _key(other / n, way, keys) for way in ways) for n in sorted(mine)):
            return other
    return None


def _files(folder: Path) -> set[str]:
    try:
        return {child.name for child in folder.iterdir() if os.path.isfile(child)}
    except OSError:
        return set()


def _key(path: Path, by_pixels: bool, known: dict[tuple[Path, bool], Any]) -> Any:
    """What equal files share: their bytes, or their grid and pixels however they are compressed."""
    if (path, by_pixels) not in known:
        key: Any = pixels_key(path) if by_pixels else None
        if not by_pixels:
            with suppress(OSError):
                key = file_sha256(path)
        known[path, by_pixels] = (path,) if key is None else key
    return known[path, by_pixels]


def _judge_data(data: DataConfig) -> Iterator[Verdict]:
    """Every scene of a data set, and scenes of the same ground and date that its rule may split."""
    if data.scenes.generated is not None:
        raise DataError(f"{data.name} draws its scenes when it is run; there is no file to check yet")
    scenes = list_scenes(data, None)
    twins = _twins(data, scenes)
    for scene in scenes:
        fate = _preprocessed(scene, data)
        found = raster_findings(scene.image, data.max_pixels) if scene.image else []
        if not any(one.severity == "reject" for one in fate):
            # The whole file is judged too, but what preprocess does with what it reads of it decides.
            found = [replace(one, severity="warn") for one in found]
        # Undeclared zeros are declared by the config; a modality that is wanted and lacks rejects.
        known = {"only_rgb"} | ({"undeclared_missing"} if data.missing_value is not None else set())
        found = [one for one in found if one.reason not in known]
        yield verdict(scene.image or scene.id, [*fate, *found, *twins.get(scene.id, [])])


def _preprocessed(scene: Scene, data: DataConfig) -> list[Finding]:
    """What preprocess does with a scene, by doing it: its warnings, or why it is rejected."""
    from rtshpc.data.cut import SceneFacts, cut_scene  # brings torch, which files alone do not need

    facts = SceneFacts()
    try:
        for _ in cut_scene(scene, data, facts):
            pass
    except SceneRejected as error:
        return [Finding("reject", error.reason, error.detail)]
    return [Finding.note(text) for text in facts.warnings]


def _twins(data: DataConfig, scenes: Sequence[Scene]) -> dict[str, list[Finding]]:
    """Scenes of one footprint that have the same pixels, or one date and a rule that wants them apart."""
    places: dict[Any, list[Scene]] = {}
    for scene in scenes:
        try:
            with rejecting(scene.id), open_raster(scene.image, data.max_pixels) as dataset:
                grid, _ = georeference(dataset)
        except SceneRejected:
            continue
        if grid is not None:
            place = (grid.crs_wkt, tuple(round(value, 6) for value in grid.transform), grid.width, grid.height)
            places.setdefault(place, []).append(scene)
    found: dict[str, list[Finding]] = {}
    for same in places.values():
        keys = {one.id: pixels_key(one.image, data.max_pixels) for one in same} if len(same) > 1 else {}
        for one in same:
            others = [two for two in same if two is not one]
            copies = [two for two in others if keys[one.id] is not None and keys[two.id] == keys[one.id]]
            dated = [two for two in others if two.date == one.date and _apart(data, one, two)]
            for two in [*copies, *dated][:1]:
                what = "pixels" if copies else "footprint and date"
                fate = _apart(data, one, two) or "the two stay in one split"
                found[one.id] = [Finding("warn", "duplicate", f"{one.id} has the {what} of {two.id}; {fate}")]
    return found


def _apart(data: DataConfig, one: Scene, two: Scene) -> str:
    """What the split does with two scenes of one footprint that its rule would part; nothing where it would not."""
    if data.split.allow_leakage:
        return "split.allow_leakage may part the two"
    first, second = _asked(data, one), _asked(data, two)
    return f"the two stay in one split, though {first} and {second} are asked for" if first != second else ""


def _asked(data: DataConfig, scene: Scene) -> str:
    """The split that the rule names for a scene; nothing where it draws."""
    if data.split.rule == "column":
        return scene.split
    return _side(data, scene.site) if data.split.rule == "site" else ""


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
