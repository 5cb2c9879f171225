"""The feature cache on disk: four scales of a frozen backbone for every chip and variant, in files of many chips.

A file holds (plain h5py opens it):

- `scales` (chips, variants, values), contiguous, fp16 as `<f2` or bf16 as `<u2` (NumPy has no bf16; the upper half
  of a float32): the four maps of a chip one after the other, finest first, each in the order of its `order`;
- `crc32` (chips, variants) of each record; `id` (chips,), names of the chips;
- attributes: `format`, `modality`, `split`, `first` (number of its first chip in the split), `dtype`, `order` (HWC
  or CHW), `variants` (names), `shapes` (4, 3: C, H, W), `precision`, `backbone_sha256`, `data_sha256`.

A record is read with one `pread` a scale straight into the batch, past HDF5, whose handles no fork may share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rtshpc.core.errors import DataError, RunError
from rtshpc.core.features import VARIANTS
from rtshpc.core.records import crc32, file_sha256, replacing
from rtshpc.model.choices import choices

FORMAT = 1
"""Version of the layout above."""

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {"bf16": "<u2", "fp16": "<f2"}

OPEN_FILES = 64
"""Most files that a reader keeps open."""


@dataclass(frozen=True)
class Header:
    """What all files of a features cell have in common.

    Attributes:
        modality: whose scales.
        dtype: bf16 or fp16.
        order: HWC or CHW, the order in which the backbone leaves a map in memory.
        shapes: (C, H, W) of the four scales.
        precision: autocast type under which they were computed.
        backbone_sha256: of the pretrained checkpoint.
        data_sha256: see `core.features.data_hash`.
    """

    modality: str
    dtype: str
    order: str
    shapes: tuple[tuple[int, int, int], ...]
    precision: str
    backbone_sha256: str
    data_sha256: str


def to_stored(scales: Sequence[Tensor], header: Header) -> Tensor:
    """Four scales (B, C, H, W) as records (B, values) in the stored type.

    Raises:
        RunError: shapes are not the header's, or a value is not finite in that type.
    """
    found = tuple(tuple(scale.shape[1:]) for scale in scales)
    if found != header.shapes:
        raise RunError(f"features of {header.modality}: scales are {found}, the plan says {header.shapes}")
    axes = (0, 2, 3, 1) if header.order == "HWC" else (0, 1, 2, 3)
    flat = torch.cat([scale.permute(axes).flatten(1) for scale in scales], dim=1).to(TORCH[header.dtype])
    if not choices().holds(torch.isfinite(flat).all(), usual=True):
        raise RunError(
            f"features of {header.modality}: a value is not finite in {header.dtype};"
            " take finetune.features_dtype = bf16 or features = live"
        )
    return flat


def write_part(
    path: Path,
    header: Header,
    split: str,
    first: int,
    ids: Sequence[str],
    variants: Sequence[int],
    batches: Iterable[Tensor],
) -> dict[str, Any]:
    """Write the scales of some chips under a temporary name, sync and rename.

    Args:
        path: the file.
        header: what it shares with the others.
        split: of the chips.
        first: number of the first chip in the split.
        ids: names of the chips.
        variants: numbers of the variants, in order.
        batches: records (n, variants, values) of the chips in order, on the CPU.

    Returns:
        file (name), split, bytes, sha256, chips.
    """
    values = sum(math.prod(shape) for shape in header.shapes)
    with replacing(path) as temporary:
        with h5py.File(temporary, "w", libver=("earliest", "v110")) as file:
            shape = (len(ids), len(variants), values)
            data = file.create_dataset("scales", shape, STORED[header.dtype])
            crcs = np.zeros(shape[:2], np.uint32)
            done = 0
            for batch in batches:
                records = batch.contiguous().view(torch.int16).numpy()
                data[done : done + len(records)] = records.view(STORED[header.dtype])
                for place in np.ndindex(records.shape[:2]):
                    crcs[done + place[0], place[1]] = crc32(records[place])
                done += len(records)
            file["crc32"] = crcs
            file["id"] = _text(ids)
            facts = {**asdict(header), "format": FORMAT, "split": split, "first": first}
            file.attrs.update({**facts, "variants": _text([VARIANTS[number] for number in variants])})
        digest = file_sha256(temporary)
        size = temporary.stat().st_size
    return {"file": path.name, "split": split, "bytes": size, "sha256": digest, "chips": len(ids)}


def _text(values: Sequence[str]) -> npt.NDArray[Any]:
    encoded = [value.encode() for value in values]
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max([1, *map(len, encoded)])))


@dataclass(frozen=True)
class _Part:
    """Where the records of one file lie."""

    offset: int
    crc32: npt.NDArray[np.uint32]


class StoredScales:
    """Scales of one modality and split, by row of the split and variant.

    Attributes:
        live: type in which the backbone gives its scales, for `computable`.
    """

    def __init__(self, folder: Path, results: Mapping[str, Any], split: str, ids: Sequence[str]) -> None:
        """Files are opened when first read.

        Args:
            folder: of the files.
            results: of the features cell's record.
            split: train or val.
            ids: names of the split's chips, in order.

        Raises:
            DataError: the files do not hold as many chips.
        """
        files = [entry for entry in results["files"] if entry["split"] == split]
        self._paths = [folder / entry["file"] for entry in files]
        self._step = int(files[0]["chips"]) if files else 1
        if sum(entry["chips"] for entry in files) != len(ids):
            raise DataError(f"{folder}: does not hold the {len(ids)} chips of the {split} split; remove its record")
        self._ids = list(ids)
        self._places = {VARIANTS.index(name): place for place, name in enumerate(results["variants"][split])}
        self._shapes: list[tuple[int, int, int]] = [(c, h, w) for c, h, w in results["shapes"]]
        self._dtype, self._order = TORCH[results["dtype"]], str(results["order"])
        self.live: torch.dtype = getattr(torch, results["live_dtype"])
        self._bytes = 2 * sum(math.prod(shape) for shape in self._shapes)
        self._parts: dict[int, _Part] = {}
        self._open: dict[int, int] = {}

    def read(self, rows: Sequence[int], variants: Sequence[int]) -> tuple[Tensor, ...]:
        """Four scales (B, C, H, W) in the stored type, in memory as the backbone leaves them.

        Raises:
            DataError: a file is missing, of other chips, cut short, or a record does not match its CRC-32.
        """
        found: list[Tensor] = []
        for c, h, w in self._shapes:
            shape = (len(rows), h, w, c) if self._order == "HWC" else (len(rows), c, h, w)
            found.append(torch.empty(shape, dtype=self._dtype))
        buffers = [scale.view(torch.int16).flatten(1).numpy() for scale in found]
        for place, (row, variant) in enumerate(zip(rows, variants, strict=True)):
            self._read_into([memoryview(buffer[place]).cast("B") for buffer in buffers], row, variant)
        return tuple(scale.permute(0, 3, 1, 2) if self._order == "HWC" else scale for scale in found)

    def _read_into(self, buffers: Sequence[memoryview], row: int, variant: int) -> None:
        number, inside = divmod(row, self._step)
        part, place = self._part(number), self._places[variant]
        offset = part.offset + (inside * len(self._places) + place) * self._bytes
        crc = 0
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                got = os.preadv(self._descriptor(number), [buffer[done:]], offset + done)
                if got <= 0:
                    raise DataError(f"{self._paths[number]}: ends within chip {self._ids[row]}; remove it and go on")
                done += got
            offset += len(buffer)
            crc = crc32(buffer, crc)
        if crc != int(part.crc32[inside, place]):
            raise DataError(
                f"{self._paths[number]}: chip {self._ids[row]} does not match its CRC-32; remove the file and go on"
            )

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            path, first = self._paths[number], number * self._step
            try:
                with h5py.File(path, "r") as file:
                    part = _Part(int(file["scales"].id.get_offset()), file["crc32"][()])
                    names = [bytes(name).decode() for name in file["id"][()]]
            except (OSError, KeyError, TypeError) as error:
                raise DataError(f"{path}: no readable scales ({error}); remove it and go on") from None
            if names != self._ids[first : first + len(names)]:
                raise DataError(f"{path}: holds scales of other chips; remove it and go on")
            self._parts[number] = part
        return self._parts[number]

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[number] = os.open(self._paths[number], os.O_RDONLY)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            with suppress(OSError):
                os.close(descriptor)


def read_scales(
    stored: Mapping[str, StoredScales], rows: Sequence[int], variants: Sequence[int]
) -> dict[str, tuple[Tensor, ...]]:
    """Modality -> scales of a batch; nothing for no modality."""
    return {name: scales.read(rows, variants) for name, scales in stored.items()}


def computable(
    scales: Mapping[str, tuple[Tensor, ...]], device: torch.device, live: torch.dtype
) -> dict[str, tuple[Tensor, ...]]:
    """Stored scales on `device` in the type `live`; sent in the stored type, which is smaller."""
    return {
        name: tuple(scale.to(device, non_blocking=True).to(live) for scale in maps) for name, maps in scales.items()
    }
