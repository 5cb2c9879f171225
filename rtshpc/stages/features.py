"""Between the two trainings: the scales of one frozen backbone for every train and val chip, computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtshpc.core import features as cache
from rtshpc.core.cell import Cell, digest
from rtshpc.core.config import MViTConfig
from rtshpc.core.errors import RunError
from rtshpc.core.grid import finished
from rtshpc.core.load import read_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, append_line, file_sha256, read_json, read_lines, write_text
from rtshpc.data.augment import geometry_of, turn
from rtshpc.data.reader import ShardDataset, read_index
from rtshpc.engine.detectors import on_backbones, record_sha256
from rtshpc.engine.distributed import autocast, choose_device
from rtshpc.engine.nearby import near
from rtshpc.model.detector import Detector
from rtshpc.model.features import Header, to_stored, write_part

SPLITS = ("train", "val")
"""Splits that trainings read; test chips are scored with the backbones themselves."""

Row = dict[str, Any]


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write `cells/<id>/features/*.h5`; files that an earlier attempt finished are kept.

    Returns:
        modality, dtype, order, shapes, precision, live_dtype, backbone_sha256, data_sha256, variants (names by split),
        chips (by split), files [{file, split, bytes, sha256, chips}], bytes (of the scales), kept (files of
        earlier attempts), device.

    Raises:
        RunError: the disk has no room for the scales of the run, or a scale is not what the plan says.
    """
    tuning, data = cell.config.finetune, cell.config.data
    (modality,) = cell.modalities
    paths = near(cell, paths, progress)
    header = _header(cell, paths)
    sets = {split: ShardDataset(paths.index, data, split, (modality,)) for split in SPLITS}
    kept = _whole_files(cell, paths, header)
    _refuse_without_room(cell, paths, cache.Chips(len(sets["train"]), len(sets["val"]), True))
    torch.set_num_threads(tuning.threads)
    device = choose_device(tuning.device)
    progress("load", 0, 1)
    detector = on_backbones(cell, paths).to(device).eval()
    files: list[Row] = []
    done, again, total = 0, 0, sum(map(len, sets.values()))
    for split, dataset in sets.items():
        numbers, step = cache.split_variants(cell, split), cache.chips_per_file(cell, split)
        for first in range(0, len(dataset), step):
            path = paths.cell(cell.id).feature_file(split, first)
            ids = dataset.ids[first : first + step]
            entry = kept.get(path.name)
            again += entry is not None
            if entry is None:
                source = _Source(dataset, detector, header, device, progress, (done, total))
                entry = write_part(path, header, split, first, ids, numbers, source.records(first, len(ids), numbers))
                entry |= {"key": _key(cell, header), "live_dtype": source.live_dtype}
                append_line(paths.cell(cell.id).journal, entry)
            files.append(entry)
            done += len(ids)
            progress("features", done, total)
    return {
        **_facts(header),
        "live_dtype": files[0]["live_dtype"],
        "variants": {split: [cache.VARIANTS[n] for n in cache.split_variants(cell, split)] for split in SPLITS},
        "chips": {split: len(dataset) for split, dataset in sets.items()},
        "files": [{key: entry[key] for key in ("file", "split", "bytes", "sha256", "chips")} for entry in files],
        "bytes": cache.cell_bytes(cell, cache.Chips(len(sets["train"]), len(sets["val"]), True)),
        "kept": again,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _header(cell: Cell, paths: RunPaths) -> Header:
    chip = cell.config.data.chip
    (modality,) = cell.modalities
    return Header(
        modality=modality,
        dtype=cell.config.finetune.features_dtype,
        order="HWC" if isinstance(cell.config.model.backbone, MViTConfig) else "CHW",
        shapes=cache.scale_shapes(cell.config.model, chip.size_px * chip.enlarge),
        precision=cell.config.finetune.precision,
        backbone_sha256=record_sha256(paths, cell.backbones[modality]),
        data_sha256=cache.data_hash(read_index(paths.index), cell.needs[0]),
    )


def _facts(header: Header) -> Row:
    facts = dict(vars(header))
    return {**facts, "shapes": [list(shape) for shape in header.shapes]}


def _key(cell: Cell, header: Header) -> str:
    """What a file of an earlier attempt must be made of to be kept."""
    return digest({**_facts(header), "chips": [cache.chips_per_file(cell, split) for split in SPLITS]})


def _whole_files(cell: Cell, paths: RunPaths, header: Header) -> dict[str, Row]:
    """Name -> journal entry of files that are whole and of these weights and data; all others are removed."""
    own = paths.cell(cell.id)
    own.features.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in read_lines(own.journal) if entry.get("key") == _key(cell, header)]
    good = {str(entry["file"]): entry for entry in entries if _is_whole(own.features / entry["file"], entry)}
    write_text(own.journal, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in good.values()))
    for file in own.features.iterdir():
        if file.name not in good:
            file.unlink()
    return good


def _is_whole(path: Path, entry: Row) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]


def _refuse_without_room(cell: Cell, paths: RunPaths, chips: cache.Chips) -> None:
    """Raise RunError unless the disk has room for all that the run's features cells still have to write.

    All of them, not this one alone: they run at the same time.
    """
    listed = read_json(paths.plan)
    rows: list[Row] = listed.get("cells", []) if isinstance(listed, dict) else []
    others = [str(row["id"]) for row in rows if row["stage"] == "features" and row["todo"] and row["id"] != cell.id]
    waiting = [read_cell(paths.cell(name).config) for name in others if paths.cell(name).config.is_file()]
    cells = [cell, *(other for other in waiting if finished(other, paths) is None)]
    need = sum(cache.left_bytes(one, paths, chips) for one in cells)
    free = shutil.disk_usage(paths.root).free
    if need > free:
        raise RunError(
            f"{paths.root}: the feature cache still takes {need / 1e9:.3g} GB ({chips.train} train and {chips.val} val"
            f" chips, {len(cells)} cells), the disk has {free / 1e9:.3g} GB free; make room or take"
            " finetune.features: live"
        )


class _Source:
    """Chips through the backbone."""

    def __init__(
        self,
        dataset: ShardDataset,
        detector: Detector,
        header: Header,
        device: torch.device,
        progress: Progress,
        position: tuple[int, int],
    ) -> None:
        self._dataset, self._detector, self._header, self._device = dataset, detector, header, device
        self._progress, self._position = progress, position
        self.live_dtype = ""

    def records(self, first: int, count: int, variants: tuple[int, ...]) -> Iterator[Tensor]:
        """Records (n, variants, values) in the stored type of `count` chips from `first` on."""
        size = max(1, cache.CHIPS_AT_ONCE // len(variants))
        name = self._header.modality
        for start in range(first, first + count, size):
            rows = list(range(start, min(start + size, first + count)))
            chips = [sample.images[name] for sample in self._dataset.__getitems__(rows)]
            images = torch.stack([turn(chip, geometry_of(number)) for chip in chips for number in variants])
            with torch.inference_mode(), autocast(self._device, self._header.precision):
                inputs, _ = self._detector.prepare({name: images.to(self._device)})
                scales = self._detector.backbone.scales(inputs, {})[name]
                self.live_dtype = str(scales[0].dtype).removeprefix("torch.")
                flat = to_stored(scales, self._header).cpu()
            done, total = self._position
            self._progress("features", done + rows[-1] + 1 - first, total)
            yield flat.unflatten(0, (len(rows), len(variants)))
