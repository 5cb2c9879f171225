"""The HDF5 file of chips: its layout and its writer.

A shard holds one compound record a chip in `chips` (n,), stored as one chunk each, so that a sample is one
contiguous read; plain h5py opens it (`file["chips"][3]["rgb"]`). The fields of a record:

- one per modality, (C, H, W) in the raster's own type, exactly as stored there;
- `<modality>:valid`, (H, ceil(W / 8)) uint8, bits of a row, 1 = data, most significant bit first;
- `:ids`, (H, W) uint8, 0 = ground, 1..n = instances, 255 = unlabelled; uint16 and 65535 in a shard for scenes of
  more than 254 instances.

Beside it: `crc32` (n,) of each record's bytes and classes; `class_start` (n + 1,) and `classes`: class of
instance k of chip i is `classes[class_start[i] + k - 1]`; `scaling` (n, M, 2): scale and offset to the
modality's unit; `statistics/<modality>` (n, C, 5): count, mean, m2, min, max in that unit; `transform` (n, 6);
`id`, `scene`, `site`, `crs_wkt` (n,).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from rtshpc.core.errors import MissingExtra
from rtshpc.core.records import crc32, file_sha256, replacing
from rtshpc.data.normalise import Statistics
from rtshpc.data.sample import IGNORE_ID

FORMAT = 2
"""Version of the layout above; format 1 had two bytes an id everywhere, and is read like any other."""
IDS = ":ids"
VALID = ":valid"
MOST_INSTANCES = IGNORE_ID - 1
MOST_IN_A_BYTE = 254
APART_BYTES = 1 << 20
"""Larger records are written without making one piece of their parts, and begin with a page: that costs less."""
PAGE_BYTES = 4096
_IGNORE_BYTE = 255

Compression = Literal["none", "lz4", "gzip"]


@dataclass(frozen=True)
class Layout:
    """What a record of a shard looks like.

    Attributes:
        size_px: side of a chip.
        modalities: name -> (channels, NumPy type), in order.
        wide_ids: two bytes an instance id instead of one.
    """

    size_px: int
    modalities: tuple[tuple[str, int, str], ...]
    wide_ids: bool = False

    @classmethod
    def of(cls, pixels: Mapping[str, npt.NDArray[Any]], instances: int = 0) -> Layout:
        """The layout of chips like this one: modality -> (C, H, W), with at most so many instances each."""
        size = next(iter(pixels.values())).shape[-1]
        kinds = tuple((name, len(layers), layers.dtype.newbyteorder("<").str) for name, layers in pixels.items())
        return cls(size, kinds, instances > MOST_IN_A_BYTE)

    def holds(self, other: Layout) -> bool:
        """Whether a chip of the layout `other` can be written in this one."""
        return self == replace(other, wide_ids=self.wide_ids) and self.wide_ids >= other.wide_ids

    @property
    def dtype(self) -> np.dtype[Any]:
        """The record as a packed NumPy type; pixels first, so that all of them start aligned to their size."""
        side, packed = self.size_px, -(-self.size_px // 8)
        order = sorted(self.modalities, key=lambda entry: -np.dtype(entry[2]).itemsize)
        fields: list[Any] = [(name, kind, (channels, side, side)) for name, channels, kind in order]
        ids = "<u2" if self.wide_ids else "u1"
        fields.insert(sum(np.dtype(kind).itemsize > 1 for _, _, kind in order), (IDS, ids, (side, side)))
        fields += [(name + VALID, "u1", (side, packed)) for name, _, _ in order]
        return np.dtype(fields)


@dataclass(frozen=True)
class Chip:
    """What a chip's record does not say about it.

    Attributes:
        id: name of the chip.
        scene: scene it was cut from.
        site: site of the scene.
        transform: affine a, b, c, d, e, f from chip pixel to CRS coordinates.
        crs_wkt: the CRS.
    """

    id: str
    scene: str
    site: str
    transform: tuple[float, ...]
    crs_wkt: str


class _Discarded(Exception):
    """Makes the temporary file go away instead of into its place."""


class ShardWriter:
    """Writes one shard under a temporary name; `close` syncs it and renames it into place.

    Used as a context manager, an exception leaves nothing behind. The same chips give the same bytes.
    """

    def __init__(self, path: Path, layout: Layout, compression: Compression = "none") -> None:
        self.path = path
        self.layout = layout
        self.dtype = layout.dtype
        self._chips: list[Chip] = []
        self._crcs: list[int] = []
        self._classes: list[list[int]] = []
        self._scaling: list[list[tuple[float, float]]] = []
        self._statistics: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name, _, _ in layout.modalities}
        self._direct = compression == "none"
        self._apart = self._direct and self.dtype.itemsize >= APART_BYTES
        self._stack = ExitStack()
        temporary = self._stack.enter_context(replacing(path))
        # Nobody else knows the temporary name; the lock of HDF5 stays on all the same. The driver is the one with a handle.
        options: dict[str, Any] = {"alignment_threshold": APART_BYTES, "alignment_interval": PAGE_BYTES}
        file = h5py.File(temporary, "w", driver="sec2", libver=("earliest", "v110"), **options)
        self._file = self._stack.enter_context(file)
        self._handle: int = self._file.id.get_vfd_handle()
        self._data = self._file.create_dataset(
            "chips", shape=(0,), maxshape=(None,), chunks=(1,), dtype=self.dtype, **_filters(compression)
        )

    def __len__(self) -> int:
        return len(self._chips)

    @property
    def size_bytes(self) -> int:
        """Uncompressed bytes of the records so far."""
        return len(self._chips) * self.dtype.itemsize

    def append(
        self,
        chip: Chip,
        pixels: Mapping[str, npt.NDArray[Any]],
        valid: Mapping[str, npt.NDArray[np.bool_]],
        ids: npt.NDArray[Any],
        classes: Sequence[int],
        scaling: Mapping[str, tuple[float, float]],
        statistics: Mapping[str, Statistics],
    ) -> int:
        """Add one chip.

        Args:
            chip: its name and place.
            pixels: modality -> (C, H, W) in the layout's types.
            valid: modality -> (H, W).
            ids: (H, W) integer, 0..n and `IGNORE_ID`.
            classes: class of instance 1..n.
            scaling: modality -> scale and offset to its unit.
            statistics: modality -> moments of the valid pixels, in the unit.

        Returns:
            The chip's row in the shard.

        Raises:
            ValueError: more instances than the layout's ids can tell apart, or an array of another shape.
        """
        row = len(self._chips)
        if len(classes) > (MOST_INSTANCES if self.layout.wide_ids else MOST_IN_A_BYTE):
            raise ValueError(f"{chip.id}: {len(classes)} instances do not fit in {self.layout}")
        parts = self._parts(pixels, valid, ids)
        self._data.id.set_extent((row + 1,))
        if self._apart:
            self._write(row, parts)
        elif self._direct:
            # A whole chunk as bytes: no conversion, no chunk cache.
            self._data.id.write_direct_chunk((row,), b"".join(part.tobytes() for part in parts.values()))
        else:
            record = np.zeros((), dtype=self.dtype)
            for name, part in parts.items():
                record[name] = part
            self._data[row] = record
        for name, _, _ in self.layout.modalities:
            self._statistics[name].append(statistics[name].to_array())
        self._crcs.append(record_crc(parts.values(), classes))
        self._classes.append(list(classes))
        self._scaling.append([scaling[name] for name, _, _ in self.layout.modalities])
        self._chips.append(chip)
        return row

    def _parts(
        self,
        pixels: Mapping[str, npt.NDArray[Any]],
        valid: Mapping[str, npt.NDArray[np.bool_]],
        ids: npt.NDArray[Any],
    ) -> dict[str, npt.NDArray[Any]]:
        """The fields of a record in their order, in the layout's types."""
        packed: dict[int, npt.NDArray[np.uint8]] = {}
        fields: dict[str, npt.NDArray[Any]] = {IDS: ids}  # one byte keeps the lower one, which makes `IGNORE_ID` 255
        for name, _, _ in self.layout.modalities:
            mask = valid[name]
            if id(mask) not in packed:  # modalities of the same bands share one mask
                packed[id(mask)] = np.packbits(mask, axis=-1)
            fields[name], fields[name + VALID] = pixels[name], packed[id(mask)]
        assert self.dtype.names is not None
        parts = {name: np.ascontiguousarray(fields[name], self.dtype[name].base) for name in self.dtype.names}
        for name, part in parts.items():
            if part.shape != self.dtype[name].shape:
                raise ValueError(f"{name} is of shape {part.shape}, not {self.dtype[name].shape}")
        return parts

    def _write(self, row: int, parts: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a large record where HDF5 has made room for it, part by part: through it they would be copied into one.

        The look for the room takes longer with every row, so that small records, of which a shard holds many, are copied.
        """
        offset = self._data.id.get_chunk_info_by_coord((row,)).byte_offset
        for part in parts.values():
            left = memoryview(part).cast("B")
            while left:
                done = os.pwrite(self._handle, left, offset)
                left, offset = left[done:], offset + done

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` chips."""
        for part in (self._chips, self._crcs, self._classes, self._scaling, *self._statistics.values()):
            del part[count:]
        self._data.resize((count,))

    def discard(self) -> None:
        """Leave nothing behind."""
        self.__exit__(_Discarded, _Discarded(), None)

    def close(self) -> str:
        """Write what lies beside the records, sync, hash and rename; returns the file's SHA-256."""
        starts = np.cumsum([0, *map(len, self._classes)], dtype=np.int64)
        self._file["class_start"] = starts
        self._file["classes"] = np.array([kind for kinds in self._classes for kind in kinds], dtype=np.uint16)
        self._file["crc32"] = np.array(self._crcs, dtype=np.uint32)
        count = len(self._chips)
        self._file["scaling"] = np.array(self._scaling, dtype=np.float64).reshape(count, -1, 2)
        self._file["transform"] = np.array([chip.transform[:6] for chip in self._chips], dtype=np.float64).reshape(
            -1, 6
        )
        for name, tables in self._statistics.items():
            self._file[f"statistics/{name}"] = np.stack(tables)
        for field in ("id", "scene", "site", "crs_wkt"):
            self._file[field] = _text([getattr(chip, field) for chip in self._chips])
        self._file.attrs["format"] = FORMAT
        self._file.attrs["size_px"] = self.layout.size_px
        self._file.attrs["modalities"] = _text([name for name, _, _ in self.layout.modalities])
        temporary = Path(self._file.filename)
        self._file.close()
        digest = file_sha256(temporary)
        self._stack.close()
        return digest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, trace)


