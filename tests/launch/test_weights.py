"""`weights inspect` and `weights convert`, and `pretrain.init` in plans."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtshpc.core.errors import ConfigError, RtshpcError
from rtshpc.core.load import load_model, load_run, read_cell, read_run_config
from rtshpc.core.records import Record, read_json, write_record
from rtshpc.launch.plan import Plan, make_plan, plan_in
from rtshpc.launch.submit import prepare
from rtshpc.model.detector import build_detector
from rtshpc.model.imports.export import export
from rtshpc.model.imports.files import read_weights
from rtshpc.stages import __main__ as stages
from rtshpc.stages.tools import weights

from .conftest import Launcher

Run = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shipped tiny model for three bands and one class."""
    path = tmp_path / "tiny.safetensors"
    export(build_detector(load_model("tiny"), {"rgb": 3}, 1).state_dict(), path)
    return path


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any) -> str:
        assert weights.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_inspect_says_what_a_file_holds(launcher: Launcher, file: Path) -> None:
    answer = launcher("weights", "inspect", str(file), "--json")
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (facts["family"], facts["part"], facts["classes"]) == ("detectron2", "all", 1)
    assert facts["backbone"] == "MViTv2: 3 bands, width 16, 4 blocks, tables for 128 px"
    name = "backbone.bottom_up.patch_embed.proj.weight"
    assert facts["names"][name] == {"from": name, "shape": [16, 3, 7, 7], "dtype": "float32"}
    assert len(facts["names"]) == facts["tensors"]


def test_a_files_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": Path("x"), "__author__": "x"}))
    assert stages.main(["weights", "inspect", str(path)]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith(f"error: {path}: refused: it asks for pathlib.")


def test_the_table_names_where_each_tensor_came_from(tool: Run, tmp_path: Path) -> None:
    state = {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "net.pth")
    text = tool("inspect", tmp_path / "net.pth")
    assert "backbone.bottom_up.res2.0.conv1.weight (64, 64, 1, 1) float32  <- layer1.0.conv1.weight" in text
    assert "unused       fc.bias" in text


def test_convert_writes_detectron2s_names_in_either_format(tool: Run, file: Path, tmp_path: Path) -> None:
    tool("convert", file, tmp_path / "a.pkl", "--format", "pickle")
    tool("convert", tmp_path / "a.pkl", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    tool("convert", file, tmp_path / "c.safetensors", "--part", "backbone")
    assert {name.split(".")[1] for name in read_weights(tmp_path / "c.safetensors").tensors} == {"bottom_up"}


def test_convert_with_a_model_fits_the_file_to_it(tool: Run, file: Path, tmp_path: Path) -> None:
    model = tmp_path / "small_tables.yaml"
    model.write_text("base: tiny\nbackbone: {pretrain_px: 64}\n")
    text = tool("convert", file, tmp_path / "four.safetensors", "--model", model, "--bands", 4, "--classes", 6)
    assert "inflated: 1 tensors" in text and "resized: 8 tensors" in text and "not given: 8 tensors" in text
    found = read_weights(tmp_path / "four.safetensors").tensors
    assert found["backbone.bottom_up.patch_embed.proj.weight"].shape == (16, 4, 7, 7)
    assert not any("cls_score" in name for name in found)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("x.onnx",), r'suffix of the file to write = "\.onnx" is unknown'),
        (("x.pkl", "--format", "safetensors"), r"--format safetensors is written to \.safetensors files"),
        (("x.pkl", "--format", "pikle"), 'Did you mean "pickle"'),
        (("x.pkl", "--model", "tinny"), 'Did you mean "tiny"'),
        (("x.pkl", "--model", "mask_rcnn_r50"), "missing .*unexpected"),
        (("x.pkl", "--model", "tiny", "--bands", "0"), "must be at least 1"),
    ],
)
def test_what_convert_cannot_do_is_one_line(
    file: Path, tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    with pytest.raises(RtshpcError, match=wanted) as caught:
        weights.main(["convert", str(file), str(tmp_path / arguments[0]), *arguments[1:]])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / arguments[0]).exists()


FULL = ("finetune.backbones=full",)


def plan_of(launcher: Launcher, *sets: str) -> Plan:
    return make_plan(load_run(launcher.sweep, sets), launcher.runs)


