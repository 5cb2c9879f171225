from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from rtshpc.core.config import DataConfig
from rtshpc.core.errors import DataError, RunError
from rtshpc.core.load import read_cell, write_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, read_json, read_lines
from rtshpc.core.scenes import list_scenes
from rtshpc.data import shard
from rtshpc.data.reader import ShardDataset, read_index
from rtshpc.stages import gather, preprocess

Make = Callable[[DataConfig, Path], tuple[RunPaths, dict[str, Any]]]
Cells = Callable[[DataConfig], Any]


def contents(paths: RunPaths) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(paths.shards.glob("*.h5"))}


def test_accepted_and_rejected_scenes_are_the_input(small_run: Any) -> None:
    data, paths, results = small_run
    scenes = list_scenes(data, paths.scenes)
    assert results["scenes"] == {"total": len(scenes), "accepted": len(scenes), "rejected": 0, "warned": 0}
    assert read_json(paths.rejected) == []
    assert sum(part["chips"] for part in results["splits"].values()) == results["chips"]
    assert {site: row["scenes"] for site, row in results["sites"].items()} == {"banks": 3, "peel": 3}


def test_index_statistics_are_those_of_the_train_split(small_run: Any) -> None:
    data, paths, _ = small_run
    dataset = ShardDataset(paths.index, data, "train", list(data.modalities))
    index = read_index(paths.index)
    for name in data.modalities:
        facts = index["modalities"][name]
        values = []
        for number in range(len(dataset)):
            record = dataset.read([number]).records()[0]
            valid = np.unpackbits(record[name + ":valid"], axis=-1).astype(bool)
            values.append(record[name][:, valid].astype(np.float64) * facts["scale"] + facts["offset"])
        joined = np.concatenate(values, axis=1)
        assert facts["pixels"] == joined.shape[1]
        assert np.allclose(facts["mean"], joined.mean(axis=1), rtol=1e-11)
        assert np.allclose(facts["std"], joined.std(axis=1), rtol=1e-9)
        assert np.allclose(facts["min"], joined.min(axis=1)) and np.allclose(facts["max"], joined.max(axis=1))


def test_the_number_of_tasks_changes_no_chip(
    small_run: Any, small_data: Any, make_shards: Make, tmp_path: Path
) -> None:
    data, paths, _ = small_run
    other, _ = make_shards(small_data(shard={"tasks": 3}), tmp_path)
    one, two = read_index(paths.index), read_index(other.index)
    leave = {"shard", "row"}
    strip = [[{k: v for k, v in chip.items() if k not in leave} for chip in index["chips"]] for index in (one, two)]
    assert strip[0] == strip[1]
    for name in data.modalities:
        assert np.allclose(one["modalities"][name]["mean"], two["modalities"][name]["mean"], rtol=1e-14)


