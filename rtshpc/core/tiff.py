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
            return cls(path, os.fstat(descriptor).st_size, _whole_read(descriptor, 0, HEAD_BYTES))
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
            found.setdefault(tag, TiffTag(_FORMS.get(kind, "B"), length, offset, taken))  # libtiff keeps the first
        return found

    def values(self, tag: int, most: int = 6000) -> tuple[Any, ...]:
        """The first `most` values of a tag, rationals as two numbers; empty where there is none, or they are lost."""
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
        """Size and georeference that the file states; None where GDAL might take others, or another meaning.

        Two rasters that state the same lie on the same grid, whatever it is: one scale, one tie point, the same keys. By
        default GDAL lets files of metadata beside a raster (`.aux.xml`, `.aux`) overrule its tags, and asks others
        (`.xml`, world files) only where tags are of no use; heights in scale or tie point become the band's scale.
        """
        place = tuple(self.values(tag) for tag in (PIXEL_SCALE, TIE_POINTS))
        forms = [self.tags[tag].form for tag in (PIXEL_SCALE, TIE_POINTS) if tag in self.tags]
        if MATRIX in self.tags or forms != ["d", "d"] or list(map(len, place)) != [3, 6]:
            return None
        (across, down, high), tie = place
        if not (across > 0 and down > 0 and high in (0, 1) and tie[2] == tie[5] == 0):
            return None
        keys = [self.values(tag) for tag in GEO_KEYS]
        lost = any(self.tags[tag].length != len(keys[at]) for at, tag in enumerate(GEO_KEYS) if tag in self.tags)
        if not keys[0] or lost or self._has_company():
            return None
        return self.values(WIDTH), self.values(HEIGHT), *place, *keys

    def _has_company(self) -> bool:
        """Whether there are files beside it whose georeference GDAL might take."""
        stem, name = os.path.splitext(self.path)[0], str(self.path)
        beside = (
            f"{name}.aux.xml",
            f"{name}.aux",
            f"{name}.AUX",
            f"{stem}.aux",
            f"{stem}.AUX",
            f"{stem}.xml",
            f"{stem}.XML",
        )
        return any(os.access(one, os.F_OK) for one in beside)

    @property
    def _order(self) -> str:
        return {b"II": "<", b"MM": ">"}[self.start[:2]]

    def _read(self, offset: int, count: int) -> bytes:
        if offset + count <= len(self.start):
            return self.start[offset : offset + count]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return _whole_read(descriptor, offset, count)
        finally:
            os.close(descriptor)


def _whole_read(descriptor: int, offset: int, count: int) -> bytes:
    """`count` bytes of an open file, fewer only where it ends: a read may give less."""
    content = os.pread(descriptor, count, offset)
    while 0 < len(content) < count and (more := os.pread(descriptor, count - len(content), offset + len(content))):
        content += more
    return content


def tiff_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a TIFF or BigTIFF from its first directory, px; None for other or unreadable files."""
    try:
        head = FileHead.of(path)
    except (OSError, ValueError):
        return None
    whole = (tag for tag in (WIDTH, HEIGHT) if tag in head.tags and head.tags[tag].form in ("H", "I", "Q"))
    sides = [side for tag in whole for side in head.values(tag, 1) if side > 0]
    return (sides[0], sides[1]) if len(sides) == 2 else None
