"""Entries and tables: every figure of the report with the place it comes from, and their Markdown and CSV forms."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rtshpc.report.collect import CellResult

MIB = float(2**20)


@dataclass(frozen=True)
class Entry:
    """One statement of the report.

    Attributes:
        text: what is shown.
        kind: text, number, code, paper (printed there, not measured here) or missing.
        source: where it comes from, `FILE#dotted.key`, several joined by ` | `; empty for plain words.
        note: small print under it.
        value: the number at full precision, as its source holds it; None for words.
        scale: what it is divided by where it is shown.
    """

    text: str
    kind: str = "text"
    source: str = ""
    note: str = ""
    value: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """Rows of entries under named columns.

    Attributes:
        name: file name of the CSV, without ending.
        caption: what the table shows, with units; a sentence.
        notes: what a reader must know, below the table.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers and are set right."""
        kinds = [{row[i].kind for row in self.rows} for i in range(len(self.columns))]
        return tuple(bool(found & {"number", "paper"}) for found in kinds)


def words(value: Any, note: str = "", source: str = "") -> Entry:
    """Plain words (a name, a setting)."""
    return Entry("" if value is None else str(value), "text", source, note)


def code(value: Any, source: str = "") -> Entry:
    """An identifier, shown in a fixed-width face."""
    return Entry("" if value is None else str(value), "code", source)


def missing(reason: str, source: str = "") -> Entry:
    """`not measured`, with the reason."""
    return Entry("not measured", "missing", source, reason)


def number(value: Any, source: str, places: int = 0, scale: float = 1.0, note: str = "", reason: str = "") -> Entry:
    """A number of a record, divided by `scale` and shown with `places` decimals; `not measured` where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return missing(reason or "the record holds no value", source)
    shown = value / scale
    return Entry(thousands(shown, places), "number", source, note, value, scale)


def places_for(value: float, figures: int = 4) -> int:
    """Decimals that show so many figures of a number, none of a large one."""
    return max(0, figures - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 0


def thousands(value: float, places: int = 0) -> str:
    """`12 345.6`, with narrow spaces that do not break."""
    return f"{value:,.{places}f}".replace(",", "\u202f")


def measured(result: CellResult, key: str, places: int = 0, scale: float = 1.0, note: str = "") -> Entry:
    """The number under `key` of a cell's results, with its source; `not measured` and why where there is none."""
    if result.record is None:
        return missing(result.reason, result.source)
    source = f"{result.source}#results.{key}"
    return number(result.get(key), source, places, scale, note, "undefined: the record holds no value")


def printed(value: float | None, places: int, note: str = "", unit: str = "") -> Entry:
    """A figure of the paper; a dash where the paper printed none."""
    if value is None:
        return Entry("–", "text", "", note)
    return Entry(f"{value:.{places}f}{unit}", "paper", "paper", note, value)


def signed(value: float, places: int, source: str, note: str = "") -> Entry:
    """A difference with its sign (U+2212 for minus)."""
    return Entry(sign(value, places), "number", source, note, value)


def sign(value: float, places: int) -> str:
    """`+4.1`, `−0.3`, `0.0`."""
    text = f"{abs(value):.{places}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def sources(*entries: Entry) -> str:
    """The joined sources of a derived figure."""
    return " | ".join(entry.source for entry in entries if entry.source)


def modality_name(name: str) -> str:
    """`rgb` -> `RGB`; longer names stay as the config spells them."""
    return name.upper() if len(name) <= 4 and name.isalpha() else name


def modality_set(names: Iterable[str]) -> str:
    """`RGB+NDVI+NIR`."""
    return "+".join(modality_name(name) for name in names)


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#!~$&])")
_MARKDOWN_FIRST = re.compile(r"^(?:([-+])(?=[\s-]|$)|(\d+)([.)])(?=\s|$))")
_BREAKS = re.compile(r"\s+")


def markdown(text: str) -> str:
    """`text` as literal Markdown on one line: no markup and no table border can come out of a name."""
    literal = _MARKDOWN.sub(r"\\\1", _BREAKS.sub(" ", text).strip())
    return _MARKDOWN_FIRST.sub(_no_list, literal)


def _no_list(found: re.Match[str]) -> str:
    """What would begin a list or a rule, as text."""
    sign, digits, dot = found.groups()
    return f"\\{sign}" if sign else f"{digits}\\{dot}"


def markdown_entry(entry: Entry) -> str:
    """An entry as a Markdown table field."""
    if entry.kind == "missing":
        return f"*{markdown(entry.text)}* ({markdown(entry.note)})" if entry.note else f"*{markdown(entry.text)}*"
    text = markdown(entry.text) or " "
    return f"{text} ({markdown(entry.note)})" if entry.note else text


def markdown_table(table: Table) -> str:
    """A table as GitHub Markdown; columns of numbers are set right."""
    lines = [
        "| " + " | ".join(markdown(column) or " " for column in table.columns) + " |",
        "|" + "|".join("---:" if right else "---" for right in table.numeric) + "|",
    ]
    lines += ["| " + " | ".join(markdown_entry(entry) for entry in row) + " |" for row in table.rows]
    return "\n".join(lines)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV (RFC 4180, LF); None is empty, and words that a spreadsheet would run as a formula are quoted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_csv_field(column) for column in columns])
    writer.writerows([_csv_field(value) for value in row] for row in rows)
    return out.getvalue()


def _csv_field(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = _BREAKS.sub(" ", str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
