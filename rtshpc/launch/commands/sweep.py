"""`sweep`, `plan`, `measure` and `scale`: do what is missing of a sweep, its measurements or its scaling study, or show it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtshpc.launch.commands.options import config_options, load_config, sweep_options

if TYPE_CHECKING:
    from rtshpc.core.sizing.fit import Fit
    from rtshpc.launch.plan import Plan


@click.command(short_help="Run what is missing of a sweep.")
@sweep_options
@click.option("--prepare", is_flag=True, help="Only write the run folder, and print how to run it with slurm/*.sbatch.")
def sweep(config: str, site: str | None, sets: tuple[str, ...], until: str | None, runs: str, prepare: bool) -> int:
    """Run a sweep: shards, pretraining, fusion, scores, memory, report.

    CONFIG is a name of configs/sweeps (default: demo) or a YAML file. Only what is missing is done: after
    a kill, a failure or a new grid value, run the same line again.
    """
    resolved = load_config(config, site, sets)
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import make_plan

    return launch(lambda: make_plan(resolved, Path(runs), until), prepare)


@click.command(short_help="Show what a sweep would do.")
@sweep_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--sbatch", "as_scripts", is_flag=True, help="Print the batch scripts that a Slurm site would be given.")
@click.option("--predict", is_flag=True, help="Predict memory first, and keep it in the run folder.")
@click.option(
    "--fit", "fitted", is_flag=True, help="Show which micro-batch fits which GPUs, or what would make it fit."
)
def plan(
    config: str,
    site: str | None,
    sets: tuple[str, ...],
    until: str | None,
    runs: str,
    as_json: bool,
    as_scripts: bool,
    predict: bool,
    fitted: bool,
) -> int:
    """Show stages, arrays and cells of a sweep, what is done, and what each cell is expected to take.

    Writes nothing but what --predict and --fit found out, which is kept.
    """
    resolved = load_config(config, site, sets)
    from rtshpc.launch.plan import make_plan
    from rtshpc.launch.submit import refuse_other_data

    found = make_plan(resolved, Path(runs), until)
    refuse_other_data(found)
    if predict or fitted:
        from rtshpc.launch.plan.forecast import Tracer, fits, predict_all

        with Tracer(found.config.site, found.paths) as tracer:
            if predict:
                predict_all(found, tracer)
            if fitted:
                return _show_fits(fits(found, tracer), as_json)
    from rtshpc.launch.plan.forecast import forecast

    return show_plan(found, as_json, as_scripts, forecast(found))


@click.command(short_help="Measure memory and time of a sweep's detectors.")
@config_options
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be done; writes nothing.")
@click.option("--sbatch", "as_scripts", is_flag=True, help="As --plan: print the batch scripts of a Slurm site.")
@click.option("--json", "as_json", is_flag=True, help="With --plan: print JSON.")
def measure(
    config: str, site: str | None, sets: tuple[str, ...], runs: str, only_plan: bool, as_scripts: bool, as_json: bool
) -> int:
    """Measure memory, time and energy of a training step of every detector of a sweep, each in a fresh process.

    Does the sweep's `measure` cells alone, and nothing needs to be trained for them: which modality sets, arms (pretrained,
    full, cached), chip size, precision and batch, its section `measure` says. Run `sweep` in the same folder to go on.
    """
    resolved = load_config(config, site, sets)
    from rtshpc.core.sizing.measured import protocol_of
    from rtshpc.core.sizing.memory import measure_spec
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import measure_plan
    from rtshpc.launch.plan.forecast import forecast
    from rtshpc.launch.submit import refuse_other_data

    found = measure_plan(resolved, Path(runs))
    refuse_other_data(found)
    if only_plan or as_scripts or as_json:
        return show_plan(replace(found, stages=("measure",)), as_json, as_scripts, forecast(found))
    click.echo(f"protocol: {protocol_of(measure_spec(found.measured[0])).words}")
    return launch(lambda: measure_plan(resolved, Path(runs)))


@click.command(short_help="Measure how a sweep's work scales.")
@config_options
@click.option("--gpus", metavar="N,N,...", help="Counts of GPUs (of processes on CPUs): strong and weak scaling.")
@click.option("--concurrency", metavar="N,N,...", help="Counts of one-node jobs at once: array throughput.")
@click.option("--tasks", metavar="N,N,...", help="Counts of tasks: preprocess and map.")
@click.option("--repeats", type=click.IntRange(min=1), help="Measurements at each count.")
@click.option("--show", is_flag=True, help="Only show what is measured by now.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be done; writes nothing.")
@click.option("--sbatch", "as_scripts", is_flag=True, help="As --plan: print the batch scripts of a Slurm site.")
@click.option("--json", "as_json", is_flag=True, help="With --show or --plan: print JSON.")
def scale(
    config: str,
    site: str | None,
    sets: tuple[str, ...],
    runs: str,
    show: bool,
    only_plan: bool,
    as_scripts: bool,
    as_json: bool,
    **counts: Any,
) -> int:
    """Measure strong and weak scaling, array throughput, preprocess and map of a sweep, in a run folder of its own.

    Counts are those of the sweep's section `scale` unless they are given; `none` leaves a kind out. Measurements run one after
    another, each in jobs of its own. Only what is missing is done; `status`, `cancel`, `retry` and `usage` take the folder.
    """
    from rtshpc.core.paths import RunPaths
    from rtshpc.launch.display import make_console, scaling_facts, scaling_table
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import scale_plan, study_of
    from rtshpc.launch.submit import refuse_other_data

    asked = [f"scale.{name}={_counted(name, value)}" for name, value in counts.items() if value is not None]
    study = study_of(load_config(config, site, [*sets, *asked]))
    paths = RunPaths(Path(runs) / study.name)
    if show and as_json:
        click.echo(json.dumps(scaling_facts(paths), indent=1))
    elif show:
        make_console().print(scaling_table(paths))
    elif only_plan or as_scripts or as_json:
        found = scale_plan(study, paths)
        refuse_other_data(found)
        return show_plan(found, as_json, as_scripts)
    else:
        return launch(lambda: scale_plan(study, paths))
    return 0


def _counted(name: str, value: Any) -> str:
    """Counts of a flag as YAML. Raises ConfigError, which names the flag."""
    if isinstance(value, int) or value == "none":
        return "[]" if value == "none" else str(value)
    words = [word.strip() for word in str(value).split(",")]
    for word in words:
        if not word.isascii() or not word.isdecimal() or not int(word):
            from rtshpc.core.errors import ConfigError

            raise ConfigError(f'--{name} {value}: "{word}" is no count; give whole numbers from 1, e.g. 1,2,4, or none')
    return f"[{', '.join(words)}]"


def show_plan(found: Plan, as_json: bool, as_scripts: bool, expected: dict[str, Any] | None = None) -> int:
    """Print a plan: as text, as JSON, or as the batch scripts of a Slurm site; `expected` as `forecast` gives it.

    Raises:
        UsageError: JSON and scripts are both asked for.
    """
    from rtshpc.launch.submit import scripts

    if as_scripts and as_json:
        raise click.UsageError("--json and --sbatch print different things: give one of them")
    if as_scripts:
        for array, text in scripts(found):
            click.echo(f"# JOB{array.number + 1}: {array.stage}, {len(array.cells)} cells\n{text}")
        return 0
    facts = found.describe()
    if expected is not None:
        facts["expected"] = expected
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return 0
    click.echo(f"{facts['path']}  (site {facts['site']}, data {facts['data']})")
    if facts["features"] is not None:
        click.echo(_disk(facts["features"]))
    rows: dict[str, Any] = {} if expected is None else expected["cells"]
    for stage in facts["stages"]:
        click.echo(f"\n{stage['stage']}: {stage['cells']} cells, {stage['done']} done, {stage['todo']} to do")
        for cell in facts["cells"]:
            if cell["stage"] == stage["stage"]:
                mark = "done" if cell["done"] else "to do" if cell["todo"] else "-"
                told = _expected(rows[cell["id"]]) if rows else ""
                click.echo(f"  {cell['id']}  {mark:<5}  {cell['label']}{told}")
    if any(row["peak_bytes"] is not None for row in rows.values()):
        assert expected is not None
        click.echo(f"\npeaks: {expected['memory']}; epochs without validation")
    return 0


def _expected(row: dict[str, Any]) -> str:
    """Peak, time of an epoch and GPU-hours of a cell, as far as they are predicted, else why not."""
    if row["peak_bytes"] is None:
        return f": not predicted ({row['reason']})"
    from rtshpc.core.sizing.predict import GIB

    told = [f"peak {row['peak_bytes'] / GIB:.2f} GiB"]
    if row["seconds_per_epoch"] is None:
        told.append("time not predicted")
    else:
        told.append(f"{row['seconds_per_epoch']:.3g} s an epoch")
        told.append(f"{row['hours']:.3g} h" if row["gpu_hours"] is None else f"{row['gpu_hours']:.3g} GPU-hours")
        told.append(row["timed"])
    return ": " + ", ".join(told)


def _show_fits(found: list[tuple[str, dict[str, Fit]]], as_json: bool) -> int:
    """Print which micro-batch fits which GPUs."""
    if as_json:
        click.echo(
            json.dumps({label: {name: asdict(fit) for name, fit in fits.items()} for label, fits in found}, indent=1)
        )
        return 0
    for label, fits in found:
        click.echo(label)
        for name, fit in fits.items():
            click.echo(f"  {name}: {_fitting(fit)}")
    return 0


def _fitting(fit: Fit) -> str:
    from rtshpc.core.sizing.predict import GIB

    if fit.need is None:
        return "not predicted"
    if fit.at_once is not None:
        return f"site.micro_batch: {fit.at_once}, {fit.need / GIB:.2f} GiB"
    ways = [f"{words} ({need / GIB:.2f} GiB)" for words, need in fit.advice.items()]
    return f"one chip at a time takes {fit.need / GIB:.2f} GiB; " + ("; or ".join(ways) or "nothing that is known fits")


def _disk(need: dict[str, Any]) -> str:
    """How much disk the feature cache takes, and what that figure rests on."""
    chips = f"{need['chips']['train']} train and {need['chips']['val']} val chips"
    basis = f"counted: {chips}" if need["exact"] else f"estimated before preprocess: about {chips}"
    sizes = [f"{need[key] / 1e9:.3g} GB" for key in ("bytes", "left_bytes", "free_bytes")]
    short = "; NOT ENOUGH" if need["left_bytes"] > need["free_bytes"] else ""
    return f"feature cache: {sizes[0]} of disk ({basis}), {sizes[1]} to write, {sizes[2]} free{short}"
