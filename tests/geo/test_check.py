"""The tool stage `check` on folders, pairs and data configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from geo_making import BANDS, reflectance, slumps, write_sample

from rtshpc.core.errors import RtshpcError
from rtshpc.stages import check


def judged(capsys: Any, *arguments: Any) -> list[dict[str, Any]]:
    assert check.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_sample_without_labels_is_for_mapping_and_strays_are_ignored(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a")
    (tmp_path / "a" / "desktop.ini").write_text("[x]")
    write_sample(tmp_path / "b", reflectance(seed=1))
    (tmp_path / "b" / "mask.tif").unlink()
    first, second = judged(capsys, tmp_path)
    assert first["verdict"] == "accept"
    assert (second["verdict"], second["reasons"][0].split(":")[0]) == ("warn", "missing_label")


def test_a_copy_under_another_name_is_told_once(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    write_sample(tmp_path / "c", mask=slumps() * 0)
    assert [one["verdict"] for one in judged(capsys, tmp_path)] == ["accept", "warn", "accept"]
    assert judged(capsys, tmp_path / "b")[0]["verdict"] == "warn"


def test_rgb_alone_is_for_rgb_runs(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a", reflectance()[:3], names=BANDS[:3])
    assert judged(capsys, tmp_path / "a")[0]["reasons"][0].startswith("only_rgb")


def write_index(root: Path, rows: list[str]) -> Path:
    (root / "index.csv").write_text("\n".join(["scene,image,label,site,date,split", *rows]))
    path = root / "set.yaml"
    path.write_text(
        f"name: t\nroot: {root}\nprimary: rgb\n"
        "scenes: {index: index.csv, columns: {label: label, date: date, split: split}}\n"
        "modalities: {rgb: {bands: [red, green, blue]}, nir: {bands: [nir]}}\nsplit: {rule: column}\n"
    )
    return path


def test_a_data_config_is_judged_scene_by_scene(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    write_sample(tmp_path / "c", reflectance()[:3], names=BANDS[:3])
    rows = [
        f"{name},{name}/image.tif,{name}/mask.tif,s,2020,{split}"
        for name, split in zip("abc", ("train", "test", "train"), strict=True)
    ]
    path = write_index(tmp_path, [*rows, "d,d/image.tif,d/mask.tif,s,2020,train"])
    found = judged(capsys, path)
    assert [one["verdict"] for one in found] == ["warn", "warn", "reject", "reject"]
    assert found[0]["reasons"][0].startswith("duplicate")
    assert found[2]["reasons"][0].startswith("missing_band")
    assert found[3]["reasons"][0].startswith("missing_file")


def test_the_table_names_every_file(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a")
    assert check.main([str(tmp_path / "a"), "--max-pixels", "100000"]) == 0
    assert "1 accept, 0 warn, 0 reject" in capsys.readouterr().out


def test_labels_go_with_one_image(tmp_path: Path, capsys: Any) -> None:
    folder = write_sample(tmp_path / "a")
    image, mask = folder / "image.tif", folder / "mask.tif"
    assert judged(capsys, image, "--mask", mask)[0]["verdict"] == "accept"
    with pytest.raises(RtshpcError, match="exactly one image"):
        check.main([str(image), str(image), "--mask", str(mask)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RtshpcError, match="no raster"):
        check.main([str(tmp_path / "empty")])
