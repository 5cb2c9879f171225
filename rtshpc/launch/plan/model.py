"""What `launch map --model` means: a trained cell of a run, or a file of weights, and how its inputs were normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rtshpc.core.config import MapConfig, NormalConfig, RunConfig, SiteConfig
from rtshpc.core.config.run import WEIGHT_FORMATS
from rtshpc.core.errors import ConfigError, RtshpcError, RunError, unknown
from rtshpc.core.grid import valid_record
from rtshpc.core.load import Raw, load_run, load_site, parse_set, read_cell, validate
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import file_sha256, read_json
from rtshpc.launch.status import find_planned, find_run

TRAINED = ("pretrain", "finetune")
"""Stages whose cells hold a detector."""

SETTABLE = ("map", "site", "data.root")
"""What `--set` may change: all else is the training's, or the map would be of another detector or of other inputs."""


def map_config(
    model: str, runs: Path, name: str, site: str | None, sets: Sequence[str], config: str = "", statistics: str = ""
) -> RunConfig:
    """The config of a map run.

    Args:
        model: `RUN:CELL` (id, beginning of one, or words of a label), a cell's folder, or a file of weights.
        runs: folder of runs, for RUN by name.
        name: of the map run.
        site: where to run; None = here.
        sets: overrides under SETTABLE.
        config: for a file of weights: the sweep whose data, model and modalities it is of.
        statistics: for a file of weights: an index.json of shards, whose means and deviations the inputs are given.

    Raises:
        RtshpcError: one line: what is wrong with which of them.
    """
    if Path(model).suffix.lower() in WEIGHT_FORMATS:
        base, chosen = _of_weights(Path(model), config, statistics)
    elif config or statistics:
        raise RtshpcError(f"--model {model}: a trained cell says itself of which config and statistics it is")
    else:
        base, chosen = _of_cell(_cell_folder(model, runs))
    return _with_sets(base, chosen, name, load_site(site or "local"), sets)


def _cell_folder(model: str, runs: Path) -> Path:
    folder = Path(model)
    if (folder / "config.yaml").is_file() and folder.parent.name == RunPaths(Path()).cells.name:
        return folder.absolute()
    run, colon, words = model.rpartition(":")
    if not colon:
        raise RunError(f"--model {model}: give RUN:CELL, the folder of a cell, or a file of weights")
    paths = find_run(run, runs)
    return paths.cell(str(find_planned(paths, words)["id"])).root.absolute()


def _of_cell(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    paths, cell = RunPaths(folder.parents[1]), read_cell(folder / "config.yaml")
    if cell.stage not in TRAINED:
        raise RunError(f"{folder}: {cell.label} is no training; give a cell of stage {' or '.join(TRAINED)}")
    record = valid_record(cell.id, cell.stage, paths)
    if record is None:
        raise RunError(f"{folder}: {cell.label} is not trained yet; see `status {paths.root}`")
    training = cell.config.finetune if cell.stage == "finetune" else cell.config.pretrain
    return cell.config, {
        "model": str(folder),
        "model_label": f"{paths.root.name}: {cell.label}",
        "model_sha256": str(record.results["checkpoint_sha256"]),
        "modalities": cell.modalities,
        "statistics": read_statistics(paths.index, cell.modalities),
        "precision": training.precision,
    }


def _of_weights(path: Path, config: str, statistics: str) -> tuple[RunConfig, dict[str, Any]]:
    if not config or not statistics:
        raise RtshpcError(f"--model {path}: a file of weights needs --config SWEEP and --statistics INDEX_JSON")
    run = load_run(config)
    modalities = (run.finetune.primary, *(name for name in run.finetune.modalities if name != run.finetune.primary))
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise RunError(f"--model {path}: cannot be read: {error.strerror}") from None
    return run, {
        "model": str(path.absolute()),
        "model_label": path.name,
        "model_sha256": sha256,
        "modalities": modalities,
        "statistics": read_statistics(Path(statistics), modalities),
        "precision": run.finetune.precision,
    }


def read_statistics(index: Path, modalities: Sequence[str]) -> dict[str, NormalConfig]:
    """Means and deviations of modalities as an index of shards holds them.

    Raises:
        RunError: the file is not there, or is none.
        ConfigError: it has no such modality.
    """
    value = read_json(index)
    table: Any = cast(dict[str, Any], value).get("modalities") if isinstance(value, dict) else None
    if not isinstance(table, dict):
        raise RunError(f"{index}: no index of shards, which says how a detector's inputs were normalised")
    known = cast(dict[str, Mapping[str, Any]], table)
    for name in modalities:
        if name not in known:
            raise ConfigError(unknown(f"{index}: modality", name, known))
    facts = {name: {"mean": known[name].get("mean"), "std": known[name].get("std")} for name in modalities}
    return {
        name: validate(Raw(one, {(): (f"{index}: modalities.{name}", 0)}), NormalConfig) for name, one in facts.items()
    }


def _with_sets(
    base: RunConfig, chosen: Mapping[str, Any], name: str, site: SiteConfig, sets: Sequence[str]
) -> RunConfig:
    """The training's config with the map's section, site and name, and a user's overrides on top."""
    mapping = MapConfig.model_validate({**base.map.model_dump(), **chosen})
    started = base.model_copy(update={"name": name, "map": mapping, "site": site, "grid": {}})
    raw = Raw(started.model_dump(mode="json"), {(): ("the model's config", 0)})
    for key, value in map(parse_set, sets):
        spelled = ".".join(key)
        if not any(spelled == one or spelled.startswith(f"{one}.") for one in SETTABLE):
            raise ConfigError(f"--set {spelled}: a map takes {', '.join(SETTABLE)}.*; all else is the training's")
        raw.assign(key, value, "--set")
    config = validate(raw, RunConfig)
    kept = {*config.map.modalities, config.data.primary}
    # What the detector does not take describes instances where a scene has it, and rejects none that has not.
    modalities = {
        name: one if name in kept else one.model_copy(update={"required": False})
        for name, one in config.data.modalities.items()
    }
    return config.model_copy(update={"data": config.data.model_copy(update={"modalities": modalities})})
