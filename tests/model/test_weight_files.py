"""Files of the published families: names, shapes and structure are the published ones, the values our own."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file as load_safetensors, save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet

from rtshpc.core.load import load_model
from rtshpc.model.detector import Detector, build_detector
from rtshpc.model.imports.export import export
from rtshpc.model.imports.files import WeightFile
from rtshpc.model.imports.fit import fit, inflate, load_file, resize_table
from rtshpc.model.weights import ONE, WeightsError

State = dict[str, Tensor]
TINY_ENDS, T_ENDS, S_ENDS, B_ENDS = (0, 1, 2, 3), (0, 2, 7, 9), (0, 2, 13, 15), (1, 4, 20, 23)


def randomised(detector: Detector) -> Detector:
    """Weights and buffers away from their starting values; variances stay positive."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in detector.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else tensor + drawn)
    return detector.eval()


def backbone_of(detector: Detector) -> State:
    return {k.removeprefix(ONE): v.clone() for k, v in detector.state_dict().items() if k.startswith(ONE)}


def as_mvit(state: State, classes: int = 1000) -> dict[str, Any]:
    """A `.pyth` of facebookresearch/mvit: the backbone's names, a norm and a head, the training's state around it."""
    width = state["scale5_norm.weight"].shape[0]
    model = {name: value for name, value in state.items() if not re.match(r"scale\d_norm", name)}
    model |= {"norm.weight": torch.rand(width), "norm.bias": torch.rand(width)}
    model |= {"head.projection.weight": torch.rand(classes, width), "head.projection.bias": torch.rand(classes)}
    return {"epoch": 299, "model_state": OrderedDict(model), "optimizer_state": {"state": {}}, "cfg": "MVIT: {}\n"}


def as_timm(state: State, ends: tuple[int, ...]) -> State:
    """timm's names, counted here from the ends of the stages and not from the names."""
    found: State = {}
    for name, value in as_mvit(state)["model_state"].items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            stage = sum(int(number) > end for end in ends)
            first = ends[stage - 1] + 1 if stage else 0
            rest = f"shortcut_proj_attn.{rest[5:]}" if rest.startswith("proj.") else rest
            name = f"stages.{stage}.blocks.{int(number) - first}.{rest}"
        found[name.replace("head.projection", "head.fc")] = value
    return found


