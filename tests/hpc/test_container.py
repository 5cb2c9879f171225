"""The container line and what is refused before it; images here are files with an image's head and labels."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.load import load_run, load_site, write_run_config
from rtshpc.hpc.container import (
    command,
    image_facts,
    image_labels,
    label_lines,
    refuse_image,
    refuse_start,
    result_versions,
)
from rtshpc.hpc.executor import become, task_command

ROOT = Path(__file__).resolve().parents[2]


def make_image(path: Path, labels: dict[str, str] | None) -> Path:
    """A SIF file of version 1 with its metadata and no file system; labels None leaves the metadata out."""
    content = json.dumps({"data": {"attributes": {"labels": labels}}, "type": "container"}).encode()
    numbers = (0, 0, 0, 2, 128, 2 * 585, 128 + 2 * 585, len(content))
    head = struct.pack(
        "<32s10s3s3s16s8q", b"#!/usr/bin/env run-singularity\n", b"SIF_MAGIC", b"01", b"02", b"", *numbers
    )
    kind = 0x4006 if labels is not None else 0x4001
    empty = struct.pack("<i?III7q128s384s", 0x4004, True, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, b"squashfs.img", b"")
    row = (kind, True, 2, 1, 0, 128 + 2 * 585, len(content), len(content), 0, 0, 0, 0, b"inspect-metadata.json", b"")
    path.write_bytes(head + empty + struct.pack("<i?III7q128s384s", *row) + content)
    return path


def versions(**changed: int | None) -> dict[str, str]:
    words = {**RESULT_VERSION, **changed}
    text = " ".join(f"{name}={version}" for name, version in words.items() if version is not None)
    return {"rtshpc.result_versions": text, "rtshpc.commit": "abc"}


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program by Apptainer's name: whoever looks for it on PATH finds it."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.fixture
def without_apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def binds(line: list[str]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for index, word in enumerate(line):
        if word == "--mount":
            fields = next(csv.reader([line[index + 1]]))
            found.append({key: value for key, _, value in (field.partition("=") for field in fields)})
    return found


def test_the_container_line_binds_what_the_task_reads_and_nothing_else(tmp_path: Path) -> None:
    site = SiteConfig(image="/images/r.sif", gpus=1, binds=("/scratch:/data:ro", "/archive"))
    line = command(site, ["-m", "x"], (tmp_path, tmp_path, Path.cwd(), tmp_path / "absent"), "python3")
    assert line[0] == "apptainer" and "--nv" in line
    assert line[line.index("--no-mount") + 1] == "home,cwd"
    seen = [(bind["source"], bind["destination"], "ro" in bind) for bind in binds(line)]
    assert sorted(seen[:2]) == sorted([(str(tmp_path),) * 2 + (False,), (str(Path.cwd()),) * 2 + (False,)])
    assert seen[2:] == [("/scratch", "/data", True), ("/archive", "/archive", False)]
    assert line[-5:] == [str(Path.cwd()), "/images/r.sif", "python", "-m", "x"]
    assert command(SiteConfig(), ["-m", "x"], (tmp_path,), "python3") == ["python3", "-m", "x"]
    assert "--nv" not in command(site.model_copy(update={"gpus": 0}), ["-m", "x"], (), "python3")


def test_a_folder_is_seen_under_its_name_and_its_real_name_whatever_letters_they_have(tmp_path: Path) -> None:
    real = tmp_path / 'a "b", $HOME:c=d'
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    line = command(SiteConfig(image="r.sif"), ["x"], (link,), "python3")
    assert [(bind["source"], bind["destination"]) for bind in binds(line)] == [(str(real),) * 2, (str(link),) * 2]


def test_folders_that_would_hide_the_images_own_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    line = command(SiteConfig(image="/r.sif"), ["x"], (Path("/"), Path("/usr"), Path("/opt")), "python3")
    assert binds(line) == []


def test_a_clone_is_bound_over_the_images_code_so_that_it_cannot_be_written(tmp_path: Path) -> None:
    line = command(SiteConfig(image="/r.sif", dev_bind=str(ROOT)), ["x"], (), "python3")
    assert binds(line) == [{"type": "bind", "source": str(ROOT), "destination": "/opt/rtshpc/src", "ro": ""}]


def test_labels_are_read_from_the_file_without_apptainer(tmp_path: Path, without_apptainer: None) -> None:
    image = make_image(tmp_path / "r.sif", {"a": "b c"})
    assert image_labels(image) == {"a": "b c"}
    assert image_labels(make_image(tmp_path / "bare.sif", None)) == {}


def test_a_launcher_without_apptainer_takes_an_image_that_gives_the_same_results(
    tmp_path: Path, without_apptainer: None
) -> None:
    image = str(make_image(tmp_path / "r.sif", versions()))
    refuse_image(SiteConfig(image=image, executor="slurm"))
    refuse_image(SiteConfig())
    with pytest.raises(RunError, match="has no apptainer on PATH"):
        refuse_image(SiteConfig(image=image))
    with pytest.raises(RunError, match="has no apptainer on PATH"):
        refuse_start(SiteConfig(image=image, executor="slurm"), image_facts(SiteConfig(image=image)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"preprocess": 1}, f"preprocess 1 (here {RESULT_VERSION['preprocess']})"),
        ({"measure": None, "thaw": 3}, f"measure none (here {RESULT_VERSION['measure']}), thaw 3 (here none)"),
    ],
)
def test_an_image_that_gives_other_results_is_refused_in_one_line(
    tmp_path: Path, apptainer: Path, changed: dict[str, int | None], told: str
) -> None:
    image = make_image(tmp_path / "r.sif", versions(**changed))
    with pytest.raises(RunError) as refused:
        refuse_image(SiteConfig(image=str(image)))
    text = str(refused.value)
    assert told in text and "or launch from commit abc" in text and "\n" not in text


def test_what_is_no_image_of_ours_is_refused_in_one_line(tmp_path: Path, apptainer: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(RunError) as refused:
            refuse_image(SiteConfig(image=str(path)))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    image = make_image(tmp_path / "r.sif", {"a": "b"})
    assert "has no label rtshpc.result_versions" in said(image)
    assert "has no label rtshpc.result_versions" in said(make_image(tmp_path / "bare.sif", None))
    assert "no such image" in said(tmp_path / "no image here.sif")
    assert "cannot be read: Is a directory" in said(tmp_path)
    whole = image.read_bytes()
    for name, content in {"text": b"FROM debian\n", "empty": b"", "torn": whole[:700], "cut": whole[:-9]}.items():
        (tmp_path / name).write_bytes(content)
        assert "is no whole Apptainer image (SIF)" in said(tmp_path / name)


def test_an_images_hash_is_pinned_and_taken_anew_only_when_it_changed(tmp_path: Path) -> None:
    image = make_image(tmp_path / "r.sif", versions())
    site = SiteConfig(image=str(image))
    facts = image_facts(site)
    assert facts["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (facts["path"], facts["commit"]) == (str(image), "abc")
    assert image_facts(site, {**facts, "sha256": "kept"})["sha256"] == "kept"
    make_image(image, versions(gather=9))
    assert image_facts(site, facts)["sha256"] != facts["sha256"]
    assert image_facts(SiteConfig()) == {}
    wrong = SiteConfig(image=str(image), image_sha256="0" * 64)
    with pytest.raises(RunError, match=r"has SHA-256 .*, but site.image_sha256 asks for 000000000000; take that file"):
        image_facts(wrong)
    right = SiteConfig(image=str(image), image_sha256=image_facts(site)["sha256"])
    assert image_facts(right)["sha256"] == right.image_sha256


def test_a_task_does_not_start_in_an_image_that_was_replaced_since_and_says_so_where_status_looks(
    tmp_path: Path, apptainer: Path
) -> None:
    image = make_image(tmp_path / "r.sif", versions())
    config = load_run("demo", [f"site.image={image}"])
    pinned = image_facts(config.site)
    write_run_config(tmp_path / "config.yaml", config, {"image": pinned})
    refuse_start(config.site, pinned)
    refuse_start(SiteConfig(), None)
    os.utime(image, (1, 1))
    refuse_start(config.site, pinned)
    make_image(image, versions(gather=9))
    with pytest.raises(RunError, match=r"was replaced: .* `sweep` or `retry` takes the new one"):
        refuse_start(config.site, pinned)
    child = os.fork()
    if not child:
        try:
            become("gather", str(tmp_path), "cell")
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    failure = json.loads((tmp_path / "cells" / "cell" / "failure.json").read_text())
    assert failure["kind"] == "RunError" and "was replaced" in failure["error"]


def test_the_scratch_folder_of_a_node_is_seen_in_the_image(
    tmp_path: Path, apptainer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    for folder in (run, scratch):
        folder.mkdir()
    monkeypatch.setenv("NODE_SCRATCH", str(scratch))
    image = make_image(tmp_path / "r.sif", versions())
    config = load_run("demo", [f"site.image={image}", "site.scratch=NODE_SCRATCH"])
    write_run_config(run / "config.yaml", config, {"image": image_facts(config.site)})
    assert str(scratch) in {bind["source"] for bind in binds(task_command("pretrain", str(run), "aa"))}


def test_a_clone_in_place_of_the_images_code_must_give_the_same_results_and_marks_every_record(
    tmp_path: Path, apptainer: Path
) -> None:
    clone = tmp_path / "my clone"
    source = clone / "rtshpc" / "core" / "cell.py"
    source.parent.mkdir(parents=True)
    source.write_text((ROOT / "rtshpc" / "core" / "cell.py").read_text())
    image = make_image(tmp_path / "r.sif", versions(gather=9))
    site = SiteConfig(image=str(image), dev_bind=str(clone))
    refuse_image(site)
    assert image_facts(site)["dev_bind"]["path"] == str(clone)
    assert "dev_bind" not in image_facts(SiteConfig(image=str(image)))
    source.write_text('raise SystemExit("run")\nRESULT_VERSION = {"gather": 9}\n')
    with pytest.raises(RunError, match=r"site.dev_bind = .*my clone: .* gather 9 \(here 1\)"):
        refuse_image(site)
    with pytest.raises(RunError, match="nowhere: is no clone of rtshpc"):
        refuse_image(SiteConfig(image=str(image), dev_bind=str(tmp_path / "nowhere")))


def test_labels_of_a_build_say_what_its_code_gives(tmp_path: Path) -> None:
    assert result_versions(ROOT) == RESULT_VERSION
    lines = dict(line.split(" ", 1) for line in label_lines(ROOT).splitlines())
    assert lines["rtshpc.result_versions"] == versions()["rtshpc.result_versions"]
    assert lines["rtshpc.commit"] == "unknown"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["binds=[scratch]"], 'binds: "scratch" must be SOURCE[:DESTINATION[:ro]] with absolute paths'),
        (["binds=['/a:/b:rx']"], "must be SOURCE"),
        (["image_sha256=abc", "image=r.sif"], "image_sha256"),
        (["image_sha256=" + "a" * 64], "image_sha256 is given without image"),
        (["dev_bind=/clone"], "dev_bind is given without image"),
    ],
)
def test_a_sites_image_is_checked_as_written(values: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_site("local", values)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_the_base_of_an_image_is_a_digest_or_none_was_resolved() -> None:
    facts: dict[str, Any] = {}
    for line in (ROOT / "containers" / "base.lock").read_text().splitlines():
        key, _, value = line.partition("=")
        facts[key] = value
    assert facts["tag"].count(":") == 1
    assert not facts["digest"] or (facts["digest"].startswith("sha256:") and len(facts["digest"]) == 71)
