"""The levers of memory: what they keep, what they change, and what they save."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtshpc.core.config import MViTConfig
from rtshpc.core.errors import ConfigError
from rtshpc.fusion.recompute import linear_in_rows, statistics_kept
from rtshpc.model.backbones.attention import PoolingAttention
from rtshpc.model.backbones.mvit import MViT
from rtshpc.model.detector import Detector
from rtshpc.model.layers import ConvNorm
from rtshpc.model.weights import load_backbone

TWO = {"rgb": 3, "ndvi": 1}
DROP = {"roi__norm": "bn", "backbone__drop_path": "0.3"}
SAME = {
    "heads": {"roi__recompute": "true"},
    "fusion": {"fusion__recompute": "true"},
    "convolution": {"fusion__recompute": "true", "fusion__mixer": "convolution"},
    "light": {"backbone__checkpoint": "light"},
    "blocks": {"backbone__checkpoint": "blocks"},
    "stages": {"backbone__checkpoint": "stages"},
}
"""Levers that run the same operations, some of them twice."""
HEAVY = ("aten.convolution.default", "aten.addmm.default", "aten.mm.default", "aten.bmm.default")


class Seen(TorchDispatchMode):
    """Counts operations, and the types of the numbers they take."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        floats = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        self.types.setdefault(str(func), set()).update(floats)
        return func(*args, **(kwargs or {}))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages that are kept for backward, without those of the module itself."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.found: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    @property
    def bytes(self) -> int:
        return sum(self.found.values())


def _half(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _step(model: nn.Module, given: dict[str, Tensor], targets: list[Any], dtype: torch.dtype | None = None) -> Tensor:
    with _half(dtype):
        losses = model(given, targets, [1, 2])
    values = torch.stack([losses[name] for name in sorted(losses)])
    values.sum().backward()
    return values.detach()


def _state(model: Detector, grads: bool = True) -> dict[str, Tensor]:
    found = {f"buffer {name}": value.clone() for name, value in model.named_buffers()}
    if grads:
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def _agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], share: float) -> None:
    """Relative norms; what is below rounding of the whole is skipped, as in the reference's README."""
    assert set(found) == set(wanted)
    total = sum(float(v.double().norm()) ** 2 for name, v in wanted.items() if not name.startswith("buffer")) ** 0.5
    for name, value in wanted.items():
        if name.startswith("buffer") or float(value.norm()) > 1e-5 * total:
            assert float((found[name] - value).double().norm()) <= share * float(value.double().norm()), name


@pytest.fixture
def scene(images, target) -> tuple[dict[str, Tensor], list[Any]]:
    return images(**TWO), [target((4, 6, 30, 40), (30, 34, 60, 62)), target((20, 20, 50, 44))]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lever", SAME)
def test_recomputing_gives_the_same_losses_gradients_and_statistics(lever: str, dtype, build, scene) -> None:
    mixer = {name: value for name, value in SAME[lever].items() if name == "fusion__mixer"}
    models = [build(TWO, **DROP, **mixer), build(TWO, **DROP, **SAME[lever])]
    for step in range(2):
        losses = [_step(model, *scene, dtype) for model in models]
        assert torch.equal(*losses), step
    plain, lean = (_state(model) for model in models)
    if lever == "heads" and dtype is not None:
        _agree(lean, plain, 1e-2)  # the weight gradient of fc1 is made in other blocks of rows
    else:
        assert all(torch.equal(lean[name], value) for name, value in plain.items())
    counts = {int(v) for name, v in lean.items() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_running_statistics_would_be_updated_twice_without_care() -> None:
    layer = ConvNorm(3, 4, 3, norm=nn.BatchNorm2d(4), relu=True)
    x = torch.randn(2, 3, 8, 8)
    layer(x)
    once = {name: value.clone() for name, value in layer.named_buffers()}
    with statistics_kept(layer):
        layer(x)
    assert all(torch.equal(value, once[name]) for name, value in layer.named_buffers())
    layer(x)
    assert not torch.equal(layer.norm.running_mean, once["norm.running_mean"])


@pytest.mark.parametrize("lever", ["heads", "fusion", "light"])
def test_no_product_is_run_twice_by_the_light_levers(lever: str, build, scene) -> None:
    counts: list[Counter[str]] = []
    for sets in ({}, SAME[lever]):
        model = build(TWO, **DROP, **sets)
        with Seen() as seen:
            _step(model, *scene)
        counts.append(seen.count)
    plain, lean = ({name: count[name] for name in HEAVY} for count in counts)
    assert plain == lean and plain["aten.convolution.default"] > 50


@pytest.mark.parametrize("lever", SAME)
def test_every_lever_keeps_less_for_backward(lever: str, build, images, target) -> None:
    sets = SAME[lever]
    mixer = {name: value for name, value in sets.items() if name == "fusion__mixer"}
    kept: list[int] = []
    for chosen in ({**DROP, **mixer}, {**DROP, **sets}):
        model = build(TWO, **chosen)
        found = Kept(model)
        with found, _half(torch.bfloat16):
            losses = model(images(**TWO), [target((4, 6, 30, 40))] * 2, [1, 2])
        kept.append(found.bytes)
        sum(losses.values()).backward()
    assert kept[1] < 0.99 * kept[0]


def test_the_autocast_cache_is_left_as_it_was(build, scene) -> None:
    model = build(TWO, **SAME["heads"])
    for state in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=state):
            model(*scene, [1, 2])
            assert torch.is_autocast_cache_enabled() is state


