"""How files of weights are read and written: safe, whole, and by others too."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from rtshpc.model.imports.export import export
from rtshpc.model.imports.files import read_weights
from rtshpc.model.weights import ONE, WeightsError


def test_an_exported_pickle_is_what_detectron2_takes_for_its_own_on_any_numpy(build: Any, tmp_path: Path) -> None:
    state = build({"rgb": 3}, roi__norm="bn").state_dict()
    path = tmp_path / "ours.pkl"
    export(state, path)
    asked = {arg for op, arg, _ in pickletools.genops(path.read_bytes()) if op.name in ("GLOBAL",)}
    assert not asked  # protocol 4 names things by STACK_GLOBAL, whose parts are the strings below
    texts = {arg for op, arg, _ in pickletools.genops(path.read_bytes()) if "UNICODE" in op.name}
    assert {"numpy", "ndarray", "dtype", "builtins", "bytearray"} <= texts
    assert not [text for text in texts if text.startswith("numpy.")]
    data = pickle.loads(path.read_bytes(), encoding="latin1")
    assert data["__author__"] == "rtshpc" and not data.get("matching_heuristics", False)
    assert set(data["model"]) == set(state)
    for name, value in state.items():
        array = data["model"][name]
        assert type(array) is np.ndarray and array.flags.writeable
        assert torch.equal(torch.from_numpy(array), value)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_arrays_come_back_equal_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    arrays = {
        f"{ONE}c": np.arange(6, dtype=np.float32).reshape(2, 3),
        f"{ONE}fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        f"{ONE}big": np.arange(3).astype(">f4"),
        f"{ONE}none": np.zeros((0, 4), np.float16),
        f"{ONE}counter": np.array(7),
    }
    content = {"model": OrderedDict(arrays), "__author__": "x", "iteration": np.int64(3), "notes": ["a", 1.5, None]}
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_weights(path)
    assert (found.kind, found.author) == ("pickle", "x")
    for name, array in arrays.items():
        assert np.array_equal(found.tensors[name].numpy(), array) and found.tensors[name].shape == array.shape


class Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.answer = (call, arguments)

    def __reduce__(self) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(os.system, "touch {mark}"), "posix.system"),
        (Evil(eval, "open('{mark}', 'w')"), "builtins.eval"),
        (torch.zeros(1), "torch._utils._rebuild_tensor_v2"),
        (Path("x"), "pathlib."),
        (np.array([None, "a"]), "does not hold plain numbers"),
        (np.zeros(2, dtype=[("a", "f4")]), "V4"),
    ],
)
def test_an_unknown_class_in_a_pickle_is_refused_by_name_and_never_called(
    tmp_path: Path, value: Any, named: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pkl"
    if isinstance(value, Evil):
        value = Evil(value.answer[0], str(value.answer[1][0]).replace("{mark}", str(mark)))
    path.write_bytes(pickle.dumps({"model": {"w": value}, "__author__": "x"}, protocol=4))
    with pytest.raises(WeightsError, match=re.escape(named)) as caught:
        read_weights(path)
    assert not mark.exists() and "\n" not in str(caught.value)


def test_an_unknown_class_in_a_torch_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model_state": {}, "cfg": Path("x")}, path)
    with pytest.raises(WeightsError, match=r"refused: it asks for pathlib\.\w+") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_damaged_pickle_is_one_line_or_arrays(tmp_path_factory: Any, cut: int, flip: int, bit: int) -> None:
    whole = bytearray(pickle.dumps({"model": {f"{ONE}w": np.arange(4.0)}, "__author__": "x"}, protocol=4))
    whole[flip % len(whole)] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "a.pkl"
    path.write_bytes(bytes(whole[: len(whole) - cut % len(whole)]))
    try:
        found = read_weights(path)
    except WeightsError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in found.tensors.values())


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.onnx", b"x", r"unknown kind of file\. Known: \.safetensors, \.pkl"),
        ("a.safetensors", b"x" * 20, "no whole safetensors file"),
        ("a.pth", b"x" * 20, "no whole file of torch.save"),
        ("a.pkl", b"", "no whole pickle of arrays"),
        ("a.pkl", pickle.dumps([1]), "holds a list, must be a mapping"),
        ("a.pkl", pickle.dumps({"model": {}}), "holds no tensors"),
        ("a.pkl", pickle.dumps({"model": {"w": "text"}}), "'w' is a str, must be a tensor"),
    ],
)
def test_files_that_hold_no_weights_are_one_line(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=wanted) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
