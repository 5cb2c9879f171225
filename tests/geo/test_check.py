"""The tool stage `check` on folders, pairs and data configs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from geo_making import BANDS, PLACE, reflectance, slumps, write_sample
from rasterio.transform import Affine

from rtshpc.core.errors import RtshpcError
from rtshpc.stages.tools import check


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


def test_one_bad_argument_is_a_verdict_and_costs_no_other(tmp_path: Path, capsys: Any) -> None:
    good = write_sample(tmp_path / "a") / "image.tif"
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "image.tif").symlink_to("image.tif")
    (tmp_path / "loop.tif").symlink_to("loop.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "wrong.yaml").write_text("name: [")
    bad = ["empty", "loop", "loop.tif", "pipe.tif", "wrong.yaml", "none.yaml", "none.tif", "x" * 300 + ".tif"]
    found = judged(capsys, good, *(tmp_path / name for name in bad), "nul\0.tif", "no_such_config", good)
    assert [one["verdict"] for one in found] == ["accept", *["reject"] * (len(bad) + 2), "accept"]
    assert all(one["reasons"] for one in found[1:-1])
    assert "no raster" in found[1]["reasons"][0]
    assert found[4]["reasons"][0].startswith("not_a_file")


def test_a_copy_is_found_however_it_is_compressed(tmp_path: Path, capsys: Any) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b", compress="deflate")
    write_sample(tmp_path / "c", compress="lzw", tiled=True, blockxsize=16, blockysize=16)
    write_sample(tmp_path / "d", transform=PLACE @ Affine.translation(1, 0))
    write_sample(tmp_path / "e", reflectance(seed=1))
    found = {Path(one["path"]).name: " ".join(one["reasons"]) for one in judged(capsys, tmp_path)}
    assert {name for name, reasons in found.items() if "duplicate" in reasons} == {"b", "c"}


@pytest.mark.parametrize(
    ("split", "hint"),
    [
        ("{rule: column}", "are asked for"),
        ("{rule: stratified}", "stay in one split"),
        ("{rule: site, test_sites: [t]}", "are asked for"),
        ("{rule: stratified, allow_leakage: true}", "allow_leakage may part"),
    ],
)
def test_what_is_said_of_copies_in_a_data_set_is_what_the_split_does(
    tmp_path: Path, capsys: Any, split: str, hint: str
) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b", compress="deflate")
    write_sample(tmp_path / "c", reflectance(seed=1))
    rows = [
        "a,a/image.tif,a/mask.tif,s,2020,train",
        "b,b/image.tif,b/mask.tif,t,2021,test",
        "c,c/image.tif,c/mask.tif,s,2022,train",
    ]
    path = write_index(tmp_path, rows)
    path.write_text(path.read_text().replace("{rule: column}", split))
    one, two, other = judged(capsys, path)
    assert all("has the pixels of" in found["reasons"][0] and hint in found["reasons"][0] for found in (one, two))
    assert other["verdict"] == "accept"
    if "leakage" not in split:
        from pyproj import CRS

        from rtshpc.core.load import load_data
        from rtshpc.data.split import Footprint, split_scenes

        corners = ((5e5, 7.6e6), (500_640, 7.6e6), (500_640, 7_599_360), (5e5, 7_599_360))
        zone8 = CRS.from_epsg(32608).to_wkt()
        facts = zip("abc", "sts", ("train", "test", "train"), strict=True)
        places = [Footprint(name, site, part, "", zone8, corners) for name, site, part in facts]
        drawn = split_scenes(places, load_data(str(path), []).split)
        assert len(set(drawn.values())) == 1, "and one split it is"
