"""Tool: what a file of weights holds under our names, and its conversion; see docs/weights.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from rtshpc.core.errors import unknown
from rtshpc.core.load import load_model
from rtshpc.model.detector import build_detector
from rtshpc.model.imports.export import WRITTEN, export
from rtshpc.model.imports.files import WeightFile, read_weights
from rtshpc.model.imports.fit import class_count, fit, translate
from rtshpc.model.weights import ONE, SEVERAL, WeightsError

VARIANTS = {
    (96, 10): "MViTv2-T",
    (96, 16): "MViTv2-S",
    (96, 24): "MViTv2-B",
    (144, 48): "MViTv2-L",
    (192, 80): "MViTv2-H",
}
"""Channels at stride 4 and blocks -> published name (Li et al. 2022, Table 1)."""

BOTTLENECKS = {(3, 4, 6, 3): "ResNet-50", (3, 4, 23, 3): "ResNet-101", (3, 8, 36, 3): "ResNet-152"}


def main(arguments: Sequence[str]) -> int:
    """Run `inspect` or `convert`.

    Raises:
        RtshpcError: a file cannot be read, is of no known family, does not fit, or cannot be written.
    """
    given = _parser().parse_args(list(arguments))
    return int(given.run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weights", description="Read, judge and convert files of weights.")
    tools = parser.add_subparsers(required=True, metavar="inspect|convert")
    inspect = tools.add_parser("inspect", help="say what a file holds")
    inspect.add_argument("file", metavar="FILE", help=".safetensors, .pth, .pyth, .pt, .bin or .pkl")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    convert = tools.add_parser("convert", help="write a file under Detectron2's names")
    convert.add_argument("file", metavar="FILE", help="as for inspect")
    convert.add_argument("out", metavar="OUT", help="file to write; its suffix says in which format")
    convert.add_argument("--format", help=f"{' or '.join(WRITTEN.values())}; the suffix must agree where it says one")
    convert.add_argument("--model", help="fit to this model config: inflate, resize, refuse what does not fit")
    convert.add_argument("--bands", type=int, default=3, help="with --model: bands of the modality")
    convert.add_argument("--classes", type=int, help="with --model: number of classes; by default the file's, or 1")
    convert.add_argument("--part", choices=("all", "backbone"), default="all", help="what to write")
    convert.set_defaults(run=_convert)
    return parser


def _inspect(given: argparse.Namespace) -> int:
    file = read_weights(Path(given.file))
    facts = describe(file)
    if given.json:
        print(json.dumps(facts, indent=1))
        return 0
    console = Console(highlight=False)
    for key, value in facts.items():
        if key not in ("names", "unused"):
            console.print(f"{key:<12} {escape(str(value))}", soft_wrap=True)
    console.print(f"{'unused':<12} {escape(', '.join(facts['unused']) or 'none')}", soft_wrap=True)
    for ours, entry in facts["names"].items():
        origin = "" if entry["from"] == ours else f"  <- {entry['from']}"
        console.print(escape(f"  {ours} {tuple(entry['shape'])} {entry['dtype']}{origin}"), soft_wrap=True)
    return 0


def describe(file: WeightFile) -> dict[str, Any]:
    """What a file holds.

    Returns:
        file, sha256, kind, family, author, backbone (what its shapes say), part (all or backbone), classes, tensors,
        values (numbers in them), unused (names in the file that no detector uses), names (ours -> from, shape, dtype).

    Raises:
        WeightsError: of no known family.
    """
    found = translate(file)
    tensors = found.tensors
    return {
        "file": str(file.path),
        "sha256": file.sha256,
        "kind": file.kind,
        "family": found.family,
        "author": file.author,
        "backbone": backbone_of(tensors),
        "part": "backbone" if all(name.startswith(ONE) for name in tensors) else "all",
        "classes": class_count(tensors),
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "unused": found.unused,
        "names": {
            name: {"from": found.origins[name], "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        },
    }


def backbone_of(tensors: Mapping[str, Tensor]) -> str:
    """What the shapes of a backbone say: its published name where they have one, else its sizes."""
    start = ONE if any(name.startswith(ONE) for name in tensors) else SEVERAL
    inside = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    if start == SEVERAL:
        modalities = dict.fromkeys(name.split(".")[0] for name in inside)
        one = next(iter(modalities))
        first = backbone_of({ONE + n.removeprefix(f"{one}."): t for n, t in inside.items() if n.startswith(f"{one}.")})
        return f"{' + '.join(modalities)}, each {first}"
    patches = inside.get("patch_embed.proj.weight")
    if patches is not None:
        width, depth = patches.shape[0], 1 + max((_number(name, "blocks") for name in inside), default=-1)
        table = inside.get("blocks.0.attn.rel_pos_h")
        tables = f", tables for {2 * (table.shape[0] + 1)} px" if table is not None else ""
        named = VARIANTS.get((width, depth), "MViTv2")
        return f"{named}: {patches.shape[1]} bands, width {width}, {depth} blocks{tables}"
    stages = tuple(1 + max((_number(name, f"res{scale}") for name in inside), default=-1) for scale in (2, 3, 4, 5))
    return f"{BOTTLENECKS.get(stages, 'ResNet')}: {', '.join(map(str, stages))} bottlenecks"


def _number(name: str, above: str) -> int:
    """3 for `blocks.3.norm1.weight` under `blocks`; -1 elsewhere."""
    match = re.match(rf"{above}\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _convert(given: argparse.Namespace) -> int:
    file, out = read_weights(Path(given.file)), Path(given.out)
    if given.format is not None:
        if given.format not in WRITTEN.values():
            raise WeightsError(unknown("--format", given.format, WRITTEN.values()))
        if WRITTEN.get(out.suffix.lower()) != given.format:
            suffix = next(suffix for suffix, kind in WRITTEN.items() if kind == given.format)
            raise WeightsError(f"{out}: --format {given.format} is written to {suffix} files")
    console = Console(highlight=False)
    found = translate(file)
    tensors, unused = found.tensors, found.unused
    if given.model is not None:
        tensors, unused = _fitted(file, given, console)
    if given.part == "backbone":
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith((ONE, SEVERAL))}
    export(tensors, out)
    console.print(f"{escape(str(out))}: {len(tensors)} tensors of {escape(backbone_of(tensors))}", soft_wrap=True)
    if unused:
        console.print(f"not used: {escape(', '.join(unused))}", soft_wrap=True)
    return 0


def _fitted(file: WeightFile, given: argparse.Namespace, console: Console) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors in the shapes of a model, and what of the file it does not use."""
    model = load_model(given.model)
    if given.bands < 1 or (given.classes is not None and given.classes < 1):
        raise WeightsError("--bands and --classes must be at least 1")
    classes = given.classes or class_count(translate(file).tensors) or 1
    with torch.device("meta"):
        own = build_detector(model, {"modality": given.bands}, classes).state_dict()
    fitted = fit(file, own, model)
    for word, names in (("inflated", fitted.inflated), ("resized", fitted.resized), ("not given", fitted.fresh)):
        if names:
            console.print(f"{word}: {len(names)} tensors, e.g. {names[0]}", soft_wrap=True)
    return fitted.tensors, list(fitted.unused)