def test_rows_of_a_weight_gradient_add_up_to_the_whole() -> None:
    layer, x = nn.Linear(24, 300), torch.randn(7, 6, 4)
    grads = []
    for run in (linear_in_rows, lambda layer, x: layer(x.flatten(1))):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(layer, given)
        (out.float() * torch.arange(300)).sum().backward()
        grads.append((out, given.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for ours, plain in zip(*grads, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


def test_levers_work_in_distributed_training(build, scene, tmp_path) -> None:
    sets = {**DROP, **SAME["heads"], **SAME["fusion"], **SAME["light"], "backbone__attention": "fused"}
    alone = build(TWO, **sets)
    losses = _step(alone, *scene)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build(TWO, **sets), gradient_as_bucket_view=True)
        assert torch.equal(_step(wrapped, *scene), losses)
        found = _state(wrapped.module)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(found[name], value) for name, value in _state(alone).items())


@pytest.mark.parametrize("lever", ["none", "blocks"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_attention_gives_the_detector_the_same_step(lever: str, dtype, build, scene) -> None:
    found = []
    for attention in ("plain", "fused"):
        model = build(TWO, **DROP, backbone__attention=attention, backbone__checkpoint=lever)
        for net in model.backbone.backbones().values():
            for name, p in net.named_parameters():
                if "rel_pos" in name:
                    nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(len(name)))
        found.append((_step(model, *scene, dtype), _state(model)))
    (plain, wanted), (fused, ours) = found
    near = 1e-6 if dtype is None else 2e-2
    torch.testing.assert_close(fused, plain, rtol=near, atol=near)
    if dtype is None:
        _agree(ours, wanted, 1e-4)


@pytest.mark.parametrize(
    ("size", "strides", "window"), [((12, 20), (1, 4), 8), ((9, 14), (2, 2), 4), ((8, 12), (2, 1), 0)]
)
def test_fused_attention_equals_plain_with_padded_windows_and_strides(size, strides, window) -> None:
    torch.manual_seed(0)
    plain = PoolingAttention(16, 32, 2, *strides, window, 16)
    fused = PoolingAttention(16, 32, 2, *strides, window, 16, fused=True)
    nn.init.normal_(plain.rel_pos_h)
    nn.init.normal_(plain.rel_pos_w)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, *size, 16)
    results = []
    for attention in (plain, fused):
        given = x.clone().requires_grad_()
        out = attention(given)
        out.square().sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in attention.parameters())])
    largest = max(float(wanted.norm()) for wanted in results[0])
    for wanted, ours in zip(*results, strict=True):
        assert float((ours - wanted).norm()) <= 1e-5 * max(float(wanted.norm()), 1e-2 * largest)


