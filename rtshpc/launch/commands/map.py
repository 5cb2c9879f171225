"""`map`: scenes and a trained detector to one clean set of slumps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtshpc.launch.commands.options import runs_option
from rtshpc.launch.commands.sweep import show_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rtshpc.core.mapping.ground import MapScene

FEW = 10
"""So many scenes that cannot be used are named one by one."""


@click.command("map", short_help="Map scenes with a trained detector.")
@click.argument("scenes")
@click.option("--model", required=True, metavar="RUN:CELL", help="A trained cell, its folder, or a file of weights.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(), help="Folder of the map run.")
@click.option("--site", metavar="NAME", help="Where to run: a name of configs/sites, or a file. Default: here.")
@click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Override map.*, site.* or data.root. Repeatable.")
@click.option("--config", default="", metavar="SWEEP", help="For a file of weights: the sweep it was trained with.")
@click.option("--statistics", default="", metavar="FILE", help="For a file of weights: index.json of its shards.")
@runs_option
@click.option("--plan", "only_plan", is_flag=True, help="Show what would be done, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --plan: print JSON.")
@click.option("--sbatch", "as_scripts", is_flag=True, help="With --plan: print the batch scripts of a Slurm site.")
@click.option(
    "--prepare", is_flag=True, help="Only write the run folder, and print how to run it with slurm/map.sbatch."
)
def map_(
    scenes: str,
    model: str,
    out: str,
    site: str | None,
    sets: tuple[str, ...],
    config: str,
    statistics: str,
    runs: str,
    only_plan: bool,
    as_json: bool,
    as_scripts: bool,
    prepare: bool,
) -> int:
    """Map SCENES with a trained detector into the run folder DIR.

    SCENES is an index (CSV or GeoJSON: columns image, scene, site, date), a text file with a raster a line, a folder, or
    one raster; rasters may be VRTs, URLs and GDAL's virtual files. Scenes that cannot be used are named and stop no
    others. Only what is missing is done: after a kill, a failure or with more scenes, run the same line again.
    `status`, `logs`, `cancel`, `retry` and `usage` take DIR as they take the folder of a sweep.
    """
    from rtshpc.core.mapping.listing import scenes_to_map
    from rtshpc.core.paths import RunPaths
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import look_at, map_plan
    from rtshpc.launch.plan.model import map_config
    from rtshpc.launch.submit import refuse_other_data

    paths = RunPaths(Path(out))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", paths.root.absolute().name).lstrip("._-") or "map"
    root = next((text.partition("=")[2] for text in sets if text.startswith("data.root=")), "")
    made = map_config(model, Path(runs), name, site, sets, config, statistics)
    data, listed = scenes_to_map(scenes, made.data, root and made.data.root)
    made = made.model_copy(update={"data": data, "map": made.map.model_copy(update={"scenes": scenes})})
    seen = look_at(listed, made, paths)
    if only_plan or as_json or as_scripts:
        plan = map_plan(made, paths, seen)
        refuse_other_data(plan)
        return show_plan(plan, as_json, as_scripts)
    _tell_unusable(seen)
    return launch(lambda: map_plan(made, paths, seen), prepare)


def _tell_unusable(scenes: Sequence[MapScene]) -> None:
    """Name the scenes whose header says that they cannot be used."""
    bad = [one for one in scenes if one.reason]
    for one in bad[:FEW]:
        click.echo(f"cannot be used: {one.scene.id}: {one.reason}: {one.detail}")
    if len(bad) > FEW:
        click.echo(f"... and {len(bad) - FEW} more of {len(scenes)} scenes")
