"""Slumps through the years: which instances of several dates are one slump, how it grew, and where it came from.

Dates are gone through in their order. An instance continues the slumps whose last outline it shares at least half of the
smaller of the two areas with, whether that was seen at the date before or, missed since, earlier. What it shares with several is merged;
of several that continue one, the largest carries its track on and the others begin tracks of their own (split). A slump is `new` where
the ground had been mapped before, else `first`; it has vanished when its ground was mapped at a later date and it was not found again.
A file of polygons does not say which ground was mapped: nothing in it is called new, and nothing vanishes for it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtshpc.core.errors import DataError
from rtshpc.mapping import features as table
from rtshpc.mapping.attributes import ground_measures
from rtshpc.mapping.catalog import times
from rtshpc.mapping.compare.match import ROUNDING, Shapes, common_projection, flat, overlaps
from rtshpc.mapping.compare.sources import Source, words
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import in_one_crs
from rtshpc.mapping.mosaic import connected

LEAST_SHARE = 0.5
"""Of the smaller area: slumps grow by far more than they move."""
LEAST_MAPPED = 0.5
"""Of an outline: so much of its ground must have been mapped before it is called new or vanished."""
FIRST, NEW, SAME, MERGED, SPLIT, VANISHED = "first", "new", "same", "merged", "split", "vanished"
TRACK, YEAR, CHANGE, EARLIER, GROWTH, RATE = "track", "year", "change", "continues", "growth_m2", "growth_m2_per_year"


@dataclass
class _Track:
    """A slump so far.

    Attributes:
        number: 1, 2, ...
        row: where it was seen last.
        missed: the first date after that at which its ground was mapped without it.
    """

    number: int
    row: int
    missed: str = ""


@dataclass
class _Book:
    """The rows of the result.

    Attributes:
        rows: of the instances.
        facts: track, change, what it continues, growth, years since then.
    """

    rows: list[int] = field(default_factory=list[int])
    facts: list[tuple[int, str, str, float, float]] = field(default_factory=list[tuple[int, str, str, float, float]])

    def add(
        self, row: int, number: int, change: str, earlier: str = "", growth: float = np.nan, years: float = np.nan
    ) -> None:
        self.rows.append(row)
        self.facts.append((number, change, earlier, growth, years))


def track(sources: Sequence[Source], least_share: float = LEAST_SHARE) -> Features:
    """One row a slump and date, by track and date.

    Args:
        sources: maps with the columns `date` and, as maps have it, `area_m2`.
        least_share: common area of a slump at two dates over that of the smaller.

    Returns:
        The instances with the columns `track`, `year` (with decimals), `change` (first, new, same, merged, split, vanished),
        `continues` (numbers of the tracks that it continues), `growth_m2` since its last date and
        `growth_m2_per_year`; a merged or split slump grows from the areas of all before to those of all after. A
        vanished slump has its last outline, an area of 0 and the date when it was missed first.

    Raises:
        DataError: a map has no column `date`, or a date that cannot be read.
    """
    features = in_one_crs([_measured(source) for source in sources])
    shapes = flat(features.geometry, features.crs_wkt, projection := common_projection([features]))
    years = _years(features)
    grounds = _grounds(sources, projection)
    dates = sorted({*(str(date) for date in features[table.DATE]), *grounds}, key=lambda date: (_middle(date), date))
    book = _Book()
    live: list[_Track] = []
    before: Any = shapely.Polygon()
    for date in dates:
        rows = np.flatnonzero(features[table.DATE] == date)
        met = overlaps(shapes[[one.row for one in live]], shapes[rows])
        enough = met.share >= least_share - ROUNDING
        links = list(zip(met.one[enough].tolist(), met.other[enough].tolist(), strict=True))
        clusters = _clusters(len(live), len(rows), links)
        live = _go_on(features[table.AREA], years, rows, clusters, live, _covered(before, shapes[rows]), book)
        if date in grounds:
            _miss(shapes, live, set(rows.tolist()), date, grounds[date])
            before = shapely.union(before, grounds[date])
    gone = [one for one in live if one.missed]
    for one in gone:
        lost = -float(features[table.AREA][one.row])
        book.add(one.row, one.number, VANISHED, str(one.number), lost, _middle(one.missed) - years[one.row])
    return _table(features, years, book, [one.missed for one in gone])


def _measured(source: Source) -> Features:
    words(source.features, table.DATE, source.name)
    if table.AREA in source.features.columns:
        return source.features
    return source.features.with_columns(**ground_measures(list(source.features.geometry), source.features.crs_wkt))


def _middle(date: str) -> float:
    """The middle of what a date means, in years with decimals."""
    span = times(date)
    if span is None:
        raise DataError(f'date "{date}" of a map cannot be read: a year, 2020-07 or 2020-07-31 can')
    middle = span[0] + (span[1] - span[0]) / 2
    start = datetime(middle.year, 1, 1, tzinfo=UTC)
    length = datetime(middle.year + 1, 1, 1, tzinfo=UTC) - start
    return middle.year + (middle - start) / length


def _years(features: Features) -> NDArray[np.float64]:
    known = {date: _middle(date) for date in {str(date) for date in features[table.DATE]}}
    return np.array([known[str(date)] for date in features[table.DATE]], np.float64)


def _grounds(sources: Sequence[Source], projection: str) -> dict[str, Any]:
    """The ground that was mapped at each date, as far as it is known."""
    found: dict[str, list[Any]] = defaultdict(list)
    for source in sources:
        if source.grounds is not None:
            shapes = flat(source.grounds.geometry, source.grounds.crs_wkt, projection)
            for date, rows in source.grounds.rows_by(table.DATE).items():
                found[date] += shapes[rows].tolist()
    return {date: shapely.union_all(shapes) for date, shapes in found.items()}


def _go_on(
    area: NDArray[np.float64],
    years: NDArray[np.float64],
    rows: NDArray[np.int64],
    clusters: Sequence[tuple[list[int], list[int]]],
    live: list[_Track],
    known: NDArray[np.bool_],
    book: _Book,
) -> list[_Track]:
    """The tracks after a date, whose instances are entered into the book.

    Args:
        area: of all instances.
        years: of all instances.
        rows: the instances of the date.
        clusters: which of `live` and of `rows` are one.
        live: the tracks so far.
        known: which of `rows` lie on ground that was mapped before.
        book: what is told of each instance.
    """
    after: list[_Track] = []
    count = max((number for number, *_ in book.facts), default=0)
    continued: set[int] = set()
    for olds, news in clusters:
        if not news:
            continue
        largest, *others = sorted((int(rows[new]) for new in news), key=lambda row: (-area[row], row))
        if not olds:
            count += 1
            book.add(largest, count, NEW if known[news[0]] else FIRST)
            after.append(_Track(count, largest))
            continue
        continued.update(olds)
        main, *_ = ends = sorted((live[old] for old in olds), key=lambda one: (-area[one.row], one.number))
        growth = float(area[rows[news]].sum() - sum(area[one.row] for one in ends))
        earlier = ", ".join(str(one.number) for one in sorted(ends, key=lambda one: one.number))
        change = MERGED if len(ends) > 1 else SPLIT if others else SAME
        book.add(largest, main.number, change, earlier, growth, years[largest] - years[main.row])
        after.append(_Track(main.number, largest))
        for row in others:
            count += 1
            book.add(row, count, SPLIT, earlier)
            after.append(_Track(count, row))
    return [one for at, one in enumerate(live) if at not in continued] + after


def _clusters(ones: int, others: int, pairs: Sequence[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """What pairs connect, members of either side sorted; in order of the other side's first member, without it last."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for index, first in enumerate(connected(ones + others, [(one, ones + other) for one, other in pairs])):
        members = found.setdefault(first, ([], []))
        members[index >= ones].append(index if index < ones else index - ones)
    return sorted(found.values(), key=lambda sides: sides[1][0] if sides[1] else others)


