"""What a launcher shows: running cells while they run, the figures of their records afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rtshpc.core.cell import Cell
from rtshpc.core.grid import finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_json
from rtshpc.core.sizing.measured import refusal
from rtshpc.core.sizing.scaling import scale_points, scale_rows

if TYPE_CHECKING:
    from rtshpc.hpc.executor import Job

MIB = 1 << 20

BAR = 20
"""Width of a progress bar, characters."""

PLAIN_SECONDS = 30.0
"""Without a terminal, how often running cells are told."""

WIDTH = 120
"""Width of lines where there is no terminal."""


class Working(Protocol):
    """A cell at work, as the scheduler keeps it."""

    cell: Cell
    job: Job
    since: float


def make_console() -> Console:
    """A console on standard output; wide enough for the tables where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


class Display:
    """Shows events as lines, and the running cells below them (or every half minute)."""

    def __init__(self, console: Console, paths: RunPaths) -> None:
        self._console = console
        self._paths = paths
        # No thread that refreshes: it could take the Ctrl-C that waits while tasks are submitted.
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._told = time.monotonic()

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        now = datetime.now().strftime("%H:%M:%S")
        self._console.print(f"{now} {text}", markup=False, soft_wrap=True)

    def done(self, cell: Cell, record: Record, seconds: float) -> None:
        """A cell is done: how long it took, and its main figure."""
        figure = headline(record)
        self.say(f"done     {cell.label} ({seconds:.0f} s{', ' + figure if figure else ''})")

    def show(self, running: Sequence[Working], waiting: int, total: int) -> None:
        """The running cells and how many are left."""
        if self._live is not None:
            self._live.update(self._table(running, waiting, total), refresh=True)
            return
        if running and time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            for one in running:
                self.say(f"running  {one.cell.label}: {progress_text(self._paths, one.cell.id)}")

    def _table(self, running: Sequence[Working], waiting: int, total: int) -> Table:
        table = Table.grid(padding=(0, 2))
        for one in running:
            done, of, text = progress(self._paths, one.cell.id)
            filled = round(BAR * done / of) if of else 0
            bar = f"[green]{'━' * filled}[/][dim]{'━' * (BAR - filled)}[/]"
            table.add_row(one.cell.label, bar, text, f"{time.monotonic() - one.since:.0f} s")
        over = total - waiting - len(running)
        table.add_row(f"[dim]{over} of {total} cells over, {len(running)} running, {waiting} waiting[/]")
        return table


@contextmanager
def watching() -> Generator[Callable[[str], bool]]:
    """A function that shows a text in place of the one before: redrawn on a terminal, printed anew elsewhere.

    It gives True, so that it can lead a loop's condition; Ctrl-C ends the block in order.
    """
    console = make_console()
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_terminal else None

    def show(text: str) -> bool:
        if live is None:
            console.print(text, markup=False, soft_wrap=True)
        else:
            live.update(Text(text), refresh=True)
        return True

    with suppress(KeyboardInterrupt), live or nullcontext():
        yield show


def progress(paths: RunPaths, cell_id: str) -> tuple[int, int, str]:
    """(done, total, text) of the attempt in progress; zeros before it says something."""
    found: Any = read_json(paths.cell(cell_id).progress)
    if not isinstance(found, dict):
        return 0, 0, "starting"
    facts = cast(dict[str, Any], found)
    done, total = int(facts.get("done", 0)), int(facts.get("total", 0))
    return done, total, f"{facts.get('phase', '')} {done}/{total} {facts.get('text', '')}".strip()


def progress_text(paths: RunPaths, cell_id: str) -> str:
    """`train 120/400 loss 0.41`, or `starting`."""
    return progress(paths, cell_id)[2]


def headline(record: Record) -> str:
    """The main figure of a record, in a few words."""
    results = record.results
    if record.stage == "preprocess":
        accepted = sum(int(shard.get("chips", 0)) for shard in results.get("shards", []))
        return f"{accepted} chips, {len(results.get('rejected', []))} scenes rejected"
    if record.stage == "gather":
        return f"{results.get('chips')} chips, {results.get('instances')} instances"
    if record.stage in ("pretrain", "finetune"):
        return f"validation AP50 {number(results.get('best_ap50'))}"
    if record.stage == "features":
        return f"{number(results.get('bytes'), MIB)} MiB of scales"
    if record.stage == "evaluate":
        return f"mask AP50 {number(_deep(results, 'mask', 'AP50'))}"
    if record.stage == "measure":
        return refusal(results) or f"{number(_memory_peak(results), MIB)} MiB"
    if record.stage == "scale":
        rate = results.get("rate") or results.get("samples_per_second")
        return f"{number(rate)} {'samples/s' if results.get('rate') is None else results.get('unit')}"
    if record.stage == "map":
        refused = results.get("rejected")
        return (
            f"rejected: {refused['detail']}"
            if refused
            else f"{results.get('pieces')} pieces in {results.get('mapped')} chips"
        )
    if record.stage == "merge":
        states = [scene["state"] for scene in results.get("scenes", [])]
        return f"{results.get('instances')} instances in {states.count('mapped')} of {len(states)} scenes"
    if record.stage == "publish":
        return f"{results.get('instances')} instances"
    return ""


