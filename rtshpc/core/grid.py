"""A sweep -> its cells, each with an id that changes exactly when its result can change.

Hashed: the config sections a stage's result depends on, the ids of the cells it builds on, the fingerprint
of the inputs and the stage's RESULT_VERSION. Not hashed: names, paths, sites, workers, how chips are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError

from rtshpc.core.cell import LENIENT, MAP_STAGES, RESULT_VERSION, STAGES, Cell, digest
from rtshpc.core.config import FinetuneConfig, FusionConfig, RunConfig
from rtshpc.core.config.explain import explain, fields_at, show
from rtshpc.core.errors import ConfigError, guess
from rtshpc.core.features import hashed_scales, scales_there
from rtshpc.core.mapping.cells import inputs_same
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_record, shards_indexed
from rtshpc.core.sizing.predict import predict_cell

VARIABLE = ("finetune", "model", "seed")
"""What a grid may vary; with `model` (names of configs) or a key of it, every detector is pretrained of its own."""

_STARTS = {"init", "init_sha256"}
UNHASHED_TRAINING = {"workers", "device", "checkpoint_seconds", "modalities", "primary", "backbones", "heads", *_STARTS}
"""Keys of a training that never change its result, or that are hashed under another name (modalities, arm, init)."""


class GridError(ConfigError):
    """A key or value of `grid` is not allowed; `key` is the dotted key."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def combinations(config: RunConfig) -> list[tuple[dict[str, Any], RunConfig]]:
    """Every combination of the grid's values: (varied values, config with them in place), in order.

    Without a grid there is one combination that varies nothing.

    Raises:
        GridError: a key that cannot be varied, no values, or a value the config refuses.
    """
    for key, values in config.grid.items():
        _check_key(key)
        if not values:
            raise GridError(key, f"grid.{key} = [] must have at least one value")
    base = config.model_copy(update={"grid": {}}).model_dump(mode="json")
    found: list[tuple[dict[str, Any], RunConfig]] = []
    for values in itertools.product(*config.grid.values()):
        varied = dict(zip(config.grid, values, strict=True))
        variant = _settled(_with_values(base, varied))
        if "model" in varied:
            varied["model"] = variant.model.name
        if variant.model.fusion.early:
            settled = {"finetune.backbones": "full", "model.fusion.residual": False}
            varied |= {key: value for key, value in settled.items() if key in varied}
        found.append((varied, variant))
    return found


