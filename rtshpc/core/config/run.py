"""The whole config of a sweep: data, model, training, evaluation, measurement, site and grid."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveFloat, model_validator

from rtshpc.core.config.checks import FILE_NAME, SHA256, Binds, Line, Names, ordered, rising, unique
from rtshpc.core.config.data import DataConfig
from rtshpc.core.config.explain import show
from rtshpc.core.config.map import MapConfig
from rtshpc.core.config.model import ModelConfig
from rtshpc.core.config.scale import ScaleConfig
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import unknown

NO_FILE = "none"
"""In place of a file of weights."""

WEIGHT_FORMATS = {
    ".safetensors": "safetensors",
    ".pkl": "pickle",
    **dict.fromkeys((".pth", ".pyth", ".pt", ".bin"), "torch"),
}
"""Suffix of a file of weights -> how it is read."""


class AugmentConfig(Section):
    """Drawn per (seed, epoch, sample); geometry is the same for all modalities and the masks."""

    flip: bool = doc("horizontal and vertical flips", True)
    quarter_turns: bool = doc("rotations by 90 degrees", True)
    scale: tuple[float, float] = doc("random zoom, smallest and largest factor", (1.0, 1.0))
    brightness: float = doc("largest shift, in standard deviations of the modality", 0.0, ge=0)
    contrast: float = doc("largest change of gain, share", 0.0, ge=0, lt=1)
    noise: float = doc("largest noise, in standard deviations of the modality", 0.0, ge=0)

    @model_validator(mode="after")
    def _zoom_is_a_range(self) -> AugmentConfig:
        ordered(*self.scale, "scale")
        if self.scale[0] <= 0:
            raise ValueError(f"scale = {show(self.scale)} must be more than 0")
        return self


class TrainConfig(Section):
    """One training (Li et al. 2025, section 4: AdamW, 36 epochs, linear scaling)."""

    epochs: int = doc("passes over the training chips", 36, ge=1)
    batch_size: int = doc("chips a step over all processes", 16, ge=1)
    learning_rate: float = doc("at reference_batch; scaled linearly with batch_size", 1.6e-4, gt=0)
    reference_batch: int = doc("batch that learning_rate is meant for", 64, ge=1)
    schedule: Literal["steps", "cosine"] = doc("decay after warm-up", "steps")
    steps: tuple[float, ...] = doc(
        "for schedule steps: shares of the training at which the rate falls tenfold", (0.77, 0.92)
    )
    warmup_steps: int = doc("optimizer steps of linear warm-up", 250, ge=0)
    weight_decay: float = doc("of AdamW; none on norms, biases of norms and relative positions", 0.1, ge=0)
    clip_norm: float = doc("gradients are clipped to this norm; 0 = not", 1.0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = doc("autocast type", "fp32")
    augment: AugmentConfig = doc("augmentation", AugmentConfig())
    validate_every: int = doc("epochs between validations; the last is always validated", 1, ge=1)
    checkpoint_seconds: float = doc("a checkpoint is due after so long, s; also at each epoch's end", 300.0, ge=0)
    threads: int = doc("torch threads of a process; part of the result on CPU", 1, ge=1)
    workers: int = doc("loader processes; 0 = in the training process", 0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = doc("auto takes a GPU where one is visible", "auto")
    processes: int = doc("DistributedDataParallel processes of one task", 1, ge=1)

    @model_validator(mode="after")
    def _falls_during_the_training(self) -> TrainConfig:
        rising(self.steps, "steps", over=0, under=1)
        return self


class FinetuneConfig(TrainConfig):
    """Fusion fine-tuning; on top of a training, what is fused and from where."""

    modalities: Names = doc("fused modalities", ("rgb", "ndvi"), min_length=1)
    primary: str = doc("modality that queries the others", "rgb")
    backbones: Literal["pretrained", "full"] = doc(
        "pretrained: frozen after pretraining; full: all trains", "pretrained"
    )
    heads: Literal["primary", "none"] = doc(
        "start pyramid and heads from the primary's pretraining, or anew", "primary"
    )
    features: Literal["live", "cached"] = doc(
        "frozen backbones run in every step, or once for all cells (full training is always live)", "live"
    )
    features_dtype: Literal["fp16", "bf16"] = doc("type in which cached scales are stored", "fp16")

    @property
    def cached(self) -> bool:
        """Whether scales come from the feature cache."""
        return self.features == "cached" and self.backbones == "pretrained"

    @model_validator(mode="after")
    def _augmentation_can_be_cached(self) -> FinetuneConfig:
        plain = AugmentConfig(flip=self.augment.flip, quarter_turns=self.augment.quarter_turns)
        changed = [name for name in AugmentConfig.model_fields if getattr(self.augment, name) != getattr(plain, name)]
        if self.cached and changed:
            raise ValueError(
                f"augment.{changed[0]} = {show(getattr(self.augment, changed[0]))} cannot be cached: it draws other pixels in every epoch, and"
                " features = cached runs the backbones once for identity, flips and quarter turns; leave it out or"
                " take features: live"
            )
        return self


class PretrainConfig(TrainConfig):
    """Unimodal pretraining, one detector per modality."""

    modalities: Names = doc("modalities to pretrain; empty = all of the data", ())
    init: str = doc("weights to start from: none, or a file, relative to the current folder (docs/weights.md)", NO_FILE)
    init_sha256: str = doc("what that file must be; empty = the plan fills it in", "", pattern=SHA256)

    @model_validator(mode="after")
    def _init_is_a_file(self) -> PretrainConfig:
        if self.init == NO_FILE:
            if self.init_sha256:
                raise ValueError("init_sha256 is given without init")
        elif PurePath(self.init).suffix.lower() not in WEIGHT_FORMATS:
            raise ValueError(f'init = "{self.init}" must be none or a file of weights ({", ".join(WEIGHT_FORMATS)})')
        return self


class EvaluateConfig(Section):
    """Scoring of every trained cell on the test split."""

    size_edges_m2: tuple[float, ...] = doc("edges of the size classes, m2 (small to large)", (2000.0, 12000.0))
    gallery: int = doc("pictures of ground truth and predictions a cell", 6, ge=0)
    score_threshold: float = doc("lower detections are not drawn (all are scored)", 0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _sizes_are_classes(self) -> EvaluateConfig:
        rising(self.size_edges_m2, "size_edges_m2", over=0)
        return self


class MeasureConfig(Section):
    """Memory and time of a training step: forward and backward (Li et al. 2025, Table 2), then with the optimizer."""

    modality_sets: Annotated[tuple[Names, ...], AfterValidator(unique)] = doc(
        "measured sets; empty = the sets of the sweep and the primary", ()
    )
    arms: Annotated[tuple[Literal["pretrained", "full", "cached"], ...], AfterValidator(unique)] = doc(
        "measured arms; cached: on stored scales of frozen backbones", ("pretrained", "full"), min_length=1
    )
    chip_px: int = doc("side of the sample, px", 256, ge=32)
    precision: Literal["fp32", "bf16", "fp16"] = doc("autocast type", "bf16")
    device: Literal["auto", "cpu", "cuda"] = doc("auto takes a GPU where one is visible", "auto")
    batch: int = doc("samples of a step", 1, ge=1)
    instances: int = doc("slumps of each sample; 0 = as few as fill RoIs and foreground RoIs, at least 9", 0, ge=0)
    repeats: int = doc("measured steps after the warm-up", 5, ge=1)
    warmups: int = doc("steps before them", 2, ge=0)


class SiteConfig(Section):
    """A place to run: what `configs/sites/*.yaml` holds."""

    name: str = doc("name of the site", "local")
    executor: Literal["local", "slurm", "debug"] = doc("processes here, Slurm jobs, or in this process", "local")
    max_jobs: int = doc("jobs at once; of each array on Slurm (%N)", 2, ge=1)
    account: Line = doc("Slurm account", "")
    partition: Line = doc("Slurm partition", "")
    qos: Line = doc("Slurm quality of service", "")
    constraint: Line = doc("Slurm node features", "")
    wckey: Line = doc("Slurm workload key; empty = none is given", "")
    nodes: int = doc(
        "nodes of a training; above 1 it runs as nodes x gpus tasks, one a GPU, with the same global batch", 1, ge=1
    )
    gpus: int = doc("GPUs of a training job, on each of its nodes", 0, ge=0)
    tasks_per_node: int = doc(
        "tasks of a training on each of its nodes; 0 = one a GPU over several nodes, one on a single node", 0, ge=0
    )
    gpu_type: str = doc("GPU type as Slurm spells it, e.g. a100; empty = any", "", pattern=r"^[\w.-]*$")
    gres: Literal["gpus-per-node", "gres"] = doc(
        "how GPUs are asked for: --gpus-per-node=[TYPE:]N or --gres=gpu:[TYPE:]N", "gpus-per-node"
    )
    gpu_memory_gb: int = doc(
        "memory of a GPU, GB; a task that does not find as many such GPUs calls its node bad; 0 = it does not look",
        0,
        ge=0,
    )
    cpus: int = doc("cores of a job", 1, ge=1)
    memory_gb: int = doc("memory of a job, GB", 8, ge=1)
    micro_batch: int = doc(
        "chips of a training step that a process works on together, to the same weights; 0 = all of its share", 0, ge=0
    )
    minutes: int = doc("time limit of a job, minutes", 240, ge=1)
    warn_seconds: int = doc("a task is told to save so long before its limit, s; Slurm may be 60 s early", 120, ge=1)
    requeue: Literal["never", "stopped", "killed"] = doc(
        "jobs that queue themselves again: none; those told to stop (preemption, time limit) or whose node was lost;"
        " those and the ones killed without a word",
        "killed",
    )
    max_attempts: int = doc("attempts of one job, all requeues counted", 10, ge=1)
    max_array: int = doc("elements of the largest array; Slurm's MaxArraySize - 1", 1000, ge=1)
    submit_limit: int = doc("jobs a user may have in the queue, array elements counted; 0 = no limit", 0, ge=0)
    charge_per_gpu_hour: float = doc(
        "what a GPU-hour costs, in the site's own unit; 0 = `usage` tells no price", 0.0, ge=0
    )
    charge_per_node_hour: float = doc(
        "what a node-hour costs; a job pays for the largest share of a node's GPUs, cores or memory that it holds",
        0.0,
        ge=0,
    )
    charge_unit: Line = doc("what a charge is counted in, e.g. SU; empty = the site's own unit", "")
    gpu_equivalents: dict[str, PositiveFloat] = doc(
        "name of a GPU of another site, as its records spell it -> GPU-hours here that an hour on it stands for", {}
    )
    node_gpus: int = doc("GPUs of a node; 0 = unknown", 0, ge=0)
    node_cpus: int = doc("cores of a node; 0 = unknown", 0, ge=0)
    node_memory_gb: int = doc("memory of a node, GB; 0 = unknown", 0, ge=0)
    accounting: bool = doc("ask sacct what jobs took; off where it is slow or not for users", True)
    modules: tuple[Line, ...] = doc("environment modules that a job loads, on the host", ())
    scratch: str = doc(
        "environment variable that names the scratch folder of a node; empty = none is used",
        "",
        pattern=r"^([A-Za-z_]\w*)?$",
    )
    stage_shards: bool = doc("copy shards to the scratch folder once a node, and read them there", False)
    network_interface: Line = doc("interface for NCCL and GLOO, e.g. ib0; empty = their choice", "")
    image: str = doc("Apptainer image (.sif) the tasks run in; empty = this environment", "")
    image_sha256: str = doc("what that file must be; empty = any, and records say which", "", pattern=SHA256)
    binds: Binds = doc(
        'folders seen in the image besides those a task is known to use: "SOURCE[:DESTINATION[:ro]]"', ()
    )
    dev_bind: str = doc("clone whose code runs in place of the image's own; every record says so", "")

    @property
    def tasks(self) -> int:
        """Tasks of a training on each of its nodes: those asked for, else over several nodes one a GPU."""
        return self.tasks_per_node or (max(1, self.gpus) if self.nodes > 1 else 1)

    @model_validator(mode="after")
    def _of_an_image(self) -> SiteConfig:
        for key in ("image_sha256", "dev_bind"):
            if getattr(self, key) and not self.image:
                raise ValueError(f"{key} is given without image")
        return self

    @model_validator(mode="after")
    def _fits_its_nodes(self) -> SiteConfig:
        for key, count in (("gpus", 1), ("cpus", self.tasks), ("memory_gb", self.tasks)):
            asked, there = count * getattr(self, key), getattr(self, f"node_{key}")
            if 0 < there < asked:
                raise ValueError(f"{key} = {getattr(self, key)} asks for {asked} of a node, node_{key} = {there}")
        if self.charge_per_node_hour and self.charge_per_gpu_hour:
            raise ValueError(
                "charge_per_node_hour and charge_per_gpu_hour are both given; a site charges for one of them"
            )
        if self.charge_per_node_hour and not (self.node_gpus or self.node_cpus):
            raise ValueError("charge_per_node_hour is given without node_gpus or node_cpus")
        return self

    @model_validator(mode="after")
    def _over_nodes(self) -> SiteConfig:
        if self.nodes > 1 and self.executor != "slurm":
            raise ValueError(f"nodes = {self.nodes} needs executor: slurm")
        if self.tasks_per_node > 1 and self.executor != "slurm":
            raise ValueError(f"tasks_per_node = {self.tasks_per_node} needs executor: slurm")
        if 0 < self.gpus < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node}: there are gpus = {self.gpus}, and each task needs its own"
            )
        if self.stage_shards and not self.scratch:
            raise ValueError("stage_shards is given without scratch")
        return self


class RunConfig(Section):
    """A sweep: what `configs/sweeps/*.yaml` holds. `data`, `model` and `site` may name a shipped file."""

    name: str = doc("name of the run and of its folder", pattern=FILE_NAME)
    data: DataConfig = doc("the data set, or the name of one in configs/data")
    model: ModelConfig = doc("the detector, or the name of one in configs/models")
    pretrain: PretrainConfig = doc("stage 1", PretrainConfig())
    finetune: FinetuneConfig = doc("stage 2")
    evaluate: EvaluateConfig = doc("scoring", EvaluateConfig())
    measure: MeasureConfig = doc("memory", MeasureConfig())
    map: MapConfig = doc("mapping (docs/mapping.md)", MapConfig())
    scale: ScaleConfig = doc("scaling study (docs/scaling.md)", ScaleConfig())
    site: SiteConfig = doc("where to run, or the name of one in configs/sites", SiteConfig())
    seed: int = doc("seed of weights, order and augmentation", 0, ge=0)
    grid: dict[str, tuple[Any, ...]] = doc("dotted key -> values; every combination is a finetune cell", {})

    @model_validator(mode="after")
    def _grid_keys_apart(self) -> RunConfig:
        for key in self.grid:
            for other in self.grid:
                # A model is a name; keys of it are then varied on top.
                if other.startswith(f"{key}.") and key != "model":
                    raise ValueError(f'grid: "{other}" is part of "{key}", which is varied too; vary one of them')
        return self

    @model_validator(mode="after")
    def _modalities_known(self) -> RunConfig:
        for place, names in (
            ("finetune.modalities", self.finetune.modalities),
            ("pretrain.modalities", self.pretrain.modalities),
            ("finetune.primary", (self.finetune.primary,)),
            *(("measure.modality_sets", names) for names in self.measure.modality_sets),
            ("map.modalities", self.map.modalities),
            ("map.dem", (self.map.dem,) if self.map.dem else ()),
        ):
            for name in names:
                if name not in self.data.modalities:
                    raise ValueError(unknown(place, name, self.data.modalities))
        varied = {"finetune.modalities", "finetune.primary"} & set(self.grid)
        if not varied and self.finetune.primary not in self.finetune.modalities:
            fused = ", ".join(self.finetune.modalities)
            raise ValueError(f'finetune.primary = "{self.finetune.primary}" is not fused. Known: {fused}.')
        return self