def tables(cells: Sequence[Cell], paths: RunPaths) -> list[Table]:
    """AP50 of every scored cell and peak memory of every measured one; only tables with rows."""
    done = [record for cell in cells if (record := finished(cell, paths)) is not None]
    records = [record for record in done if not refusal(record.results)]
    scores = [record.results for record in records if record.stage == "evaluate"]
    peaks = [record for record in records if record.stage == "measure"]
    return [
        table for table in (_scores(scores) if scores else None, _memory(peaks) if peaks else None) if table is not None
    ]


def scaling_facts(paths: RunPaths) -> dict[str, Any]:
    """What a scaling study has measured as JSON: `points` (ScalePoint) and `rows` (ScaleRow: medians over repeats)."""
    points = scale_points(paths)
    rows = [row.model_dump(mode="json") for row in scale_rows(points)]
    return {"path": str(paths.root), "points": [point.model_dump(mode="json") for point in points], "rows": rows}


def scaling_table(paths: RunPaths) -> Table:
    """What a scaling study has measured: medians over repeats, and quartiles."""
    rows = scale_rows(scale_points(paths))
    told = "medians over repeats, quartiles in brackets" if rows else f"nothing is measured yet in {paths.root}"
    table = Table(title=f"Scaling: {told}", title_justify="left")
    table.add_column("kind")
    for name in ("count", "nodes", "repeats", "batch", "rate", "", "speed-up", "efficiency", "on"):
        table.add_column(name, justify="left" if name in ("", "on") else "right")
    for row in rows:
        table.add_row(
            row.kind,
            str(row.count),
            str(row.nodes),
            str(row.repeats),
            str(row.batch or "-"),
            f"{row.rate:.4g} ({row.low:.4g}-{row.high:.4g})",
            row.unit,
            f"{row.speed_up:.2f}" if row.base == 1 else f"{row.speed_up:.2f} (of {row.base})",
            f"{row.efficiency:.0%}",
            row.gpu or row.device,
        )
    return table


def _scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="AP50 on the test split, %", title_justify="left")
    table.add_column("detector")
    for name in ("mask AP50", "box AP50", "mask AP", "images", "instances"):
        table.add_column(name, justify="right")
    for row in rows:
        leaky = " (leaky split)" if row.get("allow_leakage") else ""
        table.add_row(
            f"{row.get('trained_label')}{leaky}",
            number(_deep(row, "mask", "AP50")),
            number(_deep(row, "box", "AP50")),
            number(_deep(row, "mask", "AP")),
            str(row.get("images", "-")),
            str(row.get("instances", "-")),
        )
    return table


def _memory(records: Sequence[Record]) -> Table:
    table = Table(title="Memory of a training step, MiB", title_justify="left")
    table.add_column("detector")
    names = ("params", "grads", "activations", "optim_state")
    for name in ("parameters", "gradients", "activations", "optimizer", "peak", "of", "s/step"):
        table.add_column(name, justify="right")
    for record in records:
        row = record.results
        figures = [number(row.get(name), MIB) for name in names]
        source = "CUDA allocator" if row.get("backend") == "cuda" else "tensors alive"
        peak, seconds = number(_memory_peak(row), MIB), number(row.get("step_seconds"), places=3)
        table.add_row(record.label.removeprefix("measure "), *figures, peak, source, seconds)
    return table


def _memory_peak(results: Mapping[str, Any]) -> Any:
    """Peak of forward and backward: the allocator's, on a CPU that of all tensors alive."""
    return results.get("alloc_peak_fb" if results.get("backend") == "cuda" else "live_peak_fb")


def number(value: Any, unit: float = 1, places: int = 1) -> str:
    """A number of so many decimals, or a dash for what is not defined."""
    return f"{value / unit:.{places}f}" if isinstance(value, int | float) else "-"


def _deep(values: Mapping[str, Any], *keys: str) -> Any:
    found: Any = values
    for key in keys:
        found = cast(dict[str, Any], found).get(key) if isinstance(found, dict) else None
    return found
