"""A sweep's config -> the scaling study that is made of it, in a run folder of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping

from rtshpc.core.cell import SCALE_STAGES, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.grid import finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.sizing.scaling import whole
from rtshpc.core.sizing.studies import measurements, scale_cells
from rtshpc.launch.plan.sweep import Plan, differs, fingerprint_of


class ScalePlan(Plan):
    """A scaling study: shards, then its measurements one after another.

    A measurement that takes several jobs is done when all of it is, of one submission; else it is made again whole.
    """

    @property
    def todo(self) -> list[Cell]:
        """Cells that are missing, in order, and with each all of its measurement."""
        chosen = {cell.id for cell in super().todo}
        whole = [cell.id for members in measurements(self.cells) if _meet(members, chosen) for cell in members]
        return [cell for cell in self.cells if cell.id in chosen.union(whole)]

    def beside(self, queued: Mapping[str, str]) -> list[Cell]:
        """A measurement of which Slurm has a part is left alone: its other jobs are done, or were lost and come later."""
        held = {cell.id for members in measurements(self.cells) for cell in members if _meet(members, queued)}
        return [cell for cell in self.todo if cell.id in queued or cell.id not in held]


def _meet(members: tuple[Cell, ...], names: Container[str]) -> bool:
    return any(cell.id in names for cell in members)


def study_of(config: RunConfig) -> RunConfig:
    """The sweep's config under the study's name: that of the sweep and of the site, for each is measured apart."""
    return config.model_copy(update={"name": f"{config.name}-scale-{config.site.name}", "grid": {}})


def scale_plan(config: RunConfig, paths: RunPaths) -> ScalePlan:
    """Plan a scaling study; reads, and writes nothing.

    Args:
        config: see `study_of`.
        paths: the study's folder.

    Raises:
        RtshpcError: the data cannot be listed, the study cannot be made at this site, or the library of `model.engine` is
            missing where stages run in this environment.
    """
    if config.map.model:
        raise ConfigError("map.model is given: this is the config of a map run, and a study is of a sweep")
    fingerprint = fingerprint_of(config, paths)
    found = scale_cells(config, fingerprint)
    records = {cell.id: finished(cell, paths) for cell in found}
    done = {name: record for name, record in records.items() if record is not None}
    for members in measurements(found):
        made = [done[cell.id] for cell in members if cell.id in done]
        if made and not whole(made):
            for cell in members:
                done.pop(cell.id, None)
    plan = ScalePlan(
        config, paths, fingerprint, tuple(found), done, SCALE_STAGES, differs(config, found, SCALE_STAGES, paths)
    )
    if not config.site.image and plan.todo:
        config.model.require_engine()
    return plan
