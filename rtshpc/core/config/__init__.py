"""The config of a sweep: frozen models, one per YAML section."""

from rtshpc.core.config.data import (
    ChipConfig as ChipConfig,
    ColumnsConfig as ColumnsConfig,
    DataConfig as DataConfig,
    GeneratedConfig as GeneratedConfig,
    LabelsConfig as LabelsConfig,
    ModalityConfig as ModalityConfig,
    ScenesConfig as ScenesConfig,
    ShardConfig as ShardConfig,
    SplitConfig as SplitConfig,
)
from rtshpc.core.config.map import MapConfig as MapConfig, NormalConfig as NormalConfig
from rtshpc.core.config.model import (
    FusionConfig as FusionConfig,
    ModelConfig as ModelConfig,
    MViTConfig as MViTConfig,
    ResNetConfig as ResNetConfig,
    RoIConfig as RoIConfig,
    RPNConfig as RPNConfig,
)
from rtshpc.core.config.run import (
    AugmentConfig as AugmentConfig,
    EvaluateConfig as EvaluateConfig,
    FinetuneConfig as FinetuneConfig,
    MeasureConfig as MeasureConfig,
    PretrainConfig as PretrainConfig,
    RunConfig as RunConfig,
    SiteConfig as SiteConfig,
    TrainConfig as TrainConfig,
)
from rtshpc.core.config.scale import ScaleConfig as ScaleConfig, ScaleTask as ScaleTask
from rtshpc.core.config.section import Section as Section