def test_bad_scenes_are_quarantined_by_name_and_the_others_go_on(
    small_run: Any, small_data: Any, make_shards: Make, tmp_path: Path
) -> None:
    _, source, _ = small_run
    folder = tmp_path / "in"
    folder.mkdir()
    for path in source.scenes.glob("*.tif"):
        (folder / path.name).write_bytes(path.read_bytes())
    names = sorted(path.stem for path in folder.glob("*_0??.tif"))
    whole = (folder / f"{names[0]}.tif").read_bytes()
    (folder / f"{names[0]}.tif").write_bytes(whole[: len(whole) // 2])
    (folder / f"{names[1]}.tif").write_bytes(b"")
    with rasterio.open(folder / f"{names[2]}.tif") as old:
        profile, pixels = old.profile, old.read()
        descriptions = old.descriptions
    with rasterio.open(folder / f"{names[2]}.tif", "w", **{**profile, "crs": None}) as new:
        new.write(pixels)
        new.descriptions = descriptions
    (folder / f"{names[3]}_instances.tif").unlink()
    labels = {"kind": "instances", "file": "{stem}_instances.tif"}
    data = small_data(
        root=str(folder), scenes={"glob": "*_0[0-9][0-9].tif", "site_pattern": "([a-z]+)_"}, labels=labels
    )
    paths, results = make_shards(data, tmp_path / "run")
    rejected = read_json(paths.rejected)
    assert [row["scene"] for row in rejected] == names[:4] and all(row["reason"] and row["detail"] for row in rejected)
    assert results["scenes"]["accepted"] + results["scenes"]["rejected"] == results["scenes"]["total"] == 6
    assert {chip["scene"] for chip in read_index(paths.index)["chips"]} == set(names[4:])


def test_a_scene_that_fails_half_way_leaves_no_chip(
    small_run: Any, small_data: Any, make_cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block deep in a large scene is broken: chips before it are in the shard already."""
    _, source, _ = small_run
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("banks_000", "banks_001"):
        with rasterio.open(source.scenes / f"{name}.tif") as old:
            profile, pixels, descriptions = (
                {**old.profile, "tiled": True, "blockxsize": 16, "blockysize": 16},
                old.read(),
                old.descriptions,
            )
        with rasterio.open(folder / f"{name}.tif", "w", **profile) as new:
            new.write(pixels)
            new.descriptions = descriptions
        (folder / f"{name}_instances.tif").write_bytes((source.scenes / f"{name}_instances.tif").read_bytes())
    raw = bytearray((folder / "banks_000.tif").read_bytes())
    with rasterio.open(folder / "banks_000.tif") as file:
        # The last block of the file lies under the last chip alone.
        offset = int(file.get_tag_item("BLOCK_OFFSET_5_5", "TIFF", bidx=5))
    raw[offset : offset + 12] = b"\xff" * 12
    (folder / "banks_000.tif").write_bytes(raw)
    monkeypatch.setattr("rtshpc.data.cut.open_scene", chip_by_chip)
    labels = {"kind": "instances", "file": "{stem}_instances.tif"}
    scenes = {"glob": "*_0[0-9][0-9].tif", "site_pattern": "([a-z]+)_"}
    data = small_data(
        root=str(folder), scenes=scenes, labels=labels, chip={"size_px": 32, "overlap_px": 0}, shard={"tasks": 1}
    )
    paths = RunPaths(tmp_path / "run")
    paths.create()
    (cell,), _ = make_cells(data)
    results = preprocess.run(cell, paths, SILENT)
    assert [row["scene"] for row in results["rejected"]] == ["banks_000"]
    assert {chip["scene"] for chip in results["chips"]} == {"banks_001"}
    assert [chip["row"] for chip in results["chips"]] == list(range(results["shards"][0]["chips"]))


def chip_by_chip(*args: Any) -> Any:
    """`open_scene` as it is for scenes too large to hold."""
    from rtshpc.geo.scene import open_scene

    return open_scene(*args, whole_bytes=0)


def test_no_usable_scene_is_one_line_with_reasons(small_data: Any, make_shards: Make, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(b"II*\0")
    data = small_data(root=str(tmp_path / "in"), scenes={"glob": "*.tif"}, labels={"kind": "none"})
    with pytest.raises(DataError, match=r"no chip is left of 1 scenes \(\w+: 1\)"):
        make_shards(data, tmp_path / "run")


def test_gather_names_what_is_missing(small_run: Any, make_cells: Cells, tmp_path: Path) -> None:
    data, _, _ = small_run
    cells, last = make_cells(data)
    paths = RunPaths(tmp_path)
    paths.create()
    with pytest.raises(RunError, match="gather needs the preprocess cell pre0"):
        gather.run(last, paths, SILENT)
    from rtshpc.core.records import Record, write_record

    for cell in cells:
        results = preprocess.run(cell, paths, SILENT)
        record = Record(
            cell=cell.id, stage="preprocess", label="", result_version=1, started="", seconds=0, results=results
        )
        write_record(paths.cell(cell.id).record, record)
    victim = next(paths.shards.glob("*.h5"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(RunError, match=victim.name):
        gather.run(last, paths, SILENT)


def test_empty_chips_are_thinned_by_name(small_data: Any, make_shards: Make, small_run: Any, tmp_path: Path) -> None:
    _, full, _ = small_run
    generated = small_data().scenes.generated
    assert generated is not None
    chip = {"size_px": 32, "overlap_px": 0}
    all_paths, every = make_shards(small_data(chip=chip), tmp_path / "all")
    half_paths, half = make_shards(small_data(chip={**chip, "keep_empty": 0.5}), tmp_path / "half")
    none_paths, none = make_shards(small_data(chip={**chip, "keep_empty": 0.0}), tmp_path / "none")
    assert (
        none["chips"] < half["chips"] < every["chips"] and none["instances"] == half["instances"] == every["instances"]
    )
    kept = [{row["id"] for row in read_index(p.index)["chips"]} for p in (none_paths, half_paths, all_paths)]
    assert kept[0] <= kept[1] <= kept[2] and full


def test_a_full_disk_blames_no_scene(
    small_data: Any, make_cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell, _), _ = make_cells(small_data())
    paths = RunPaths(tmp_path)
    paths.create()

    def full(self: Any, *args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard.ShardWriter, "append", full)
    with pytest.raises(OSError, match="No space left"):
        preprocess.run(cell, paths, SILENT)
    assert list(paths.shards.iterdir()) == [], "the shard it could not write is removed"


def many_shards(small_data: Any) -> DataConfig:
    """So that the 1 MiB target closes a shard after every few scenes."""
    generated = {
        "sites": ["banks", "yamal"],
        "scenes_per_site": 5,
        "size_px": 256,
        "slumps_per_scene": [2, 4],
        "nodata_fraction": 0.3,
    }
    return small_data(
        scenes={"generated": generated}, chip={"size_px": 128, "overlap_px": 0}, shard={"tasks": 1, "target_mib": 1}
    )


def test_a_task_started_again_goes_on_behind_its_last_whole_shard(
    small_data: Any, make_cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,), _ = make_cells(many_shards(small_data))
    whole, again = RunPaths(tmp_path / "whole"), RunPaths(tmp_path / "again")
    wanted = preprocess.run(cell, whole, SILENT)
    assert len(wanted["shards"]) >= 3
    taken: list[str] = []
    take = preprocess._Task.take

    def stop_at_seventh(self: Any, scene: Any) -> None:
        taken.append(scene.id)
        if len(taken) == 7:
            raise KeyboardInterrupt
        take(self, scene)

    monkeypatch.setattr(preprocess._Task, "take", stop_at_seventh)
    with pytest.raises(KeyboardInterrupt):
        preprocess.run(cell, again, SILENT)
    done = len(read_lines(again.cell(cell.id).journal))
    got = preprocess.run(cell, again, SILENT)
    assert 0 < done < len(wanted["shards"]) and len(taken) - 7 < 10, "whole shards are not written again"
    assert contents(again) == contents(whole) and got == wanted
    # A shard that rotted or went missing is made again, and all behind it.
    sorted(again.shards.glob("*.h5"))[1].write_bytes(b"rot")
    assert preprocess.run(cell, again, SILENT) == wanted and contents(again) == contents(whole)


def start_task(cell: Any, paths: RunPaths) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, without the runner."""
    write_cell(paths.cell(cell.id).config, cell)
    code = (
        "import sys; from pathlib import Path\n"
        "from rtshpc.core.load import read_cell; from rtshpc.core.paths import RunPaths\n"
        "from rtshpc.core.records import SILENT; from rtshpc.core.records import write_json\n"
        "from rtshpc.stages import preprocess\n"
        "paths = RunPaths(Path(sys.argv[1])); cell = read_cell(paths.cell(sys.argv[2]).config)\n"
        "print('ready', flush=True)\n"
        "write_json(paths.root / 'results.json', preprocess.run(cell, paths, SILENT))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(paths.root), cell.id], stdout=subprocess.PIPE)


def kill_storm(cell: Any, root: Path, kills: int, seed: int) -> None:
    whole, torn = RunPaths(root / "whole"), RunPaths(root / "torn")
    whole.create()
    started = time.monotonic()
    wanted = preprocess.run(cell, whole, SILENT)
    seconds = time.monotonic() - started
    draw = random.Random(seed)
    for _ in range(kills):
        torn.create()
        process = start_task(cell, torn)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    last = start_task(cell, torn)
    last.communicate()
    assert last.returncode == 0
    assert contents(torn) == contents(whole)
    assert read_json(torn.root / "results.json") == json.loads(json.dumps(wanted))
    assert not [path for path in torn.shards.iterdir() if path.name.startswith(".")]
    images = {path.name: path.read_bytes() for path in whole.scenes.glob("[a-z]*.tif")}
    assert {path.name: path.read_bytes() for path in torn.scenes.glob("[a-z]*.tif")} == images
    assert read_cell(torn.cell(cell.id).config) == cell


@pytest.mark.slow
def test_a_preprocess_killed_at_any_instant_ends_with_the_same_bytes(
    small_data: Any, make_cells: Cells, tmp_path: Path
) -> None:
    (cell,), _ = make_cells(many_shards(small_data))
    kill_storm(cell, tmp_path, kills=2, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_storm_of_kills_ends_with_the_same_bytes(
    small_data: Any, make_cells: Cells, tmp_path: Path, seed: int
) -> None:
    (cell,), _ = make_cells(many_shards(small_data))
    kill_storm(cell, tmp_path, kills=5, seed=seed)
