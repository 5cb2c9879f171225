"""Weights of a file, made to fit a detector: first convolution inflated, relative positions resized, all else strict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rtshpc.core.config import ModelConfig, ResNetConfig
from rtshpc.model.detector import Detector
from rtshpc.model.imports.families import COUNTER, UNUSED, recognise
from rtshpc.model.imports.files import WeightFile, read_weights
from rtshpc.model.weights import ONE, WeightsError, check_fit, listed, load_strict

FIRST = (f"{ONE}patch_embed.proj.weight", f"{ONE}stem.conv1.weight")
"""Convolutions that see the bands."""

NORMS = tuple(f"{ONE}scale{level}_norm.{part}" for level in (2, 3, 4, 5) for part in ("weight", "bias"))
"""Norms of the four output scales: a classifier has none, so they stay as they were drawn (one and zero)."""

MASKS = "roi_heads.mask_head."

_BY_CLASS = re.compile(r"roi_heads\.(box_predictor\.(\d+\.)?(cls_score|bbox_pred)|mask_head\.predictor)\.(weight|bias)")
_CLASSES = re.compile(r"roi_heads\.box_predictor\.(\d+\.)?cls_score\.bias")
_TABLE = re.compile(r".+\.attn\.rel_pos_[hw]")


@dataclass(frozen=True)
class Fitted:
    """What a file gives a detector.

    Attributes:
        file: as it was read.
        family: short name of whose names it has.
        tensors: by the detector's names, in its shapes and types.
        fresh: the detector's tensors that the file does not give: they stay as they are.
        unused: names in the file for which the detector has no use.
        inflated: tensors of a first convolution changed to another number of bands.
        resized: relative-position tables resized.
    """

    file: WeightFile
    family: str
    tensors: dict[str, Tensor]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    inflated: tuple[str, ...]
    resized: tuple[str, ...]


def load_file(detector: Detector, path: Path) -> Fitted:
    """Start a detector of one modality from a file of any known family.

    Args:
        detector: what the file does not give stays as it is (`Fitted.fresh`).
        path: see `files.read_weights`.

    Raises:
        WeightsError: the file cannot be read, is of no known family, or does not fit; the detector is unchanged.
    """
    own = detector.state_dict()
    fitted = fit(read_weights(path), own, detector.model)
    load_strict(detector, {**own, **fitted.tensors}, str(path))
    return fitted


@dataclass(frozen=True)
class Translated:
    """A file under our names.

    Attributes:
        family: short name.
        tensors: by our names, as they are in the file.
        origins: our name -> name in the file.
        unused: the file's names that are known and that no detector uses.
    """

    family: str
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    unused: list[str]


def translate(file: WeightFile) -> Translated:
    """A file's tensors by our names, unchanged.

    Raises:
        WeightsError: of no known family, or two of its names are one of ours.
    """
    family = recognise(file)
    names = family.rename(list(file.tensors))
    origins = {ours: name for name, ours in names.items() if ours != UNUSED}
    unused = [name for name, ours in names.items() if ours == UNUSED]
    if len(origins) + len(unused) != len(names):
        twice = [name for name, ours in names.items() if ours and list(names.values()).count(ours) > 1]
        raise WeightsError(f"{file.path}: {listed('meaning the same tensor', twice)}")
    return Translated(family.name, {ours: file.tensors[name] for ours, name in origins.items()}, origins, unused)


def fit(file: WeightFile, own: Mapping[str, Tensor], model: ModelConfig) -> Fitted:
    """Make a file's tensors fit a detector.

    A file of a backbone alone fits the backbone alone. Predictors of another number of classes stay fresh, and so do
    the output norms that a classifier lacks; every other tensor must be there, expected, and of the right shape.

    Args:
        file: as read.
        own: state dict of the detector; only names, shapes and types count.
        model: its config.

    Raises:
        WeightsError: names what is missing, unexpected, of another shape or not finite.
    """
    translated = translate(file)
    given = translated.tensors
    if translated.family == "torchvision" and isinstance(model.backbone, ResNetConfig) and model.backbone.stride_in_1x1:
        raise WeightsError(
            f"{file.path}: torchvision's ResNets stride their 3x3 convolutions: set model.backbone.stride_in_1x1: false"
        )
    whole = not all(name.startswith(ONE) for name in given)
    wanted = {name: tensor for name, tensor in own.items() if whole or name.startswith(ONE)}
    useless = _without_use(given, wanted)
    given = {name: tensor for name, tensor in given.items() if name not in useless}
    fresh = _stays_fresh(given, wanted)
    inflated, resized = [], []
    for name, tensor in given.items():
        if name not in wanted:
            continue
        shape = wanted[name].shape
        if tensor.dim() == 5 and len(shape) == 4 and tensor.shape[2] == 1:
            given[name] = tensor = tensor.squeeze(2)  # a video model's convolution over one frame
        if name in FIRST and tensor.dim() == 4 and tensor.shape[1] != shape[1]:
            given[name] = inflate(tensor, shape[1])
            inflated.append(name)
        elif _TABLE.fullmatch(name) and tensor.dim() == 2 and tensor.shape[0] != shape[0]:
            given[name] = resize_table(tensor, shape[0])
            resized.append(name)
    check_fit({name: tensor for name, tensor in wanted.items() if name not in fresh}, given, str(file.path))
    _check_values(file, given)
    return Fitted(
        file=file,
        family=translated.family,
        tensors={name: tensor.to(wanted[name].dtype) for name, tensor in given.items()},
        fresh=tuple(name for name in own if name not in given),
        unused=(*translated.unused, *useless),
        inflated=tuple(inflated),
        resized=tuple(resized),
    )


def inflate(weight: Tensor, bands: int) -> Tensor:
    """A first convolution for another number of bands, whose answer to equal bands stays what it was.

    Args:
        weight: (width, own bands, kernel, kernel).
        bands: with more bands than before the kernels repeat in their order, each divided by how often it occurs
            (for whole repetitions this is timm's rule); with fewer, every band gets an equal share of their sum.

    Returns:
        (width, bands, kernel, kernel).
    """
    own, weight = weight.shape[1], weight.float()
    if bands < own:
        return weight.sum(1, keepdim=True).repeat(1, bands, 1, 1) / bands
    source = torch.arange(bands) % own
    return weight[:, source] / torch.bincount(source)[source].view(1, -1, 1, 1)


def resize_table(table: Tensor, rows: int) -> Tensor:
    """A relative-position table (own rows, c) with `rows` rows, by linear interpolation as in attention itself."""
    return F.interpolate(table.float().t()[None], size=rows, mode="linear")[0].t().contiguous()


def class_count(state: Mapping[str, Tensor]) -> int | None:
    """Classes (without background) of a detector's state dict; None where it has no class predictor."""
    return next((tensor.shape[0] - 1 for name, tensor in state.items() if _CLASSES.fullmatch(name)), None)


def _without_use(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Given names that the detector has no use for, and need not: counters, masks, predictors of other classes."""
    masks = any(name.startswith(MASKS) for name in wanted)
    counts = (class_count(given), class_count(wanted))
    others = None not in counts and counts[0] != counts[1]
    found: list[str] = []
    for name, tensor in given.items():
        if name not in wanted:
            useless = name.endswith(COUNTER) or (name.startswith(MASKS) and not masks)
        else:
            shape = wanted[name].shape
            by_class = _BY_CLASS.fullmatch(name) and tensor.dim() > 0
            useless = others and by_class and tensor.shape[0] != shape[0] and tensor.shape[1:] == shape[1:]
        if useless:
            found.append(name)
    return found


def _stays_fresh(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    """The detector's names that a file may lack: counters, all four output norms, all that depends on the classes."""
    found = {name for name in wanted if name not in given and name.endswith(COUNTER)}
    norms = {name for name in NORMS if name in wanted}
    by_class = {name for name in wanted if _BY_CLASS.fullmatch(name) and "bbox_pred" not in name}
    for group in (norms, by_class):
        if not any(name in given for name in group):
            found |= group
    if by_class <= found:
        # Class-specific boxes depend on the classes too; class-agnostic ones came with the file.
        found |= {name for name in wanted if _BY_CLASS.fullmatch(name) and name not in given}
    return found


def _check_values(file: WeightFile, given: Mapping[str, Tensor]) -> None:
    """Raise WeightsError for tensors of whole numbers where weights must be, and for NaN and infinity."""
    kinds = [name for name, tensor in given.items() if not tensor.is_floating_point() and not name.endswith(COUNTER)]
    wild = [name for name, tensor in given.items() if not bool(torch.isfinite(tensor).all())]
    faults = [listed("not of floating point", kinds), listed("not finite", wild)]
    if any(faults):
        raise WeightsError(f"{file.path}: bad values: {'; '.join(fault for fault in faults if fault)}")