def _text(values: Sequence[str]) -> npt.NDArray[Any]:
    """Texts as fixed-length UTF-8: variable-length strings would need a second read each."""
    encoded = [value.encode() for value in values]
    length = max([1, *map(len, encoded)])
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", length))


def _filters(compression: Compression) -> dict[str, Any]:
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    if compression == "lz4":
        return dict(load_plugins().LZ4())
    # Room for a record is made with its row, and not filled.
    places = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    places.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return {"dcpl": places, "fill_time": "never"}


def load_plugins() -> Any:
    """The module `hdf5plugin`, which registers the LZ4 filter with HDF5.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import hdf5plugin
    except ImportError:
        raise MissingExtra("data.shard.compression = lz4 needs hdf5plugin, which is not installed") from None
    return hdf5plugin


def ids_of(record: Any) -> npt.NDArray[np.int32]:
    """Instance ids of a record, (H, W), with `IGNORE_ID` where nothing is labelled."""
    stored = record[IDS]
    ids = stored.astype(np.int32)
    if stored.dtype.itemsize == 1:
        ids[stored == _IGNORE_BYTE] = IGNORE_ID
    return ids


def record_crc(parts: Iterable[npt.NDArray[Any]], classes: Sequence[int]) -> int:
    """CRC-32 of a record's bytes, part by part, and its instances' classes."""
    total = 0
    for part in parts:
        total = crc32(part, total)
    return crc32(np.asarray(classes, dtype="<u2").tobytes(), total)


def statistics_in(path: Path, rows: Sequence[int]) -> dict[str, list[Statistics]]:
    """Modality -> moments of the chips at `rows` of a shard."""
    chosen = np.asarray(sorted(rows), dtype=np.int64)
    with h5py.File(path, "r") as file:
        group = file["statistics"]
        return {name: [Statistics.from_array(table) for table in group[name][()][chosen]] for name in group}
