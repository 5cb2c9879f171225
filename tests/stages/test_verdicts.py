"""What `check` says of a scene is what preprocess does with it, and no scene stops the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from geo_making import SHARED, reflectance, slumps, write_tif
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from rtshpc.core.cell import Cell
from rtshpc.core.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig
from rtshpc.core.load import load_data
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.stages import gather, preprocess
from rtshpc.stages.tools import check


class Folder:
    """A data set that is written scene by scene."""

    def __init__(self, root: Path, modalities: str = "rgb: {bands: ['1', '2', '3']}", primary: str = "rgb") -> None:
        self.root = root
        self.rows = ["scene,image,label,site"]
        self.modalities, self.primary = modalities, primary
        self.labels = "{kind: mask}"

    def add(self, name: str, pixels: Any = None, mask: Any = None, label: str = "", **profile: Any) -> Path:
        pixels = reflectance(seed=len(self.rows)) if pixels is None else pixels
        place = Affine(10, 0, 500_000 + 3000 * len(self.rows), 0, -10, 7_600_000)
        options = {"transform": place, "scale": None, **profile}
        image = write_tif(self.root / f"{name}.tif", pixels, **options)
        if not label:
            label = f"{name}_mask.tif"
            height, width = pixels.shape[-2:]
            ground = {"crs": options.get("crs", "EPSG:32608"), "transform": options["transform"]}
            write_tif(self.root / label, slumps()[:height, :width] if mask is None else mask, **ground)
        self.rows.append(f"{name},{name}.tif,{label},s")
        return image

    def write(self) -> Path:
        (self.root / "index.csv").write_text("\n".join(self.rows))
        (self.root / "set.yaml").write_text(
            f"name: t\nroot: {self.root}\nprimary: {self.primary}\nchip: {{size_px: 32, overlap_px: 0}}\n"
            "scenes: {index: index.csv, columns: {label: label}}\n"
            f"modalities: {{{self.modalities}}}\nlabels: {self.labels}\nshard: {{tasks: 1}}\n"
        )
        return self.root / "set.yaml"


def checked(capsys: Any, *arguments: Any) -> dict[str, tuple[str, list[str]]]:
    """Stem of the path -> verdict and reasons."""
    assert check.main([*map(str, arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {Path(one["path"]).stem: (one["verdict"], one["reasons"]) for one in found}


def preprocessed(config: Path, run: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Rejected scene -> reason, and gather's results."""
    data: DataConfig = load_data(str(config), [])
    finetune = FinetuneConfig(modalities=(data.primary,), primary=data.primary)
    settings = RunConfig(name="test", data=data, model=ModelConfig(name="none"), finetune=finetune)
    paths = RunPaths(run)
    paths.create()
    cell = Cell(id="pre", stage="preprocess", label="preprocess", task=0, tasks=1, config=settings)
    results = preprocess.run(cell, paths, SILENT)
    record = Record(
        cell="pre", stage="preprocess", label="", result_version=1, started="", seconds=0.0, results=results
    )
    write_record(paths.cell("pre").record, record)
    last = Cell(id="gather", stage="gather", label="gather", needs=("pre",), config=settings)
    return {row["scene"]: row["reason"] for row in results["rejected"]}, gather.run(last, paths, SILENT)


def colours(path: Path, names: str) -> None:
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp[name] for name in names.split()]


