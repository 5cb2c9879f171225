"""Samples out of shards: one read a chip, a whole batch at once, files opened once in each process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from rtshpc.core.config import AugmentConfig, DataConfig
from rtshpc.core.errors import DataError, unknown
from rtshpc.core.records import SILENT, Progress, file_sha256, read_json
from rtshpc.data.augment import augment as augmented
from rtshpc.data.normalise import normalise
from rtshpc.data.sample import Sample, Target, target_of
from rtshpc.data.shard import VALID, ids_of, load_plugins, record_crc

SPLITS = ("train", "val", "test")
_LZ4 = 32004


class ShardFile:
    """One shard, open in this process.

    Records without a filter are read past HDF5 with one `pread` each, at the offsets that HDF5 names; others
    through HDF5. `pread` shares no file position, so a handle is harmless to a forked child, yet `ShardFiles`
    opens its own in every process because HDF5's are not.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            DataError: the file is missing or no whole shard.
        """
        self.path = path
        try:
            self._file = h5py.File(path, "r")
            self._data = self._file["chips"]
            self.dtype: np.dtype[Any] = self._data.dtype
            self.crc32: npt.NDArray[np.uint32] = self._file["crc32"][()]
            self._starts = self._file["class_start"][()]
            self._classes = self._file["classes"][()]
            self.scaling: npt.NDArray[np.float64] = self._file["scaling"][()]
            names = [bytes(name).decode() for name in self._file.attrs["modalities"]]
        except (OSError, KeyError) as error:
            raise DataError(f"{path}: no readable shard ({error}); run preprocess again") from None
        self.order = {name: number for number, name in enumerate(names)}
        self._fd = os.open(path, os.O_RDONLY)
        plan = self._data.id.get_create_plist()
        filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
        if _LZ4 in filters:
            load_plugins()
        self._offsets = None if filters else self._chunk_offsets()

    def _chunk_offsets(self) -> npt.NDArray[np.int64]:
        offsets = np.zeros(len(self), dtype=np.int64)

        def note(chunk: Any) -> None:
            offsets[chunk.chunk_offset[0]] = chunk.byte_offset

        self._data.id.chunk_iter(note)
        return offsets

    def __len__(self) -> int:
        return len(self.crc32)

    def read_into(self, row: int, out: memoryview) -> None:
        """Read the record of `row` into `out`, `dtype.itemsize` bytes.

        Raises:
            DataError: the file ends before the record does.
        """
        if self._offsets is None:
            target = np.frombuffer(out, dtype=self.dtype)
            self._data.read_direct(target, np.s_[row : row + 1])
            return
        offset, done = int(self._offsets[row]), 0
        while done < len(out):
            got = os.preadv(self._fd, [out[done:]], offset + done)
            if got <= 0:
                raise DataError(f"{self.path}: ends within chip {row}; run preprocess again")
            done += got

    def classes(self, row: int) -> npt.NDArray[np.uint16]:
        """Class of instance 1..n of a chip."""
        return self._classes[self._starts[row] : self._starts[row + 1]]

    def check(self, row: int, record: npt.NDArray[np.uint8]) -> None:
        """Compare a record's bytes with its CRC.

        Raises:
            DataError: they differ.
        """
        if record_crc([record], self.classes(row)) != int(self.crc32[row]):
            raise DataError(f"{self.path}: chip {row} does not match its CRC-32; run preprocess again")

    def close(self) -> None:
        """Give both handles back."""
        self._file.close()
        os.close(self._fd)


class ShardFiles:
    """The shards of a data set, each opened on first use in each process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, ShardFile] = {}
        self._pid = os.getpid()

    def __getitem__(self, name: str) -> ShardFile:
        if self._pid != os.getpid():
            # A fork: the parent's HDF5 handles are not ours to use or to close.
            self._open, self._pid = {}, os.getpid()
        if name not in self._open:
            self._open[name] = ShardFile(self._folder / name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": {}, "_pid": os.getpid()}


@dataclass(frozen=True)
class RawBatch:
    """Records as they lie in the shards.

    Attributes:
        data: (B, record) uint8.
        dtype: NumPy type of a record.
        rows: position in the data set of each.
    """

    data: Tensor
    dtype: np.dtype[Any]
    rows: tuple[int, ...]

    def records(self) -> npt.NDArray[Any]:
        """The same memory as (B,) records; fields as in `data.shard`."""
        return self.data.numpy().view(self.dtype)[:, 0]


class ShardDataset(Dataset[Sample]):
    """The chips of one split as samples.

    A sample is a function of the shard, the config and, with `augment`, of (seed, epoch, id): neither order nor
    worker matter. `torch.utils.data.DataLoader` calls `__getitems__` with a whole batch.
    """

    def __init__(
        self,
        index: Path,
        data: DataConfig,
        split: str,
        modalities: Sequence[str],
        augment: AugmentConfig | None = None,
        seed: int = 0,
        verify: bool = False,
        images: bool = True,
    ) -> None:
        """Read the index; shards are opened when first needed.

        Args:
            index: `shards/index.json`.
            data: the data set; its `chip.enlarge` sizes the samples.
            split: train, val, test, or "" for all chips.
            modalities: which to give, the primary first.
            augment: change the samples; None = as stored.
            seed: of the augmentation.
            verify: compare every record with its CRC-32.
            images: give images; without, samples have labels and validity only.

        Raises:
            DataError: there is no index, or it lacks the split's name or a modality.
        """
        if split and split not in SPLITS:
            raise DataError(unknown("split", split, SPLITS))
        self._index = read_index(index)
        known: Mapping[str, Any] = self._index["modalities"]
        for name in modalities:
            if name not in known:
                raise DataError(unknown(f"{index}: modality", name, known))
        self.chips: list[dict[str, Any]] = [chip for chip in self._index["chips"] if split in ("", chip["split"])]
        self.modalities = tuple(modalities)
        self.channels: dict[str, int] = {name: known[name]["channels"] for name in modalities}
        self.classes: tuple[str, ...] = tuple(self._index["classes"])
        self.enlarge = data.chip.enlarge
        self.size_px = data.chip.size_px * data.chip.enlarge
        self._files = ShardFiles(index.parent)
        self._augment, self._seed, self._verify, self._images = augment, seed, verify, images
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that augmentation draws for (with workers: before the loader is iterated)."""
        self._epoch = epoch

    @property
    def ids(self) -> list[str]:
        """Names of the chips, in order."""
        return [chip["id"] for chip in self.chips]

    def __len__(self) -> int:
        return len(self.chips)

    def __getitem__(self, row: int) -> Sample:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Sample]:
        """Samples of `rows`, read in one go."""
        samples: list[Sample | None] = [None] * len(rows)
        for places, batch in self._read_groups(rows):
            for place, record in zip(places, batch.records(), strict=True):
                samples[place] = self._decode(self.chips[rows[place]], record)
        return [sample for sample in samples if sample is not None]

    def read(self, rows: Sequence[int], shared: bool = False) -> RawBatch:
        """Records of `rows` in one piece of memory, undecoded.

        Args:
            rows: positions in the data set.
            shared: put them where another process can have them without a copy.

        Raises:
            DataError: they are not all of one layout.
        """
        groups = list(self._read_groups(rows, shared))
        if len(groups) != 1:
            raise DataError(f"{len(groups)} layouts of records in one batch; read them apart")
        return groups[0][1]

    def _read_groups(self, rows: Sequence[int], shared: bool = False) -> list[tuple[list[int], RawBatch]]:
        """Places in `rows` and their records, apart by layout (all chips of a set mostly have one)."""
        layouts: dict[np.dtype[Any], list[int]] = {}
        for place, row in enumerate(rows):
            layouts.setdefault(self._files[self.chips[row]["shard"]].dtype, []).append(place)
        groups: list[tuple[list[int], RawBatch]] = []
        for dtype, places in layouts.items():
            data = _empty((len(places), dtype.itemsize), shared)
            array = data.numpy()
            for number, place in enumerate(places):
                chip = self.chips[rows[place]]
                file = self._files[chip["shard"]]
                file.read_into(chip["row"], memoryview(array[number]))
                if self._verify:
                    file.check(chip["row"], array[number])
            groups.append((places, RawBatch(data, dtype, tuple(rows[place] for place in places))))
        return groups

    def _decode(self, chip: Mapping[str, Any], record: Any) -> Sample:
        file = self._files[chip["shard"]]
        ids = ids_of(record)
        size = ids.shape[-1]
        images: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        for name in self.modalities:
            mask = np.unpackbits(record[name + VALID], axis=-1, count=size).view(np.bool_)
            valid[name] = torch.from_numpy(mask)
            if not self._images:
                continue
            facts = self._index["modalities"][name]
            scale, offset = file.scaling[chip["row"], file.order[name]]
            images[name] = normalise(record[name], mask, (float(scale), float(offset)), facts["mean"], facts["std"])
        target = target_of(torch.from_numpy(ids), file.classes(chip["row"]).tolist())
        sample = Sample(
            id=chip["id"],
            scene=chip["scene"],
            site=chip["site"],
            images=images,
            valid=valid[self.modalities[0]],
            target=target,
            transform=tuple(chip["transform"]),
            crs_wkt=chip["crs_wkt"],
            native_size=(size, size),
            modality_valid=valid,
        )
        if self.enlarge > 1:
            sample = enlarged(sample, self.enlarge)
        return sample if self._augment is None else augmented(sample, self._augment, self._seed, self._epoch)


def _empty(shape: tuple[int, int], shared: bool) -> Tensor:
    """Bytes to read into; `Tensor.share_memory_` would copy what is not there yet."""
    if not shared:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(shape[0] * shape[1])
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _repeated(layers: Tensor, times: int) -> Tensor:
    return layers.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def enlarged_image(layers: Tensor, valid: Tensor, times: int) -> Tensor:
    """An image (C, H, W) with `times` as many pixels a side, bilinear; `valid` (H, W).

    Nodata is 0 and stays 0: its neighbours must not bleed into it.
    """
    large = F.interpolate(layers[None], scale_factor=times, mode="bilinear", align_corners=False)[0]
    return large * _repeated(valid, times)


def enlarged(sample: Sample, times: int) -> Sample:
    """`sample` with `times` as many pixels a side: images bilinear, masks and validity repeated."""

    def mask(layers: Tensor) -> Tensor:
        return _repeated(layers, times)

    valid = {name: mask(layers) for name, layers in sample.modality_valid.items()}
    old = sample.target
    return Sample(
        id=sample.id,
        scene=sample.scene,
        site=sample.site,
        images={n: enlarged_image(layers, sample.modality_valid[n], times) for n, layers in sample.images.items()},
        valid=mask(sample.valid),
        target=Target(old.boxes * times, old.classes, mask(old.masks), mask(old.ignore)),
        transform=sample.transform,
        crs_wkt=sample.crs_wkt,
        native_size=sample.native_size,
        modality_valid=valid,
    )


def read_index(path: Path) -> dict[str, Any]:
    """`shards/index.json`.

    Raises:
        DataError: it is not there or not whole.
    """
    value = read_json(path)
    if not isinstance(value, dict) or "chips" not in value:
        raise DataError(f"{path}: no index of shards; run the stages preprocess and gather first")
    return value


def verify_shards(index: Path) -> list[str]:
    """Names of the shards that are missing or do not match their SHA-256."""
    wanted: dict[str, str] = read_index(index)["shards"]
    return [
        name
        for name, digest in sorted(wanted.items())
        if not (index.parent / name).is_file() or file_sha256(index.parent / name) != digest
    ]


def require_whole_shards(index: Path, progress: Progress = SILENT) -> None:
    """Compare every shard with its SHA-256; those that differ are removed, which makes their preprocess cell undone.

    Raises:
        DataError: some are missing or were altered.
    """
    progress("verify shards", 0, 1)
    bad = verify_shards(index)
    for name in bad:
        (index.parent / name).unlink(missing_ok=True)
    if bad:
        raise DataError(
            f"{index.parent}: not what preprocess wrote, so removed: {', '.join(bad)}; run the sweep again, or"
            " `retry`, to cut them anew"
        )
    progress("verify shards", 1, 1)