def as_coco(state: State, author: str = "Detectron2 Model Zoo") -> dict[str, Any]:
    """A `.pkl` of Detectron2's model zoo."""
    return {"model": {name: value.numpy() for name, value in state.items()}, "__author__": author}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def zeros(like: Tensor) -> Tensor:
    """A tensor of that shape that takes no memory."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def scales(detector: Detector, size: int = 64) -> list[Tensor]:
    bands = detector.state_dict()[f"{ONE}patch_embed.proj.weight"].shape[1]
    image = torch.randn(1, bands, size, size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return list(detector.backbone.backbones()["rgb"](image))


@pytest.fixture
def source(build: Callable[..., Detector]) -> Detector:
    """A detector of one class whose output norms are those of a fresh one, as a classifier lacks them."""
    made = randomised(build({"rgb": 3}))
    with torch.no_grad():
        for level in (2, 3, 4, 5):
            norm = made.backbone.bottom_up.get_submodule(f"scale{level}_norm")
            norm.weight.fill_(1)
            norm.bias.zero_()
    return made


@pytest.mark.parametrize("family", ["mvit", "timm"])
@pytest.mark.parametrize("suffix", [".pyth", ".safetensors"])
def test_classifiers_give_their_backbone_and_leave_the_rest_as_drawn(
    source: Detector, build: Any, tmp_path: Path, family: str, suffix: str
) -> None:
    state = backbone_of(source)
    content: Any = as_timm(state, TINY_ENDS) if family == "timm" else as_mvit(state)
    if suffix == ".safetensors" and family == "mvit":
        content = content["model_state"]
    other = build({"rgb": 3})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    fitted = load_file(other, write(tmp_path / f"net{suffix}", content))
    assert all(torch.equal(a, b) for a, b in zip(scales(source), scales(other.eval()), strict=True))
    drawn = [name for name in before if not name.startswith(ONE) or "_norm." in name.removeprefix(f"{ONE}scale")[:8]]
    assert sorted(fitted.fresh) == sorted(drawn)
    assert all(torch.equal(before[name], other.state_dict()[name]) for name in drawn)
    assert len(fitted.unused) == 4 and fitted.family == family


def test_a_class_token_and_the_axis_of_one_frame_are_passed_over(source: Detector, build: Any, tmp_path: Path) -> None:
    content = as_mvit(backbone_of(source), classes=19168)
    model = content["model_state"]
    model["cls_token"] = torch.zeros(1, 1, 16)
    for name in model:
        if re.search(r"(patch_embed\.proj|pool_[qkv])\.weight", name):
            model[name] = model[name].unsqueeze(2)
    other = build({"rgb": 3})
    fitted = load_file(other, write(tmp_path / "in21k.pyth", content))
    assert "cls_token" in fitted.unused
    assert all(torch.equal(a, b) for a, b in zip(scales(source), scales(other.eval()), strict=True))


@pytest.mark.parametrize(
    ("name", "theirs", "ends"),
    [("mvitv2_t", "mvitv2_tiny", T_ENDS), ("mvitv2_s", "mvitv2_small", S_ENDS), ("paper", "mvitv2_base_cls", B_ENDS)],
)
def test_names_and_shapes_of_the_published_networks_fit_our_configs(
    tmp_path: Path, name: str, theirs: str, ends: tuple[int, ...]
) -> None:
    """Names and shapes from timm's code (`_cls` is the ImageNet-21k form), and facebookresearch's by timm's rule."""
    timm = pytest.importorskip("timm", reason="needs timm (extra benchmarks)")
    model = load_model(name)
    with torch.device("meta"):
        own = build_detector(model, {"rgb": 3}, 1).state_dict()
        net = timm.create_model(theirs, pretrained=False)
    backbone = {k.removeprefix(ONE): zeros(v) for k, v in own.items() if k.startswith(ONE)}
    classifier = {k: zeros(v) for k, v in net.state_dict().items()}
    mvit = as_mvit(backbone)["model_state"] | {k: v for k, v in classifier.items() if k == "cls_token"}
    by_their_rule = timm.models.mvitv2.checkpoint_filter_fn({"model_state": mvit}, net)
    assert set(by_their_rule) == set(classifier) == {*as_timm(backbone, ends), *mvit.keys() & {"cls_token"}}
    for family, content in (("timm", classifier), ("mvit", mvit)):
        fitted = fit(WeightFile(tmp_path, "torch", "", "", content), own, model)
        assert fitted.family == family and len(fitted.tensors) == len(backbone) - 8
        assert not fitted.resized and not fitted.inflated


@pytest.mark.slow
def test_timms_own_mvitv2_gives_the_same_scales(tmp_path: Path) -> None:
    """timm's network, not only its names; its classifier pools keys of two blocks half as far (see docs/weights.md)."""
    timm = pytest.importorskip("timm", reason="needs timm (extra benchmarks)")
    torch.manual_seed(0)
    theirs = timm.create_model("mvitv2_tiny", pretrained=False).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05)
    ours = build_detector(load_model("mvitv2_t"), {"rgb": 3}, 1).eval()
    load_file(ours, write(tmp_path / "timm.safetensors", theirs.state_dict()))
    net = ours.backbone.bottom_up
    for level, block in zip((2, 3, 4, 5), T_ENDS, strict=True):
        setattr(net, f"scale{level}_norm", torch.nn.Identity())
        if level in (3, 4):
            for pool in (net.blocks[block].attn.pool_k, net.blocks[block].attn.pool_v):
                pool.stride = (pool.stride[0] // 2, pool.stride[1] // 2)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens, size = theirs.patch_embed(image)
        for stage, scale in zip(theirs.stages, net(image), strict=True):
            tokens, size = stage(tokens, size)
            wanted = tokens.transpose(1, 2).reshape(scale.shape)
            torch.testing.assert_close(scale, wanted, atol=2e-5, rtol=1e-4)


def test_torchvisions_resnet_gives_the_same_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1])
    theirs(torch.randn(2, 3, 64, 64))  # running statistics away from zero and one
    model = load_model("mask_rcnn_r50", ["backbone.stride_in_1x1=false", "backbone.blocks=[2,1,1,1]"])
    ours = build_detector(model, {"rgb": 3}, 1).eval()
    fitted = load_file(ours, write(tmp_path / "net.pth", theirs.eval().state_dict()))
    assert {name.rpartition(".")[2] for name in fitted.unused} == {"num_batches_tracked", "weight", "bias"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for layer, scale in zip("1234", ours.backbone.bottom_up(image), strict=True):
            x = getattr(theirs, f"layer{layer}")(x)
            torch.testing.assert_close(scale, x, atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightsError, match="stride_in_1x1: false"):
        load_file(build_detector(load_model("mask_rcnn_r50"), {"rgb": 3}, 1), tmp_path / "net.pth")


def test_names_and_shapes_of_resnet50_fit_our_config(tmp_path: Path) -> None:
    model = load_model("mask_rcnn_r50", ["backbone.stride_in_1x1=false"])
    with torch.device("meta"):
        own = build_detector(model, {"rgb": 3}, 1).state_dict()
        net = resnet.resnet50(weights=None)
    theirs = {k: zeros(v) for k, v in net.state_dict().items()}
    fitted = fit(WeightFile(tmp_path, "torch", "", "", theirs), own, model)
    assert set(fitted.tensors) == {name for name in own if name.startswith(ONE)}


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_ours_exported_and_read_back_is_equal(build: Any, tmp_path: Path, suffix: str) -> None:
    ours, other = randomised(build({"rgb": 3}, roi__norm="bn")), build({"rgb": 3}, roi__norm="bn")
    path = tmp_path / f"ours{suffix}"
    export(ours.state_dict(), path)
    first = path.read_bytes()
    fitted = load_file(other, path)
    assert not fitted.fresh and not fitted.unused and fitted.family == "detectron2"
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.state_dict().items())
    export(other.state_dict(), path)
    assert path.read_bytes() == first


