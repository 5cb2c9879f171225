"""Our weights as files that others read: tensors under Detectron2's names, in safetensors or as pickled arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rtshpc.core.errors import unknown
from rtshpc.core.records import replacing
from rtshpc.model.imports.pickles import write_pickle
from rtshpc.model.weights import WeightsError

AUTHOR = "rtshpc"
"""Detectron2's DetectionCheckpointer takes a pickle for one of its own where it has `model` and `__author__`."""

WRITTEN = {".safetensors": "safetensors", ".pkl": "pickle"}
"""Suffix -> form in which a file is written."""


def export(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights under the names they have, atomically; equal weights give equal bytes.

    Args:
        state: tensors by our names, which are Detectron2's for a detector of one modality.
        path: `.safetensors`, or `.pkl`: `{"model": {name: array}, "__author__": "rtshpc"}`, which Detectron2's
            DetectionCheckpointer loads by exact names.

    Raises:
        WeightsError: another suffix, or the file cannot be written.
    """
    kind = WRITTEN.get(path.suffix.lower())
    if kind is None:
        raise WeightsError(unknown("suffix of the file to write", path.suffix, WRITTEN))
    tensors = {name: state[name].detach().cpu().contiguous().clone() for name in sorted(state)}
    try:
        if kind == "safetensors":
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"author": AUTHOR})
        else:
            # numpy has no bf16.
            arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
            write_pickle(path, {"model": arrays, "__author__": AUTHOR})
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error.strerror or error}") from None
