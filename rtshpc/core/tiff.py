"""The first bytes of a file and, for a TIFF or BigTIFF, the directory they lead to. Standard library only."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

HEAD_BYTES = 4096
"""Read at once: the directories of most files lie whole in so many bytes."""
_MOST_TAGS = 1000

_FORMS = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 18),
        ["B", "B", "H", "I", "II", "b", "B", "h", "i", "ii", "f", "d", "I", "Q", "q", "Q"],
        strict=True,
    )
)
_SIZES = {kind: struct.calcsize("<" + form) for kind, form in _FORMS.items()}

WIDTH, HEIGHT = 256, 257
PIXEL_SCALE, TIE_POINTS, MATRIX = 33550, 33922, 34264
GEO_KEYS = (34735, 34736, 34737)
"""Tags of GeoTIFF 1.1 (OGC 19-008r4), section 7.1."""


class TiffTag(NamedTuple):
    """An entry of a TIFF directory: where its values lie in the file, and in which form."""

    form: str
    length: int
    offset: int
    size: int


@dataclass(frozen=True)
class FileHead:
    """How a file begins.

    Attributes:
        path: the file.
        size: of the whole file, bytes.
        start: its first `HEAD_BYTES`.
    """

    path: Path
    size: int
    start: bytes

    @classmethod
    def of(cls, path: Path) -> FileHead:
        """Read it, without waiting for the writer of a pipe. Raises OSError, and ValueError for what is no path."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return cls(path, os.fstat(descriptor).st_size, os.read(descriptor, HEAD_BYTES))
        finally:
            os.close(descriptor)

    @cached_property
    def tags(self) -> dict[int, TiffTag]:
        """Tag -> entry of the first directory of a TIFF or BigTIFF; empty for what is none."""
        found: dict[int, TiffTag] = {}
        try:
            order = self._order
            big = struct.unpack_from(order + "H", self.start, 2)[0] == 43
            entry, number, word, at = ("HHQ8s", "Q", "Q", 8) if big else ("HHI4s", "H", "I", 4)
            pointer = struct.unpack_from(order + word, self.start, at)[0]
            first, size = pointer + struct.calcsize(order + number), struct.calcsize(order + entry)
            count = struct.unpack(order + number, self._read(pointer, first - pointer))[0]
            table = self._read(first, size * min(count, _MOST_TAGS))
        except (OSError, KeyError, struct.error, OverflowError):
            return found
        room = struct.calcsize(order + word)
        whole = len(table) - len(table) % size
        for place, row in enumerate(struct.iter_unpack(order + entry, table[:whole])):
            tag, kind, length, value = row
            taken = _SIZES.get(kind, 1) * length
            offset = first + (place + 1) * size - room if taken <= room else struct.unpack(order + word, value)[0]
            found[tag] = TiffTag(_FORMS.get(kind, "B"), length, offset, taken)
        return found

    def values(self, tag: int, most: int = 6000) -> tuple[Any, ...]:
        """The values of a tag, at most `most`; empty where there is none, or they lie beyond the end of the file."""
        entry = self.tags.get(tag)
        if entry is None:
            return ()
        number = min(entry.length, most)
        try:
            stored = self._read(entry.offset, number * struct.calcsize("<" + entry.form))
            return struct.unpack(self._order + entry.form * number, stored)
        except (OSError, struct.error, OverflowError):
            return ()

    def cut_off(self) -> str:
        """What of a TIFF's tags lies beyond the end of the file, or nothing.

        Readers skip a tag whose values are lost, be it the CRS, the nodata value or the band names.
        """
        for tag, entry in self.tags.items():
            if entry.offset + entry.size > self.size:
                return f"the values of TIFF tag {tag} lie beyond its end at byte {self.size}"
        return ""

    def stated_place(self) -> tuple[tuple[Any, ...], ...] | None:
        """Size and georeference that the file states; None where it states no whole one, or others may overrule it.

        Two rasters that state the same lie on the same grid, whatever it is. GDAL lets files of metadata beside a
        raster (`.aux.xml`, `.aux`) overrule its tags, but asks world files only where it has none.
        """
        placed = MATRIX in self.tags or (PIXEL_SCALE in self.tags and TIE_POINTS in self.tags)
        if not placed or GEO_KEYS[0] not in self.tags:
            return None
        stem, name = os.path.splitext(self.path)[0], str(self.path)
        beside = (f"{name}.aux.xml", f"{stem}.aux", f"{stem}.AUX", f"{name}.aux", f"{name}.AUX")
        if any(os.access(one, os.F_OK) for one in beside):
            return None
        stated: list[tuple[Any, ...]] = []
        for tag in (WIDTH, HEIGHT, PIXEL_SCALE, TIE_POINTS, MATRIX, *GEO_KEYS):
            entry, values = self.tags.get(tag), self.values(tag)
            if entry is not None and len(values) != entry.length * len(entry.form):
                return None
            stated.append((entry and entry.form, *values))
        return tuple(stated)

    @property
    def _order(self) -> str:
        return {b"II": "<", b"MM": ">"}[self.start[:2]]

    def _read(self, offset: int, count: int) -> bytes:
        if offset + count <= len(self.start):
            return self.start[offset : offset + count]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, count, offset)
        finally:
            os.close(descriptor)


def tiff_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a TIFF or BigTIFF from its first directory, px; None for other or unreadable files."""
    try:
        head = FileHead.of(path)
    except (OSError, ValueError):
        return None
    width, height = head.values(WIDTH, 1), head.values(HEIGHT, 1)
    return (int(width[0]), int(height[0])) if width and height else None
