"""Cells to do -> the arrays that are submitted, and what each waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtshpc.core.cell import LENIENT, STAGES, Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.sizing.predict import GUARDED, STAGE as PREDICT
from rtshpc.core.sizing.studies import batches

Link = tuple[int | str, int | None]
"""What a job waits for: an array of the same plan by number, or a job by Slurm's; and its element, None = all of it."""


@dataclass(frozen=True)
class Array:
    """Cells of one stage that are submitted together and wait for the same.

    Attributes:
        number: place in the order of submission.
        stage: of all its cells.
        cells: element i is the i-th.
        rule: Slurm's word for what it waits for: afterok (all went well), aftercorr (element i waits for element i),
            afterany (all are over); empty where it waits for nothing.
        after: what it waits for.
        behind: what must be over before it, however that ended.
    """

    number: int
    stage: str
    cells: tuple[Cell, ...]
    rule: str
    after: tuple[Link, ...]
    behind: tuple[Link, ...] = ()

    @property
    def site(self) -> SiteConfig:
        """Where its jobs go, and what each asks for."""
        return self.cells[0].config.site

    def dependency(self, jobs: Mapping[int, str]) -> str:
        """As sbatch spells it; `jobs` are the numbers that Slurm gave to the arrays before this one."""
        told: list[str] = []
        for rule, links in ((self.rule, self.after), ("afterany", self.behind)):
            spelled = [
                (jobs[job] if isinstance(job, int) else job) + ("" if element is None else f"_{element}")
                for job, element in links
            ]
            if spelled:
                told.append(":".join([rule, *dict.fromkeys(spelled)]))
        return ",".join(told)


def arrays(todo: Sequence[Cell], queued: Mapping[str, str], most: int) -> list[Array]:
    """Cells to do -> the arrays to submit, in order.

    Cells that build on the same cells are one array, and wait for those elements only: a cell starts as soon as its
    own backbones are there, and a failed one takes none along that does not build on it. What is one to one (the
    evaluations of trained cells) waits element by element. The index, the summary and lenient stages wait for the end of
    what they read, however it ended: they say what is missing. What takes a GPU waits for the prediction that it fits one.
    Of a scaling study, nothing runs beside a measurement.

    Args:
        todo: cells to do, in stage order.
        queued: id -> Slurm's job (`12` or `12_3`) of those that Slurm has already.
        most: elements of an array.
    """
    return _Arranger(todo, queued, most).arrays


def guards(todo: Sequence[Cell]) -> list[str]:
    """Ids of the cells that say whether the others fit a GPU."""
    return [cell.id for cell in todo if cell.stage == PREDICT]


def waits_for(cell: Cell, guarding: Sequence[str]) -> tuple[str, ...]:
    """Ids of the cells that must be done before: those it builds on, and those that guard a GPU from it."""
    return (*guarding, *cell.needs) if cell.stage in GUARDED else cell.needs


class _Arranger:
    def __init__(self, todo: Sequence[Cell], queued: Mapping[str, str], most: int) -> None:
        self.arrays: list[Array] = []
        self._most = most
        self._pending = {cell.id: cell for cell in todo}
        self._place: dict[str, Link] = {name: _job_link(job) for name, job in queued.items()}
        self._above: dict[str, set[str]] = {}
        self._guards = guards(todo)
        # First in their arrays, so that the elements of the evaluations' array are numbered as these.
        self._scored = {need for cell in todo if cell.stage == "evaluate" for need in cell.needs}
        for cell in todo:
            self._above[cell.id] = {name for need in self._needs(cell) for name in (need, *self._above[need])}
        for stage in STAGES:
            cells = [cell for cell in todo if cell.stage == stage and cell.id not in queued]
            if stage == "summarise":
                # One that is queued already does not know of what is submitted now: another comes after it.
                cells = [cell for cell in todo if cell.stage == stage] if self.arrays else cells
                everything = [(array.number, None) for array in self.arrays]
                before = [(_job_link(job)[0], None) for job in queued.values()]
                self._add(cells, "afterany", [*everything, *before])
            elif stage == "gather" or stage in LENIENT:
                whole = [(self._place[need][0], None) for cell in cells for need in self._needs(cell)]
                self._add(cells, "afterany", whole)
            elif stage == "scale":
                self._add_study(cells, [_job_link(queued[cell.id]) for cell in todo if cell.id in queued])
            else:
                self._add_groups(cells)

    def _needs(self, cell: Cell) -> list[str]:
        return [need for need in waits_for(cell, self._guards) if need in self._pending]

    def _links(self, cell: Cell) -> list[Link]:
        """What the cell must wait for itself: a need that another one waits for is met with that."""
        needs = self._needs(cell)
        met = {name for need in needs for name in self._above[need]}
        return [self._place[need] for need in needs if need not in met]

    def _add_groups(self, cells: Sequence[Cell]) -> None:
        paired: dict[int | str, list[tuple[int, Cell]]] = {}
        groups: dict[tuple[Link, ...], list[Cell]] = {}
        for cell in cells:
            links = self._links(cell)
            groups.setdefault(tuple(sorted(links, key=str)), []).append(cell)
            if len(links) == 1 and links[0][1] is not None:
                paired.setdefault(links[0][0], []).append((links[0][1], cell))
        for job, found in paired.items():
            found.sort(key=lambda one: one[0])
            if len(found) > 1 and [element for element, _ in found] == list(range(len(found))):
                for element, _ in found:
                    del groups[(job, element),]
                self._add([cell for _, cell in found], "aftercorr", [(job, None)])
        for links, members in groups.items():
            self._add(sorted(members, key=lambda cell: cell.id not in self._scored), "afterok", links)

    def _add_study(self, cells: Sequence[Cell], queued: Sequence[Link]) -> None:
        """Measurements, one after another, and after those that Slurm has already."""
        behind = [(job, None) for job, _ in queued]
        for members in batches(cells):
            first = len(self.arrays)
            self._add(members, "afterok", self._links(members[0]), behind)
            behind = [(number, None) for number in range(first, len(self.arrays))]

    def _add(self, cells: Sequence[Cell], rule: str, after: Sequence[Link], behind: Sequence[Link] = ()) -> None:
        for first in range(0, len(cells), self._most):
            part, number = tuple(cells[first : first + self._most]), len(self.arrays)
            links, over = tuple(dict.fromkeys(after)), tuple(dict.fromkeys(behind))
            self.arrays.append(Array(number, part[0].stage, part, rule if links else "", links, over))
            for element, cell in enumerate(part):
                self._place[cell.id] = (number, element if len(part) > 1 else None)


def _job_link(job: str) -> Link:
    base, _, element = job.partition("_")
    return base, int(element) if element else None
