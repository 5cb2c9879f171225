"""Pickled arrays without their danger: a pickle may build text, numbers, lists, mappings and number arrays, no more.

Nothing that a pickle names is imported or called. The few names that pickled arrays need are answered by stand-ins
below, whatever else it asks for is refused by its name.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rtshpc.core.records import replacing
from rtshpc.model.weights import WeightsError


class Dtype:
    """Stands in for `numpy.dtype`: the type's code and, from its state, its byte order."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self._code, self._order = str(code).lstrip("<>|="), "="

    def __setstate__(self, state: Any) -> None:
        self._order = str(state[1]).replace("|", "=")

    def real(self) -> np.dtype[Any]:
        """The numpy type.

        Raises:
            ValueError: not one of numbers or truth values.
        """
        found = np.dtype(f"{self._order}{self._code}")
        if found.kind not in "fiub":
            raise ValueError(f"an array of {found}, must hold numbers")
        return found


class Array:
    """Stands in for `numpy.ndarray`, built in any of the ways that numpy's versions pickle an array."""

    def __init__(self, shape: Any = (0,), dtype: Any = None, raw: Any = b"") -> None:
        self._facts = (shape, dtype, raw, False)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, raw = state
        self._facts = (shape, dtype, raw, bool(columns_first))

    def real(self) -> np.ndarray[Any, Any]:
        """The array, in memory of its own and in this machine's byte order.

        Raises:
            ValueError: the parts do not make an array of numbers.
        """
        shape, dtype, raw, columns_first = self._facts
        if not isinstance(dtype, Dtype) or not isinstance(raw, bytes | bytearray | str):
            raise ValueError("an array that does not hold plain numbers")
        # Python 2 wrote bytes as text; `encoding="latin1"` keeps them one to one.
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        kind = dtype.real()
        sides = tuple(int(side) for side in shape)
        if min(sides, default=0) < 0 or math.prod(sides) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {sides} and type {kind} with {len(data)} bytes")
        found = np.frombuffer(data, kind).reshape(sides, order="F" if columns_first else "C")
        return found.astype(kind.newbyteorder("="), order="C")


def _reconstruct(kind: Any, *arguments: Any) -> Array:
    if kind is not Array:
        raise ValueError("an array of a class of its own")
    return Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    made = Array()
    made.__setstate__((1, shape, dtype, order == "F", raw))
    return made


def _scalar(dtype: Any, raw: Any) -> Any:
    return Array((), dtype, raw).real().item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if str(encoding) not in ("latin1", "latin-1"):
        raise ValueError(f"text in {encoding}")
    return str(text).encode("latin1")


def _bytes(raw: Any = b"") -> bytes:
    if not isinstance(raw, bytes):
        raise ValueError("bytes made of something else")
    return raw


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): _encode,
    **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
"""What a pickle may name, and what it gets for it."""


class _Restricted(pickle.Unpickler):
    """An unpickler that knows ALLOWED and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in for a name of the pickle.

        Raises:
            UnpicklingError: for every other name.
        """
        found = ALLOWED.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, allowed are only arrays, mappings, text and numbers"
            )
        return found


def read_pickle(path: Path) -> Any:
    """What a pickle holds; arrays come as numpy arrays.

    Raises:
        WeightsError: it is damaged, or asks for anything but arrays, mappings, text and numbers; the first such
            class is named.
    """
    try:
        with path.open("rb") as file:
            return _real(_Restricted(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: refused: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:
        # A damaged pickle can make the unpickler raise anything.
        text = " ".join(str(error).split()) or "it ends too early"
        raise WeightsError(f"{path}: no whole pickle of arrays: {type(error).__name__}: {text[:200]}") from None


def _real(value: Any) -> Any:
    """Stand-ins replaced by arrays, in mappings and lists too."""
    if isinstance(value, Array):
        return value.real()
    if isinstance(value, dict):
        return {key: _real(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_real(item) for item in value)
    return value


class _Portable(pickle.Pickler):
    """Pickles arrays by names that every version of numpy has (numpy 2's own pickles name `numpy._core`)."""

    def reducer_override(self, obj: Any) -> Any:
        """An array as its shape, type and bytes."""
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype, bytearray(obj.tobytes()))
        return NotImplemented


def write_pickle(path: Path, value: Any) -> None:
    """Write mappings, text, numbers and arrays so that Python 3.4 and numpy 1 or later read them; atomic."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        _Portable(file, protocol=4).dump(value)
