from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import ConfigError, DataError
from rtshpc.core.load import load_data
from rtshpc.core.scenes import Scene, data_fingerprint, list_scenes

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "scenes" / "public"
needs_public = pytest.mark.skipif(not PUBLIC.is_dir(), reason="needs ../shared/scenes/public (real scenes)")


def config(root: Path, scenes: dict[str, Any], **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"name": "set", "root": str(root), "primary": "rgb", "scenes": scenes}
    values["modalities"] = {"rgb": {"bands": ["red"]}}
    return DataConfig.model_validate({**values, **changes})


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def index(root: Path, text: str, name: str = "index.csv") -> dict[str, Any]:
    (root / name).write_text(text)
    return {"index": name}


def test_a_glob_ignores_what_is_no_raster(tmp_path: Path) -> None:
    touch(tmp_path, "b/two.tif", "a/one.TIF", "a/desktop.ini", "a/one.tif.aux.xml")
    scenes = list_scenes(config(tmp_path, {"glob": "**/*", "site_pattern": "^([ab])/"}), None)
    assert [(scene.id, scene.site) for scene in scenes] == [("one", "a"), ("two", "b")]
    assert scenes[0].image == str(tmp_path / "a/one.TIF")


@pytest.mark.parametrize("pattern", ["/abs/*.tif", "**x/*.tif"])
def test_a_glob_that_is_no_relative_pattern_is_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r'^scenes\.glob = ".*" is no pattern relative to data\.root: .'):
        list_scenes(config(tmp_path, {"glob": pattern}), None)


def test_a_glob_without_a_match_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no GeoTIFF"):
        list_scenes(config(tmp_path, {"glob": "*.tif"}), None)
    touch(tmp_path, "one.tif")
    with pytest.raises(ConfigError, match="finds no site"):
        list_scenes(config(tmp_path, {"glob": "*.tif", "site_pattern": "x(.)"}), None)
    with pytest.raises(ConfigError, match="no regular expression"):
        list_scenes(config(tmp_path, {"glob": "*.tif", "site_pattern": "("}), None)


def test_an_index_gives_the_facts_and_files_are_filled_in(tmp_path: Path) -> None:
    scenes = index(
        tmp_path,
        "scene,image,site,day,dem,use\ns2,x/b.tif,peel,2020,d/b.tif,yes\ns1,x/a.tif,banks,2021,,yes\ns3,x/c.tif,banks,2021,,no\n",
    )
    scenes |= {"columns": {"date": "day"}, "where": {"use": "yes"}}
    modalities = {
        "rgb": {"bands": ["red"]},
        "dem": {"bands": ["1"], "file": "{dem}"},
        "t": {"bands": ["1"], "file": "t/{site}_{stem}.tif"},
    }
    labels = {"file": "m/{scene}.tif", "ignore_file": "i/{stem}.geojson"}
    one, two = list_scenes(config(tmp_path, scenes, modalities=modalities, labels=labels), None)
    assert (one.id, one.site, one.date, one.image) == ("s1", "banks", "2021", str(tmp_path / "x/a.tif"))
    assert one.files == {"dem": "", "t": str(tmp_path / "t/banks_a.tif")}
    assert two.files["dem"] == str(tmp_path / "d/b.tif")
    assert (two.label, two.ignore_file) == (str(tmp_path / "m/s2.tif"), str(tmp_path / "i/b.geojson"))


def test_a_star_keeps_rows_with_any_value(tmp_path: Path) -> None:
    scenes = index(tmp_path, "scene,image,site,dem\na,a.tif,s,\nb,b.tif,s,d.tif\n") | {"where": {"dem": "*"}}
    assert [scene.id for scene in list_scenes(config(tmp_path, scenes), None)] == ["b"]


def test_a_geojson_index_is_read_like_a_table(tmp_path: Path) -> None:
    features = [{"type": "Feature", "geometry": None, "properties": {"scene": "a", "image": "a.tif", "site": 7}}]
    scenes = index(tmp_path, json.dumps({"type": "FeatureCollection", "features": features}), "index.geojson")
    assert list_scenes(config(tmp_path, scenes), None)[0].site == "7"
    for text in ("[1]", "[" * 100_000, '{"features": [{"properties": [1]}]}', '{"features": [null]}'):
        index(tmp_path, text, "index.geojson")
        with pytest.raises(DataError, match="FeatureCollection"):
            list_scenes(config(tmp_path, scenes), None)


def test_a_row_without_an_image_or_a_name_is_a_scene_that_will_be_rejected(tmp_path: Path) -> None:
    scenes = index(tmp_path, "scene,image,site\na,a.tif,s\nb,,s\n,c.tif,s\n,,\n\n,,s\n")
    found = list_scenes(config(tmp_path, scenes), None)
    assert [scene.image for scene in found] == [str(tmp_path / "a.tif"), "", "", ""]
    assert [scene.id for scene in found][:2] == ["a", "b"] and "c.tif" in found[2].id
    assert len(data_fingerprint(config(tmp_path, scenes), found, None)) == 64