def test_a_coco_detector_gives_all_but_the_predictors_of_its_classes(build: Any, tmp_path: Path) -> None:
    coco, ours = randomised(build({"rgb": 3}, classes=80, roi__norm="bn")), build({"rgb": 3}, roi__norm="bn")
    state = coco.state_dict()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    fitted = load_file(ours, write(tmp_path / "model_final.pkl", as_coco(state)))
    drawn = [name for name in state if re.search(r"cls_score|mask_head\.predictor", name)]
    assert len(drawn) == 8 and sorted(fitted.fresh) == sorted(fitted.unused) == sorted(drawn)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name] if name in drawn else state[name])
    same = build({"rgb": 3}, classes=80, roi__norm="bn")
    assert not load_file(same, tmp_path / "model_final.pkl").fresh


def test_predictors_that_disagree_about_the_classes_are_refused(build: Any, tmp_path: Path) -> None:
    state = build({"rgb": 3}, classes=2).state_dict()
    state["roi_heads.mask_head.predictor.bias"] = torch.zeros(80)
    path = write(tmp_path / "model_final.pkl", as_coco(state))
    with pytest.raises(WeightsError, match=r"predictor\.bias is \(80,\), must be \(2,\)"):
        load_file(build({"rgb": 3}, classes=2), path)


def test_boxes_of_each_class_stay_fresh_with_other_classes_and_masks_may_be_off(build: Any, tmp_path: Path) -> None:
    sets = {"roi__kind": "standard", "roi__ious": "[0.5]"}
    coco = randomised(build({"rgb": 3}, classes=80, **sets))
    path = write(tmp_path / "model_final.pkl", as_coco(coco.state_dict()))
    fitted = load_file(build({"rgb": 3}, **sets), path)
    assert {name.split(".")[-2] for name in fitted.fresh} == {"cls_score", "bbox_pred", "predictor"}
    boxes = load_file(build({"rgb": 3}, roi__mask="false", **sets), path)
    assert any(name.startswith("roi_heads.mask_head.") for name in boxes.unused)


