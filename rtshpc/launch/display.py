"""What a launcher shows: a line per running cell on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_json
from rtshpc.launch.results import headline

if TYPE_CHECKING:
    from rtshpc.hpc.executor import Job

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