def test_check_rejects_exactly_the_scenes_that_preprocess_rejects(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    for number in range(3):
        folder.add(f"ok{number}")
    almost = reflectance(64, 256)
    almost[:, :, 2:] = 0
    part = reflectance()
    part[:, :10] = 0
    blind = reflectance()
    blind[:, :55] = 0
    unused = reflectance()
    unused[4] = 0
    folder.add("zeros", reflectance() * 0)
    folder.add("almost", almost, np.zeros((64, 256), np.uint8))
    folder.add("part", part)
    folder.add("blind", blind)
    folder.add("unused", unused)
    colours(folder.add("bgra", reflectance()[:4]), "blue green red alpha")
    colours(folder.add("bgr", reflectance()[:3]), "blue green red")
    degrees = Affine(1e-4, 0, -134, 0, -1e-4, 69)
    folder.add("pixel", reflectance(1, 1), np.zeros((1, 1), np.uint8), crs="EPSG:4326", transform=degrees)
    with rasterio.open(folder.add("lonely_scale"), "r+") as file:
        file.scales = (1.0, 1.0, 1.0, 1.0, float("nan"))
    if SHARED.is_dir():
        real = SHARED / "robustness" / "sample_defects" / "26_real_almost_empty_scene"
        for name, to in (("image.tif", "real.tif"), ("mask.tif", "real_mask.tif")):
            (tmp_path / to).write_bytes((real / name).read_bytes())
        folder.rows.append("real,real.tif,real_mask.tif,s")
    config = folder.write()
    told = checked(capsys, config)
    rejected, results = preprocessed(config, tmp_path / "run")
    assert {name for name, (verdict, _) in told.items() if verdict == "reject"} == set(rejected)
    wanted = {"zeros": "all_nodata", "almost": "almost_empty", "blind": "labels_on_missing"}
    wanted |= {"bgra": "band_order", "pixel": "too_small"}
    assert rejected == wanted | ({"real": "almost_empty"} if SHARED.is_dir() else {})
    assert all(told[name][1][0].startswith(reason) for name, reason in rejected.items())
    assert told["part"][0] == told["bgr"][0] == told["lonely_scale"][0] == "warn"
    assert told["ok0"] == ("accept", [])
    assert results["scenes"]["warned"] == 2


def nan_scale(path: Path) -> None:
    with rasterio.open(path, "r+") as file:
        file.scales = (float("nan"),) * file.count


def infinite_offset(path: Path) -> None:
    with rasterio.open(path, "r+") as file:
        file.offsets = (float("inf"),) * file.count


def one_huge_pixel(path: Path) -> None:
    with rasterio.open(path, "r+") as file:
        pixels = file.read()
        pixels[:, 40, 40] = 1e300
        file.write(pixels)


@pytest.mark.parametrize(
    ("spoil", "reason"), [(nan_scale, "bad_scale"), (infinite_offset, "bad_scale"), (one_huge_pixel, "bad_values")]
)
def test_numbers_without_a_finite_square_reject_the_scene_and_not_the_task(
    tmp_path: Path, capsys: Any, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = Folder(tmp_path)
    for name in ("good", "spoilt", "fine"):
        folder.add(name, reflectance().astype(np.float64))
    spoil(tmp_path / "spoilt.tif")
    config = folder.write()
    assert checked(capsys, config)["spoilt"][1][0].startswith(reason)
    rejected, results = preprocessed(config, tmp_path / "run")
    assert rejected == {"spoilt": reason}
    assert results["scenes"]["accepted"] == 2


def test_a_scale_of_zero_is_told(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    folder.add("none", scale=0.0)
    told = checked(capsys, folder.write())
    assert (told["none"][0], told["none"][1][0].split(":")[0]) == ("warn", "odd_scale")


def test_a_library_that_fails_in_an_unforeseen_way_rejects_one_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtshpc.geo import labels

    folder = Folder(tmp_path)
    folder.add("good")
    for number in range(4):
        folder.add(f"odd{number}")
    whole = labels.LabelReader.read
    raised = iter([ValueError("v"), TypeError("t"), MemoryError(), ZeroDivisionError("z")])

    def read(self: Any) -> Any:
        if "odd" in self._scene.id:
            raise next(raised)
        return whole(self)

    monkeypatch.setattr(labels.LabelReader, "read", read)
    rejected, results = preprocessed(folder.write(), tmp_path / "run")
    assert rejected == dict.fromkeys(("odd0", "odd1", "odd2", "odd3"), "unreadable")
    assert results["scenes"]["accepted"] == 1


def test_a_label_file_without_geometry_is_unreadable(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    folder.labels = "{kind: vector}"
    (tmp_path / "table.geojson").write_text('{"type": "Topology"}')
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    folder.add("one", label="t.csv")
    folder.add("two", label="table.geojson")
    told = checked(capsys, folder.write())
    assert [reasons[0].split(":")[0] for _, reasons in told.values()] == ["label_unreadable"] * 2
    assert "no geometry" in told["one"][1][0]


AUXILIARY = "rgb: {{bands: ['1', '2', '3']}}, dem: {{bands: ['1'], file: '{{scene}}_dem.tif', required: {}}}"


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("whole_bytes", [0, 1 << 28])
def test_an_auxiliary_that_shows_none_of_the_ground_is_missing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, required: bool, whole_bytes: int
) -> None:
    from rtshpc.geo import scene

    whole = scene.open_scene
    monkeypatch.setattr("rtshpc.data.cut.open_scene", lambda *given: whole(*given, whole_bytes=whole_bytes))
    folder = Folder(tmp_path, AUXILIARY.format(str(required).lower()))
    height = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) + 1
    for name, values, shift in (
        ("good", height, 0.5),
        ("void", height * 0 - 9999, 0),
        ("elsewhere", height, 40_000),
        ("half", height, 32),
    ):
        with rasterio.open(folder.add(name)) as file:
            place = file.transform @ Affine.translation(shift, 0)
        write_tif(tmp_path / f"{name}_dem.tif", values, transform=place, nodata=-9999)
    config = folder.write()
    told = checked(capsys, config)
    rejected, results = preprocessed(config, tmp_path / "run")
    assert rejected == (dict.fromkeys(("elsewhere", "void"), "missing_modality") if required else {})
    for name in ("void", "elsewhere"):
        assert told[name][0] == ("reject" if required else "warn")
        assert told[name][1][0].startswith("missing_modality")
    assert told["half"][0] == "warn" and told["half"][1][0].startswith("sparse_modality")
    assert not any("modality" in reason for reason in told["good"][1])
    assert results["scenes"]["accepted"] == (2 if required else 4)


def test_an_index_row_without_an_image_or_a_name_rejects_that_row_alone(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    folder.add("good")
    folder.add("fine")
    folder.rows += ["nameless,,x_mask.tif,s", ",good.tif,good_mask.tif,s", ",,,", "", f"long,{'x' * 300}.tif,,s"]
    config = folder.write()
    told = checked(capsys, config)
    rejected, results = preprocessed(config, tmp_path / "run")
    assert len(rejected) == 3 and set(rejected.values()) == {"missing_file"}
    assert sorted(verdict for verdict, _ in told.values()) == ["accept", "accept", "reject", "reject", "reject"]
    assert results["scenes"]["accepted"] == 2