def test_fused_attention_keeps_no_matrix_of_pairs() -> None:
    found: dict[bool, Kept] = {}
    for fused in (False, True):
        attention = PoolingAttention(16, 16, 1, 1, 1, 0, 48, fused=fused)
        found[fused] = Kept(attention)
        with found[fused]:
            attention(torch.randn(1, 48, 48, 16))
    matrix = (48 * 48) ** 2 * 4
    assert max(found[False].found.values()) >= matrix and found[True].bytes < matrix / 3


def test_a_window_that_divides_the_map_changes_the_function_and_interpolates_its_tables() -> None:
    sizes = {"embed_dim": 8, "depth": 4, "last_blocks": (0, 1, 2, 3), "pretrain_px": 32, "kv_stride": 2}
    nets = []
    for window in (6, 8):
        torch.manual_seed(0)
        nets.append(MViT(MViTConfig.model_validate({**sizes, "window_px": window}), 3))
    for net in nets:
        nn.init.normal_(net.blocks[0].attn.rel_pos_h, generator=torch.Generator().manual_seed(0))
    own, other = (dict(net.state_dict()) for net in nets)
    assert all(torch.equal(own[name], value) for name, value in other.items())  # the same weights fit any window
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (net(x) for net in nets)
    assert [a.shape for a in first] == [b.shape for b in second]
    assert not torch.allclose(first[0], second[0], atol=1e-4)


def test_a_window_that_pooling_does_not_divide_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.window_px gives a window of 30 tokens"):
        MViT(MViTConfig(window_px=30), 3)


def test_frozen_backbones_in_bf16_weigh_half_and_give_nearly_the_same_scales(build, scene) -> None:
    source = build({"rgb": 3})
    models = [build(TWO, frozen=True, frozen_dtype=dtype) for dtype in ("fp32", "bf16")]
    scales = []
    for model in models:
        for name in TWO:
            load_backbone(model, name, source.state_dict())
        given, _ = model.prepare(scene[0])
        scales.append([s for maps in model.backbone.scales(given, {}).values() for s in maps])
    weights = [sum(p.nbytes for net in m.backbone.backbones().values() for p in net.parameters()) for m in models]
    assert weights[1] * 2 == weights[0]
    for exact, near in zip(*scales, strict=True):
        assert near.dtype == exact.dtype == torch.float32 and not near.requires_grad
        assert 0 < float((near - exact).norm()) < 0.03 * float(exact.norm())
    before = {name: value.clone() for name, value in models[1].backbone.bottom_ups.state_dict().items()}
    _step(models[1], *scene)
    trained = {name: p for name, p in models[1].named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained.values())
    after = models[1].backbone.bottom_ups
    assert all(p.grad is None for p in after.parameters())
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())


def test_only_frozen_backbones_are_kept_in_bf16(build) -> None:
    assert all(p.dtype == torch.float32 for p in build(TWO, frozen_dtype="bf16").parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_losses_softmax_coding_and_suppression_are_fp32_under_autocast(dtype, lean: bool, build, scene) -> None:
    sets = {**SAME["heads"], **SAME["fusion"], **SAME["light"], "backbone__attention": "fused"} if lean else {}
    model = build(TWO, roi__norm="bn", roi__score_threshold=0.0, **sets)
    with Seen() as seen:
        losses = _step(model, *scene, dtype)
    assert losses.dtype == torch.float32 and bool(losses.isfinite().all())
    full = {torch.float32}
    for name in ("_log_softmax", "binary_cross_entropy_with_logits", "l1_loss", "log", "exp"):
        used = [types for op, types in seen.types.items() if op.startswith(f"aten.{name}.")]
        assert all(types == full for types in used), name
    assert any(op.startswith("aten.binary_cross") for op in seen.types)
    model.eval()
    with Seen() as seen, _half(dtype), torch.no_grad():
        found = model(scene[0])
    coded = {
        op: types for op, types in seen.types.items() if op.startswith(("torchvision.", "aten.exp.", "aten.sigmoid."))
    }
    assert any("nms" in op for op in coded) and any("roi_align" in op for op in coded)
    assert all(types == full for types in coded.values())
    assert found[0].scores_N.dtype == torch.float32 and len(found[0]) > 0