def test_quoted_line_ends_odd_separators_and_padded_headers_are_read(tmp_path: Path) -> None:
    text = 'scene , image, site \r\n"a","a.tif","one\ntwo"\r\nb\u2028c,b.tif,s\r\n'
    (tmp_path / "index.csv").write_bytes(text.encode())
    found = list_scenes(config(tmp_path, {"index": "index.csv"}), None)
    assert [(scene.id, scene.site) for scene in found] == [("a", "one\ntwo"), ("b\u2028c", "s")]


@pytest.mark.parametrize(
    ("text", "changes", "hint"),
    [
        ("scene,image,site\n", {}, "lists no scene"),
        ("scene,image,site\na,a.tif,s\na,b.tif,s\n", {}, "listed twice"),
        ("scene,image,site\n,,\n , ,\n", {}, "lists no scene"),
        ("scene,image,site\na," + "x" * 200_000 + ",s\n", {}, "no CSV"),
        ("scene,imgae,site\na,a.tif,s\n", {}, 'Did you mean "imgae"'),
        ("scene,image,site\na,a.tif,s\n", {"where": {"sight": "s"}}, 'Did you mean "site"'),
        ("scene,image,site\na,a.tif,s\n", {"where": {"site": "t"}}, "none of 1 rows"),
    ],
)
def test_a_wrong_index_is_told_in_one_line(tmp_path: Path, text: str, changes: dict[str, Any], hint: str) -> None:
    with pytest.raises((DataError, ConfigError), match=hint) as error:
        list_scenes(config(tmp_path, index(tmp_path, text) | changes), None)
    assert "\n" not in str(error.value)


def test_a_missing_index_and_an_unknown_placeholder_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such index"):
        list_scenes(config(tmp_path, {"index": "none.csv"}), None)
    scenes = index(tmp_path, "scene,image,site\na,a.tif,s\n")
    with pytest.raises(ConfigError, match=r'labels.file = "{stm}" is unknown.*Did you mean "stem"'):
        list_scenes(config(tmp_path, scenes, labels={"file": "{stm}.tif"}), None)


def test_generated_scenes_are_named_before_they_are_drawn(tmp_path: Path) -> None:
    data = config(tmp_path, {"generated": {"sites": ["yamal", "banks"], "scenes_per_site": 2}})
    scenes = list_scenes(data, tmp_path)
    assert [scene.id for scene in scenes] == ["banks_000", "banks_001", "yamal_000", "yamal_001"]
    last = Scene(
        id="yamal_001",
        image=str(tmp_path / "yamal_001.tif"),
        label=str(tmp_path / "yamal_001_instances.tif"),
        site="yamal",
        generated=1,
    )
    assert scenes[-1] == last
    with pytest.raises(DataError, match="run folder"):
        list_scenes(data, None)


def fingerprint(root: Path, cache: Path | None = None, **changes: Any) -> str:
    data = config(root, {"glob": "*.tif"}, labels={"file": "{stem}.msk"}, **changes)
    return data_fingerprint(data, list_scenes(data, None), cache)


def test_the_fingerprint_sees_names_sizes_and_ends_but_not_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        touch(tmp_path / name, "a.tif", "a.msk")
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    seen = {first}
    for name, content in (("a.tif", b"A.tif"), ("a.msk", b"longer"), ("b.tif", b"new")):
        (tmp_path / "two" / name).write_bytes(content)
        seen.add(fingerprint(tmp_path / "two"))
    (tmp_path / "two" / "a.msk").unlink()
    seen.add(fingerprint(tmp_path / "two"))
    assert len(seen) == 5


def test_both_ends_of_a_large_file_count(tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    seen: set[str] = set()
    for at in (0, 1 << 20, len(content) - 1):
        content[at] = 1
        (tmp_path / "a.tif").write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2, "a change in the middle is not looked for, one at either end is"


def test_the_cache_is_trusted_only_for_the_same_size_and_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    touch(tmp_path, "a.tif")
    first = fingerprint(tmp_path, cache)
    stat = (tmp_path / "a.tif").stat()
    (tmp_path / "a.tif").write_bytes(b"b.tif")
    os.utime(tmp_path / "a.tif", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(tmp_path, cache) == first
    os.utime(tmp_path / "a.tif", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(tmp_path, cache) != first
    cache.write_text("torn{")
    assert fingerprint(tmp_path, cache) == fingerprint(tmp_path)


def test_generated_data_are_known_by_their_config(tmp_path: Path) -> None:
    one, two = (config(tmp_path, {"generated": {"seed": seed}}) for seed in (0, 1))
    assert data_fingerprint(one, [], None) != data_fingerprint(two, [], None)


def test_scenes_and_modality_import_no_pixels() -> None:
    code = "import sys, rtshpc.core.scenes, rtshpc.core.config.modality; print([m for m in ('numpy', 'rasterio', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@needs_public
def test_the_shipped_real_sets_list_their_scenes() -> None:
    root = f"root={PUBLIC}"
    scenes = list_scenes(load_data("sentinel2_rts", [root]), None)
    assert len(scenes) == 52
    assert all(Path(path).is_file() for scene in scenes for path in (scene.image, scene.label, scene.ignore_file))
    relief = list_scenes(load_data("sentinel2_rts_dem", [root]), None)
    assert len(relief) == 12
    assert all(Path(scene.files["relief"]).is_file() for scene in relief)
    assert len({scene.site for scene in relief}) == 6