def ids(plan: Plan, stage: str) -> list[str]:
    return [cell.id for cell in plan.cells if cell.stage == stage]


def test_a_start_changes_exactly_what_is_trained_from_it(launcher: Launcher, file: Path) -> None:
    start = f"pretrain.init={file}"
    plain, started = plan_of(launcher), plan_of(launcher, start)
    for stage in ("preprocess", "gather", "measure"):
        assert ids(plain, stage) == ids(started, stage)
    for stage in ("pretrain", "finetune", "evaluate"):
        assert not set(ids(plain, stage)) & set(ids(started, stage))
    assert ids(plan_of(launcher, *FULL), "finetune") == ids(plan_of(launcher, *FULL, start), "finetune")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert all(cell.config.pretrain.init_sha256 == sha256 for cell in started.cells)


def test_a_cell_knows_a_start_by_its_content_and_not_by_its_path(launcher: Launcher, file: Path) -> None:
    before = ids(plan_of(launcher, f"pretrain.init={file}"), "pretrain")
    moved = file.rename(file.with_name("moved.safetensors"))
    assert ids(plan_of(launcher, f"pretrain.init={moved}"), "pretrain") == before
    torch.manual_seed(9)
    export(build_detector(load_model("tiny"), {"rgb": 3}, 1).state_dict(), moved)
    assert not set(ids(plan_of(launcher, f"pretrain.init={moved}"), "pretrain")) & set(before)


def test_a_prepared_run_holds_the_hash_and_remembers_it(
    launcher: Launcher, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(launcher, f"pretrain.init={file}")
    assert not launcher.runs.exists()
    prepare(plan)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_run_config(plan.paths.config)[0].pretrain.init_sha256 == sha256
    cell = read_cell(plan.paths.cell(ids(plan, "pretrain")[0]).config)
    assert cell.config.pretrain.init_sha256 == sha256
    assert [entry["hash"] for entry in read_json(plan.paths.weight_hashes).values()] == [sha256]
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert ids(plan_of(launcher, f"pretrain.init={file}"), "pretrain") == ids(plan, "pretrain")


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        (("pretrain.init=/nowhere/w.pkl",), r'pretrain\.init = "/nowhere/w\.pkl": no such file; it is relative'),
        (("pretrain.init=weights",), r'--set: pretrain\.init = "weights" must be none or a file of weights \(\.safe'),
        (("pretrain.init_sha256=abc",), r"pretrain\.init_sha256"),
        (("pretrain.init_sha256=" + "a" * 64,), "init_sha256 is given without init"),
    ],
)
def test_a_start_that_is_none_is_one_line_at_plan_time(launcher: Launcher, sets: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        plan_of(launcher, *sets)
    assert "\n" not in str(caught.value)


def test_another_file_than_the_hash_asks_for_is_refused(launcher: Launcher, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"has SHA-256 .* but pretrain\.init_sha256 asks for aaaa"):
        plan_of(launcher, f"pretrain.init={file}", "pretrain.init_sha256=" + "a" * 64)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = plan_of(launcher, f"pretrain.init={file}", f"pretrain.init_sha256={sha256}")
    assert ids(pinned, "pretrain") == ids(plan_of(launcher, f"pretrain.init={file}"), "pretrain")


def test_a_lost_start_matters_only_while_something_trains_from_it(launcher: Launcher, file: Path) -> None:
    plan = plan_of(launcher, f"pretrain.init={file}")
    prepare(plan)
    config, _ = read_run_config(plan.paths.config)
    file.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        plan_in(config, plan.paths)
    for cell in plan.cells:
        if cell.stage == "pretrain":
            folder = plan.paths.cell(cell.id)
            folder.best_checkpoint.parent.mkdir(parents=True)
            folder.best_checkpoint.write_bytes(b"x")
            results = {"checkpoint": "checkpoints/best.pt"}
            facts: dict[str, Any] = {"label": cell.label, "result_version": 1, "started": "", "seconds": 1}
            write_record(folder.record, Record(cell=cell.id, stage=cell.stage, results=results, **facts))
    assert ids(plan_in(config, plan.paths), "pretrain") == ids(plan, "pretrain")