def _covered(ground: Any, shapes: Shapes) -> NDArray[np.bool_]:
    return shapely.area(shapely.intersection(shapes, ground)) >= (LEAST_MAPPED - ROUNDING) * shapely.area(shapes)


def _miss(shapes: Shapes, live: Sequence[_Track], seen: set[int], date: str, ground: Any) -> None:
    """Note the date for the slumps that were not seen although their ground was mapped."""
    missing = [one for one in live if one.row not in seen and not one.missed]
    for one, there in zip(missing, _covered(ground, shapes[[one.row for one in missing]]), strict=True):
        one.missed = date if there else ""


def _table(features: Features, years: NDArray[np.float64], book: _Book, missed: Sequence[str]) -> Features:
    """The book as a table; its last rows are of slumps that vanished."""
    result = features.take(np.array(book.rows, np.int64))
    number, change, earlier, growth, passed = (
        (list(column) for column in zip(*book.facts, strict=True)) if book.facts else ([],) * 5
    )
    rate = [one / span if span > 0 else np.nan for one, span in zip(growth, passed, strict=True)]
    year, area = years[book.rows].copy() if book.rows else np.zeros(0), result[table.AREA].copy()
    date = result[table.DATE].copy()
    for row, when in enumerate(missed, len(result) - len(missed)):
        year[row], area[row], date[row] = _middle(when), 0.0, when
    result = result.with_columns(**{table.DATE: date, table.AREA: area})
    added = {
        TRACK: np.array(number, np.int64),
        YEAR: year,
        CHANGE: change,
        EARLIER: earlier,
        GROWTH: np.array(growth, np.float64),
        RATE: np.array(rate, np.float64),
    }
    result = Features(result.crs_wkt, result.geometry, added | dict(result.columns))
    return result.take(np.lexsort((result[YEAR], result[TRACK])))


def summary(tracks: Features) -> dict[str, Any]:
    """Counts of slumps and changes, and the growth of those that were seen more than once."""
    return {
        "slumps": len(set(tracks[TRACK].tolist())),
        "dates": sorted({str(date) for date in tracks[table.DATE]}),
        "changes": dict(sorted(Counter(str(change) for change in tracks[CHANGE]).items())),
        "growth_m2": float(np.nansum(tracks[GROWTH])),
    }