def test_a_file_of_a_backbone_alone_gives_the_backbone_alone(build: Any, tmp_path: Path) -> None:
    source = randomised(build({"rgb": 3}))
    only = {name: value for name, value in source.state_dict().items() if name.startswith(ONE)}
    export(only, tmp_path / "backbone.safetensors")
    other = build({"rgb": 3}, roi__fc_dim=32)
    fitted = load_file(other, tmp_path / "backbone.safetensors")
    assert set(fitted.tensors) == set(only)
    assert all(torch.equal(a, b) for a, b in zip(scales(source), scales(other.eval()), strict=True))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda s: s.pop("blocks.2.norm1.bias"), rf"1 missing \({ONE}blocks\.2\.norm1\.bias\)"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 9, 16)), rf"1 unexpected \({ONE}pos_embed\)"),
        (lambda s: s.update({"blocks.4.norm1.bias": torch.zeros(128)}), r"1 unexpected .*blocks\.4\.norm1\.bias"),
        (lambda s: s.update({"blocks.1.attn.rel_pos_t": torch.zeros(7, 16)}), r"unexpected .*rel_pos_t"),
        (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(9)}), r"fc1\.bias is \(9,\), must be \(64,\)"),
        (lambda s: s.update({"scale3_norm.bias": torch.zeros(32)}), r"7 missing .*scale2_norm\.weight"),
        (lambda s: s["blocks.0.norm1.bias"].fill_(float("nan")), r"1 not finite .*blocks\.0\.norm1\.bias"),
        (
            lambda s: s.update({"blocks.0.norm1.bias": torch.zeros(16, dtype=torch.int64)}),
            r"1 not of floating point .*blocks\.0\.norm1\.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    source: Detector, build: Any, tmp_path: Path, change: Callable[[State], Any], wanted: str
) -> None:
    content = as_mvit(backbone_of(source))
    change(content["model_state"])
    other = build({"rgb": 3})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    path = write(tmp_path / "net.pyth", content)
    with pytest.raises(WeightsError, match=wanted) as caught:
        load_file(other, path)
    assert str(caught.value).startswith(f"{path}:") and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_another_network_is_refused_with_the_names_that_would_tell_it(build: Any, tmp_path: Path) -> None:
    plain = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    path = write(tmp_path / "vit.pth", plain)
    with pytest.raises(WeightsError) as caught:
        load_file(build({"rgb": 3}), path)
    text = str(caught.value)
    assert "4 missing" in text and "blocks.0.attn.pool_q.weight of mvit" in text and "layer1.0.conv1.weight" in text
    assert "2 unexpected (cls_token, blocks.0.attn.qkv.weight)" in text


@settings(max_examples=30, deadline=None)
@given(own=st.integers(1, 4), bands=st.integers(1, 9))
def test_an_inflated_convolution_answers_equal_bands_as_before(own: int, bands: int) -> None:
    weight, grey = torch.randn(5, own, 7, 7), torch.randn(1, 1, 16, 16)
    made = inflate(weight, bands)
    assert made.shape == (5, bands, 7, 7)
    before = F.conv2d(grey.expand(-1, own, -1, -1), weight)
    torch.testing.assert_close(F.conv2d(grey.expand(-1, bands, -1, -1), made), before, atol=1e-4, rtol=1e-4)
    if bands >= own:
        ratio = made[:, :own].abs().sum() / weight.abs().sum()
        assert 0 < ratio <= 1.0001


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_one_and_many_bands_take_a_file_of_three(source: Detector, build: Any, tmp_path: Path, bands: int) -> None:
    path = write(tmp_path / "net.pyth", as_mvit(backbone_of(source)))
    other = build({"rgb": bands}).eval()
    fitted = load_file(other, path)
    # One band enters as three equal ones (docs/design.md), so it takes the file's convolution as it is.
    assert bool(fitted.inflated) == (bands != 1)
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        wanted = source.backbone.bottom_up(grey.expand(-1, 3, -1, -1))
        found = other.backbone.bottom_up(grey.expand(-1, 3 if bands == 1 else bands, -1, -1))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_relative_positions_are_resized_linearly_to_the_models_tables(
    source: Detector, build: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "net.pyth", as_mvit(backbone_of(source)))
    other = build({"rgb": 3}, backbone__pretrain_px=64)
    fitted = load_file(other, path)
    assert len(fitted.resized) == 8
    table, found = (d.backbone.bottom_up.blocks[0].attn.rel_pos_h.detach() for d in (source, other))
    assert (table.shape[0], found.shape[0]) == (63, 31)
    # Half-pixel linear interpolation, written out for one row.
    at = (10 + 0.5) * 63 / 31 - 0.5
    low = int(at)
    torch.testing.assert_close(found[10], table[low] * (1 - (at - low)) + table[low + 1] * (at - low))
    assert torch.equal(resize_table(table, 63), table)


def test_data_parallel_prefixes_and_our_own_checkpoints_are_read(build: Any, tmp_path: Path) -> None:
    state = build({"rgb": 3}).state_dict()
    wrapped = write(tmp_path / "ddp.pth", {"model": {f"module.{name}": value for name, value in state.items()}})
    best = write(tmp_path / "best.pt", {"format": 1, "cell": "x", "model": state})
    for path in (wrapped, best):
        assert not load_file(build({"rgb": 3}), path).fresh


def test_a_file_of_several_modalities_does_not_start_one(build: Any, tmp_path: Path) -> None:
    export(build({"rgb": 3, "ndvi": 1}).state_dict(), tmp_path / "fused.safetensors")
    assert len(load_safetensors(tmp_path / "fused.safetensors")) > 0
    with pytest.raises(WeightsError, match=r"missing \(backbone\.bottom_up\..*unexpected \(backbone\.bottom_ups\."):
        load_file(build({"rgb": 3}), tmp_path / "fused.safetensors")
