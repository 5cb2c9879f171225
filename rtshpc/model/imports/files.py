"""A file of weights -> tensors by the names in the file; safetensors, torch's formats and pickled arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from rtshpc.core.config.run import WEIGHT_FORMATS
from rtshpc.core.records import file_sha256
from rtshpc.model.imports.pickles import read_pickle
from rtshpc.model.weights import WeightsError

WRAPPINGS = ("model_state", "model", "state_dict")
"""Keys under which PySlowFast, Detectron2 and timm keep the tensors; the rest of such a file is not used."""


@dataclass(frozen=True)
class WeightFile:
    """A file of weights as read.

    Attributes:
        path: the file.
        kind: safetensors, torch or pickle.
        sha256: of the whole file.
        author: who a Detectron2 file says made it; empty = it does not say.
        tensors: by the names in the file.
    """

    path: Path
    kind: str
    sha256: str
    author: str
    tensors: dict[str, Tensor]


def read_weights(path: Path) -> WeightFile:
    """Read a file of weights; nothing in it is run.

    Args:
        path: `.safetensors`; `.pth`, `.pyth`, `.pt` or `.bin` (torch.save); `.pkl` (pickled arrays).

    Raises:
        WeightsError: absent, of another kind, damaged, or holding anything but named tensors of numbers.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    kind = WEIGHT_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise WeightsError(f"{path}: unknown kind of file. Known: {', '.join(WEIGHT_FORMATS)}.")
    content = {"safetensors": _safetensors, "torch": _torch, "pickle": read_pickle}[kind](path)
    author, values = _unwrapped(content, path)
    return WeightFile(path, kind, file_sha256(path), author, _tensors(values, path))


def _safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except Exception as error:
        # The library raises its own and several of the standard kinds for a damaged file.
        raise WeightsError(f"{path}: no whole safetensors file: {_line(error)}") from None


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many kinds for a damaged file; a refused class is named in a text of many lines.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"(?:global|class) ([\w.]+\.\w+)", str(error))
        if refused:
            raise WeightsError(f"{path}: refused: it asks for {refused[1]}, allowed are only tensors") from None
        raise WeightsError(f"{path}: no whole file of torch.save: {_line(error)}") from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _unwrapped(content: Any, path: Path) -> tuple[str, Mapping[Any, Any]]:
    """Author and the mapping of tensors, out of what the projects put around it."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, must be a mapping of names to tensors")
    for key in WRAPPINGS:
        if isinstance(content.get(key), Mapping):
            return str(content.get("__author__", "")), content[key]
    return "", content


def _tensors(values: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value)
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise WeightsError(f"{path}: {str(name)!r} is a {type(value).__name__}, must be a tensor of numbers")
        found[name] = value.detach()
    if not found:
        raise WeightsError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in found):  # DistributedDataParallel's prefix
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found
