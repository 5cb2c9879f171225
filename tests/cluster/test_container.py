"""Tasks in a real image under a real Apptainer, as a user starts them."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION
from rtshpc.core.config import SiteConfig
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json
from rtshpc.hpc.container import command, image_labels
from tests.launch.conftest import Launcher

from .images import BOUND, ROOT, image_environment, thin_image

pytestmark = pytest.mark.slow

TO_SHARDS = ("--until", "preprocess", "--set", "data.shard.tasks=1")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return image_environment()


@pytest.fixture(scope="module")
def image(environment: dict[str, str]) -> Path:
    return thin_image()


def in_image(image: Path, **more: str) -> list[str]:
    """`--set` arguments that send a sweep's tasks into the image."""
    values = {"image": str(image), "binds": json.dumps([BOUND]), **more}
    return [word for key, value in values.items() for word in ("--set", f"site.{key}={value}")]


def records(paths: RunPaths) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(paths.cells.glob("*/record.json"))]


def shards(paths: RunPaths) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in paths.shards.glob("*.h5")}


@pytest.mark.full
def test_a_sweep_runs_in_the_image_wherever_it_lies_every_record_names_it_and_it_may_be_gone_later(
    image: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "a b, $HOME:c"
    folder.mkdir()
    moved = folder / "an image.sif"
    shutil.copyfile(image, moved)
    launcher = Launcher(folder)
    sha256 = hashlib.sha256(moved.read_bytes()).hexdigest()
    asked = in_image(moved, image_sha256=sha256)
    spoilt = environment | {"PYTHONPATH": "/nowhere:" + os.environ.get("PYTHONPATH", ""), "PROJ_LIB": "/nowhere"}
    one = ("--until", "pretrain", "--set", "data.shard.tasks=1", "--set", "pretrain={modalities: [rgb], epochs: 1}")
    answer = launcher.run("sweep", *one, *asked, **spoilt)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    paths = RunPaths(launcher.runs / "small")
    made = records(paths)
    assert {record["stage"] for record in made} == {"preprocess", "gather", "pretrain"}
    inside = subprocess.run(
        ["apptainer", "exec", moved, "python", "-V"], env=environment, capture_output=True, text=True, check=True
    )
    for record in made:
        facts = record["environment"]
        assert (facts["image"]["sha256"], facts["image"]["path"]) == (sha256, str(moved))
        assert f"Python {facts['python']}" == inside.stdout.strip()
        assert facts["commit"] == facts["image"]["commit"] == image_labels(moved)["rtshpc.commit"]
        assert "dev_bind" not in facts["image"]
    moved.unlink()
    later = launcher.run("sweep", *TO_SHARDS)
    assert (later.returncode, "nothing to do" in later.stdout) == (0, True), later.stdout + later.stderr
    here = Launcher(tmp_path)
    assert here.run("sweep", *TO_SHARDS, **os.environ).returncode == 0
    assert shards(paths) == shards(RunPaths(here.runs / "small")) != {}


def test_what_schedulers_set_reaches_the_task_and_what_spoils_it_does_not(
    image: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    passed = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_GPUS": "0,1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SUBMITIT_EXECUTOR": "slurm",
        "MASTER_ADDR": "node-1",
        "NCCL_SOCKET_IFNAME": "ib0",
        "OMP_NUM_THREADS": "3",
    }
    spoilt = dict.fromkeys(("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "GDAL_DATA", "PROJ_LIB"), "/nowhere")
    site_wide = {"APPTAINER_CLEANENV": "1", "APPTAINER_CONTAINALL": "1", "APPTAINER_CONTAIN": "1"}
    code = "import json, os, sys; print(json.dumps([dict(os.environ), sys.path, sys.argv[1:], os.getcwd()]))"
    words = ["a b", "$HOME", "'\""]
    line = command(SiteConfig(image=str(image), binds=(BOUND,)), ["-c", code, *words], (Path.cwd(),), "")
    answer = subprocess.run(
        line, env=environment | passed | spoilt | site_wide, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    seen, path, arguments, cwd = json.loads(answer.stdout)
    assert {name: seen.get(name) for name in passed} == passed
    assert not set(spoilt) & set(seen)
    assert (arguments, cwd) == (words, str(Path.cwd()))
    assert "" not in path and str(ROOT) not in path


def test_neither_home_nor_the_current_folder_come_along_unasked(
    image: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "print([line.split()[4] for line in open('/proc/self/mountinfo')])"

    def mounted(*folders: Path) -> set[str]:
        line = command(SiteConfig(image=str(image)), ["-c", code], folders, "")
        answer = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        return set(ast.literal_eval(answer.stdout))

    own = {str(Path.home()), str(tmp_path)}
    assert not own & mounted()
    assert own & mounted(tmp_path) == {str(tmp_path)}


@pytest.mark.full
def test_the_code_of_a_clone_runs_in_place_of_the_images_and_every_record_says_so(
    image: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    for name in ("rtshpc", "configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", clone / "pyproject.toml")
    changed = clone / "rtshpc" / "__init__.py"
    changed.write_text(changed.read_text().replace("0.1.0", "0.1.0+mine"))
    launcher = Launcher(tmp_path)
    answer = launcher.run("sweep", *TO_SHARDS, *in_image(image, dev_bind=str(clone)), **environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for record in records(RunPaths(launcher.runs / "small")):
        assert record["environment"]["commit"] == "0.1.0+mine"
        assert record["environment"]["image"]["dev_bind"] == {"path": str(clone), "commit": "0.1.0"}


def test_what_cannot_run_in_an_image_is_one_line_and_leaves_nothing(
    image: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    launcher = Launcher(tmp_path)

    def said(path: Path, **more: str) -> str:
        answer = launcher.run("sweep", *TO_SHARDS, *in_image(path, **more), **environment)
        assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
        assert not (launcher.runs / "small" / "cells").exists()
        return answer.stderr

    assert "but site.image_sha256 asks for aaaaaaaaaaaa" in said(image, image_sha256="a" * 64)
    assert "no such image" in said(tmp_path / "not here.sif")
    other = tmp_path / "other clone" / "rtshpc" / "core" / "cell.py"
    other.parent.mkdir(parents=True)
    other.write_text("RESULT_VERSION = " + repr({**RESULT_VERSION, "gather": 9}))
    assert "gather 9 (here 1)" in said(image, dev_bind=str(tmp_path / "other clone"))
    old = tmp_path / "old.sif"
    versions = image_labels(image)["rtshpc.result_versions"].encode()
    old.write_bytes(image.read_bytes().replace(versions, versions.replace(b"gather=1", b"gather=8")))
    assert "gather 8 (here 1)" in said(old)


def test_a_stopped_launcher_leaves_no_process_in_the_image_and_the_run_resumes_under_another_one(
    image: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = Launcher(tmp_path)
    asked = (*TO_SHARDS, "--set", "data.scenes.generated.size_px=800", *in_image(image))
    process = launcher.start(*asked)
    paths = RunPaths(launcher.runs / "small")
    deadline = time.monotonic() + 60
    while not list(paths.cells.glob("*/attempts.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not launcher.processes()
    other = tmp_path / "other.sif"
    other.write_bytes(image.read_bytes() + b"\0")  # behind what its table speaks of: the same system in another file
    again = launcher.run("sweep", *asked[: -len(in_image(image))], *in_image(other))
    assert again.returncode == 0, again.stdout + again.stderr
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    made = {record["stage"]: record for record in records(paths)}
    assert made["preprocess"]["attempts"] == 2
    assert {record["environment"]["image"]["sha256"] for record in made.values()} == {sha256}


def test_a_base_without_a_digest_is_refused_and_pinning_writes_what_was_resolved(tmp_path: Path) -> None:
    lock, bin_folder = tmp_path / "base.lock", tmp_path / "bin"
    lock.write_text("tag=debian:bookworm-slim\ndigest=\n")
    bin_folder.mkdir()
    skopeo = bin_folder / "skopeo"
    clean = os.environ | {"RTSHPC_BASE_LOCK": str(lock), "PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def build(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(ROOT / "containers" / "build.sh"), *arguments]
        return subprocess.run(line, env=clean, cwd=tmp_path, capture_output=True, text=True, check=False)

    refused = build()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "debian:bookworm-slim has no digest; run containers/build.sh --pin" in refused.stderr
    for answer, code in (("sha256:" + "a" * 64, 0), ("sha256:short", 2)):
        skopeo.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho {answer}\n')
        skopeo.chmod(0o755)
        assert build("--pin").returncode == code
        assert lock.read_text() == f"tag=debian:bookworm-slim\ndigest=sha256:{'a' * 64}\n"
    assert "docker://debian:bookworm-slim" in (tmp_path / "asked").read_text()
    assert "no digest" not in build("--lock", "nothing").stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian: apt-get install shellcheck)")
@pytest.mark.parametrize("script", ["containers/build.sh", "tests/cluster/apptainer.sh"])
def test_shell_scripts_are_clean(script: str) -> None:
    answer = subprocess.run(["shellcheck", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