def _of_detector(plain: RunConfig, varied: Mapping[str, Any], variant: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The sweep with the variant's detector but its own fusion: what is pretrained and measured; and what it varies."""
    told = {key: value for key, value in varied.items() if key.startswith("model") and ".fusion." not in key}
    if not told:
        return plain, told
    model = variant.model.model_copy(update={"fusion": plain.model.fusion})
    return plain.model_copy(update={"model": model}), told


def _settled(config: RunConfig) -> RunConfig:
    """Early fusion has one form: one backbone of its own, so none is pretrained or frozen, and no residual.

    Combinations of a grid that differ in these alone become one cell.
    """
    if not config.model.fusion.early:
        return config
    model = config.model.model_copy(update={"fusion": FusionConfig(mixer="early", residual=False)})
    finetune = config.finetune.model_copy(update={"backbones": "full"})
    return config.model_copy(update={"model": model, "finetune": finetune})


def plain_of(config: RunConfig) -> RunConfig:
    """The sweep as it is without its grid."""
    return _settled(config.model_copy(update={"grid": {}}))


def cells(config: RunConfig, fingerprint: str) -> list[Cell]:
    """All cells of a sweep in stage order; every cell comes after the cells it needs.

    Args:
        config: the resolved sweep.
        fingerprint: of the input data, see core.scenes.

    Raises:
        GridError: see `combinations`.
    """
    combos = combinations(config)
    plain = plain_of(config)
    shards = shard_cells(plain, fingerprint)
    gather = shards[-1]
    names = _pretrained_modalities(plain, combos)
    detectors = [_of_detector(plain, varied, variant) for varied, variant in combos]
    trained: list[Cell] = []
    tuned: list[Cell] = []
    cached: list[Cell] = []
    for (varied, variant), (one, told) in zip(combos, detectors, strict=True):
        pretrained = {name: _pretrain_cell(one, name, gather, told) for name in names}
        features = _features_cells(variant, gather, pretrained)
        trained += pretrained.values()
        cached += features.values()
        tuned.append(_finetune_cell(variant, varied, gather, pretrained, features))
    trained = _unique([*trained, *tuned])
    found = [
        *shards,
        *cached,
        *trained,
        *(_evaluate_cell(cell, gather) for cell in trained),
        *(cell for one, told in detectors for cell in _measure_cells(one, tuned, fingerprint, told)),
        _summarise_cell(plain, fingerprint),
    ]
    return numbered(_unique([*predict_cell(config, found, fingerprint), *found]))


def finished(cell: Cell, paths: RunPaths) -> Record | None:
    """The record of a cell that is done: valid, of this RESULT_VERSION, with the files it speaks of there.

    A lost shard, index or checkpoint makes its cell undone, so that the next start finds and remakes it.
    A summary is never done: it reads whatever records there are.
    """
    record = None if cell.stage == "summarise" else valid_record(cell.id, cell.stage, paths)
    if record is None or (cell.stage == "features" and not scales_there(cell, record, paths)):
        return None
    return None if cell.stage in LENIENT and not inputs_same(cell, record, paths) else record


def valid_record(cell_id: str, stage: str, paths: RunPaths) -> Record | None:
    """As `finished`, for who has the cell's id and stage alone: stored scales and summaries are not looked into."""
    record = read_record(paths.cell(cell_id).record)
    if record is None or (record.cell, record.stage) != (cell_id, stage):
        return None
    if record.result_version != RESULT_VERSION[stage]:
        return None
    try:
        return record if _files_there(record, paths) else None
    except (AttributeError, KeyError, TypeError):  # results of another form are as good as none
        return None


def _files_there(record: Record, paths: RunPaths) -> bool:
    if record.stage == "preprocess":
        shards = cast(list[dict[str, Any]], record.results.get("shards", []))
        files = [(paths.shards / str(shard["file"]), shard.get("bytes")) for shard in shards]
        return all(file.is_file() and size in (None, file.stat().st_size) for file, size in files)
    if record.stage == "gather":
        return shards_indexed(paths.index, paths.rejected)
    if record.stage in ("pretrain", "finetune"):
        name, size = str(record.results.get("checkpoint") or ""), record.results.get("checkpoint_bytes")
        file = paths.cell(record.cell).root / name
        return file.is_file() and size in (None, file.stat().st_size)
    if record.stage in MAP_STAGES:
        made = cast(list[dict[str, Any]], record.results.get("files", []))
        written = [(paths.cell(record.cell).root / str(one["file"]), one["bytes"]) for one in made]
        return all(file.is_file() and file.stat().st_size == size for file, size in written)
    return True


def _check_key(key: str) -> None:
    """Raise GridError unless the sweep has `key` and a grid may vary it."""
    parts = tuple(key.split("."))
    known = fields_at(RunConfig, parts[:-1])
    if known is None or parts[-1] not in known:
        section = ".".join(parts[:-1])
        names = [f"{section}.{name}".lstrip(".") for name in known or ()] or list(VARIABLE)
        raise GridError(key, f'grid = "{key}" is no key of a sweep.{guess(key, names)}')
    if not any(key == root or key.startswith(f"{root}.") for root in VARIABLE) or key == "finetune":
        allowed = "finetune.*, model, model.*, seed"
        raise GridError(key, f'grid = "{key}" cannot be varied by a grid. Known: {allowed}.')


def _with_values(base: Mapping[str, Any], varied: Mapping[str, Any]) -> RunConfig:
    values = dict(base)
    for key, value in sorted(varied.items(), key=lambda item: item[0].count(".")):  # `model` before keys of it
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner[section] = dict(inner.get(section, {}))
            inner = inner[section]
        inner[last] = value
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        chosen = ", ".join(f"{key} = {show(value)}" for key, value in varied.items())
        text = explain(error, RunConfig, lambda key: (f"grid with {chosen}", key))
        raise GridError(next(iter(varied), ""), text) from None


def _pretrained_modalities(config: RunConfig, variants: Sequence[tuple[dict[str, Any], RunConfig]]) -> dict[str, None]:
    """Modalities to pretrain, in the data's order: those asked for, and those a fusion builds on."""
    wanted = set(config.pretrain.modalities or config.data.modalities)
    for _, variant in variants:
        if variant.finetune.backbones == "pretrained":
            wanted.update(variant.finetune.modalities)
    return {name: None for name in config.data.modalities if name in wanted}


def _hashed_data(config: RunConfig) -> dict[str, Any]:
    return config.data.model_dump(mode="json", exclude={"shard", "root", "name"})


def _hashed_model(config: RunConfig, modalities: Sequence[str]) -> dict[str, Any]:
    """The detector; one modality has no fusion."""
    unused = {"name"} if len(modalities) > 1 else {"name", "fusion"}
    return config.model.model_dump(mode="json", exclude=unused)


def _cell(stage: str, hashed: Mapping[str, Any], label: str, config: RunConfig, **fields: Any) -> Cell:
    identity = digest({"stage": stage, "version": RESULT_VERSION[stage], **hashed})
    return Cell(id=identity, stage=stage, label=label, config=config, **fields)


def shard_cells(config: RunConfig, fingerprint: str) -> list[Cell]:
    """The preprocess tasks and, last, the gather cell.

    The gather cell's id says which data the shards hold, not how many tasks wrote them.
    """
    data, tasks = _hashed_data(config), config.data.shard.tasks
    chips = {key: value for key, value in data.items() if key != "split"}
    parts = [
        _cell(
            "preprocess",
            {"data": chips, "fingerprint": fingerprint, "task": task, "tasks": tasks},
            f"preprocess {task + 1}/{tasks}",
            config,
            data_fingerprint=fingerprint,
        )
        for task in range(tasks)
    ]
    made_by = {"data": data, "fingerprint": fingerprint, "preprocess": RESULT_VERSION["preprocess"]}
    needs = tuple(part.id for part in parts)
    return [*parts, _cell("gather", made_by, "gather", config, needs=needs, data_fingerprint=fingerprint)]


def _pretrain_cell(config: RunConfig, modality: str, gather: Cell, varied: Mapping[str, Any]) -> Cell:
    hashed = {
        "model": _hashed_model(config, (modality,)),
        "training": config.pretrain.model_dump(mode="json", exclude=UNHASHED_TRAINING),
        **({"init": config.pretrain.init_sha256} if config.pretrain.init_sha256 else {}),
        "seed": config.seed,
        "modalities": [modality],
        "needs": [gather.id],
    }
    return _cell(
        "pretrain",
        hashed,
        " ".join([f"pretrain {modality}", *_told(varied)]),
        config,
        needs=(gather.id,),
        modalities=(modality,),
        arm="unimodal",
        data_fingerprint=gather.data_fingerprint,
    )


def _features_cells(config: RunConfig, gather: Cell, pretrained: Mapping[str, Cell]) -> dict[str, Cell]:
    """Modality -> the cell that stores its frozen backbone's scales; none where backbones run in every step."""
    found: dict[str, Cell] = {}
    for modality in config.finetune.modalities if config.finetune.cached else ():
        source = pretrained[modality]
        fields: dict[str, Any] = {"needs": (gather.id, source.id), "backbones": {modality: source.id}}
        fields |= {"modalities": (modality,), "arm": "pretrained", "data_fingerprint": gather.data_fingerprint}
        hashed, told = hashed_scales(config)
        label = f"{source.label.replace('pretrain', 'features', 1)} {told}"
        found[modality] = _cell("features", {**hashed, "needs": fields["needs"]}, label, config, **fields)
    return found


def _finetune_cell(
    config: RunConfig,
    varied: dict[str, Any],
    gather: Cell,
    pretrained: Mapping[str, Cell],
    features: Mapping[str, Cell],
) -> Cell:
    """One grid combination; with full training nothing is loaded, so it needs the shards only."""
    tuning = config.finetune
    modalities = (tuning.primary, *(name for name in tuning.modalities if name != tuning.primary))
    stored = {name: features[name].id for name in modalities if name in features}
    frozen = tuning.backbones == "pretrained"
    backbones = {name: pretrained[name].id for name in modalities} if frozen else {}
    needs = (gather.id, *backbones.values(), *stored.values())
    hashed = {
        "model": _hashed_model(config, modalities),
        "training": tuning.model_dump(mode="json", exclude=UNHASHED_TRAINING | {"features", "features_dtype"}),
        "heads": tuning.heads if frozen else "none",
        "seed": config.seed,
        "modalities": modalities,
        "arm": tuning.backbones,
        "needs": needs,
    }
    return _cell(
        "finetune",
        hashed,
        _finetune_label(config, modalities, varied),
        config,
        needs=needs,
        backbones=backbones,
        features=stored,
        modalities=modalities,
        arm=tuning.backbones,
        varied=varied,
        data_fingerprint=gather.data_fingerprint,
    )


def _finetune_label(config: RunConfig, modalities: Sequence[str], varied: Mapping[str, Any]) -> str:
    """E.g. `finetune rgb+ndvi cross residual pretrained`, then what else the grid varies."""
    words = ["finetune", "+".join(modalities)]
    if len(modalities) > 1:
        fusion = config.model.fusion
        words += ["early"] if fusion.early else [fusion.mixer, "residual" if fusion.residual else "plain"]
    words.append(config.finetune.backbones)
    told = {"model.fusion.mixer", "model.fusion.residual"}
    told |= {f"finetune.{name}" for name in FinetuneConfig.model_fields if name in UNHASHED_TRAINING - {"heads"}}
    return " ".join([*words, *_told({key: value for key, value in varied.items() if key not in told})])


def _told(varied: Mapping[str, Any]) -> list[str]:
    """What a label says of grid values, e.g. `epochs=3`."""
    return [f"{key.split('.')[-1]}={show(value)}" for key, value in varied.items()]


def _evaluate_cell(trained: Cell, gather: Cell) -> Cell:
    needs = (trained.id, gather.id)
    hashed = {"evaluate": trained.config.evaluate.model_dump(mode="json"), "needs": needs}
    return _cell(
        "evaluate",
        hashed,
        f"evaluate {trained.label}",
        trained.config,
        needs=needs,
        backbones=trained.backbones,
        modalities=trained.modalities,
        arm=trained.arm,
        varied=trained.varied,
        data_fingerprint=trained.data_fingerprint,
    )


def _measure_cells(config: RunConfig, tuned: Sequence[Cell], fingerprint: str, varied: Mapping[str, Any]) -> list[Cell]:
    """Memory per (modality set, arm): the sets asked for, else the primary alone and the fused sets."""
    asked = [tuple(modalities) for modalities in config.measure.modality_sets]
    fused = [cell.modalities for cell in tuned]
    found: list[Cell] = []
    for modalities in dict.fromkeys(asked or [(config.finetune.primary,), *fused]):
        arms = ("full",) if config.model.fusion.early else config.measure.arms  # early fusion freezes nothing
        for arm in arms if len(modalities) > 1 else ("unimodal",):
            hashed = {
                "model": _hashed_model(config, modalities),
                "measure": config.measure.model_dump(mode="json", exclude={"modality_sets", "arms"}),
                "bands": [config.data.modalities[name].channels for name in modalities],
                "classes": len(config.data.classes),
                "seed": config.seed,
                "modalities": modalities,
                "arm": arm,
            }
            words = ["measure", "+".join(modalities), *([arm] if len(modalities) > 1 else []), *_told(varied)]
            fields: dict[str, Any] = {"modalities": modalities, "arm": arm, "data_fingerprint": fingerprint}
            found.append(_cell("measure", hashed, " ".join(words), config, **fields))
    return found


def _summarise_cell(config: RunConfig, fingerprint: str) -> Cell:
    return _cell("summarise", {}, "summarise", config, data_fingerprint=fingerprint)


def _unique(found: Sequence[Cell]) -> list[Cell]:
    """The first of cells with one id: combinations that differ in nothing that counts are one cell."""
    first: dict[str, Cell] = {}
    for cell in found:
        first.setdefault(cell.id, cell)
    return list(first.values())


def numbered(found: Sequence[Cell]) -> list[Cell]:
    """Cells in stage order, each with its index in its stage's array."""
    numbered: list[Cell] = []
    for stage in STAGES:
        members = [cell for cell in found if cell.stage == stage]
        for task, cell in enumerate(members):
            numbered.append(cell.model_copy(update={"task": task, "tasks": len(members)}))
    return numbered
