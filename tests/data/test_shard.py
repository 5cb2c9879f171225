from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader

from rtshpc.core.config import AugmentConfig, DataConfig
from rtshpc.core.errors import DataError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import file_sha256
from rtshpc.core.scenes import list_scenes
from rtshpc.data import shard
from rtshpc.data.normalise import statistics_of
from rtshpc.data.reader import ShardDataset, ShardFile, enlarged, read_index, verify_shards
from rtshpc.data.sample import IGNORE_ID, boxes_of, collate
from rtshpc.data.shard import IDS, MOST_IN_A_BYTE, VALID, Chip, Layout, ShardWriter, ids_of

Made = tuple[DataConfig, RunPaths, dict[str, Any]]


def write(path: Path, count: int = 5, compression: Any = "none", seed: int = 0) -> list[dict[str, Any]]:
    """A shard of random chips of four types; gives what went in."""
    random = np.random.default_rng(seed)
    kinds = {"a": (3, "u1"), "b": (1, "<i2"), "c": (2, "<f4"), "d": (1, "<f8")}
    rows: list[dict[str, Any]] = []
    writer: ShardWriter | None = None
    for number in range(count):
        pixels = {name: (random.random((c, 21, 21)) * 200).astype(kind) for name, (c, kind) in kinds.items()}
        valid = {name: random.random((21, 21)) > 0.3 for name in kinds}
        ids = random.integers(0, 3, (21, 21)).astype(np.uint16)
        ids[0] = IGNORE_ID
        writer = writer or ShardWriter(path, Layout.of(pixels), compression)
        chip = Chip(f"chip-{number}-é", f"scene{number}", "site", (0.1 + number, 1e-9, -0.3, 0.0, -0.1, 7e6 / 3), "WKT")
        scaling = dict.fromkeys(kinds, (0.0001, 0.5))
        stats = {name: statistics_of(pixels[name], valid[name]) for name in kinds}
        assert writer.append(chip, pixels, valid, ids, [0, number], scaling, stats) == number
        rows.append({"chip": chip, "pixels": pixels, "valid": valid, "ids": ids, "classes": [0, number]})
    assert writer is not None and len(writer.close()) == 64
    return rows


@pytest.fixture(params=[0, shard.APART_BYTES], ids=["apart", "joined"])
def as_written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written part by part, as large ones are, or as one piece."""
    monkeypatch.setattr(shard, "APART_BYTES", request.param)


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("compression", ["none", "gzip", "lz4"])
def test_every_type_survives_the_round_trip_exactly(tmp_path: Path, compression: str) -> None:
    rows = write(tmp_path / "s.h5", compression=compression)
    file = ShardFile(tmp_path / "s.h5")
    for number, row in enumerate(rows):
        raw = np.zeros(file.dtype.itemsize, dtype=np.uint8)
        file.read_into(number, memoryview(raw))
        file.check(number, raw)
        record = raw.view(file.dtype)[0]
        for name, pixels in row["pixels"].items():
            assert record[name].dtype == pixels.dtype and np.array_equal(record[name], pixels)
            assert np.array_equal(
                np.unpackbits(record[name + VALID], axis=-1, count=21).astype(bool), row["valid"][name]
            )
        assert record[IDS].dtype == np.uint8
        assert np.array_equal(ids_of(record), row["ids"]) and list(file.classes(number)) == row["classes"]
    file.close()


def test_a_scene_of_many_instances_gets_ids_of_two_bytes(tmp_path: Path) -> None:
    pixels = {"a": np.ones((1, 32, 32), np.uint8)}
    valid = {"a": np.ones((32, 32), bool)}
    ids = np.minimum(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32), 400)
    ids[0, 0] = IGNORE_ID
    stats = {"a": statistics_of(pixels["a"], valid["a"])}
    chip = Chip("c", "s", "site", (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), "WKT")
    facts = (chip, pixels, valid, ids, [0] * 400, {"a": (1.0, 0.0)}, stats)
    narrow, wide = Layout.of(pixels, MOST_IN_A_BYTE), Layout.of(pixels, MOST_IN_A_BYTE + 1)
    assert wide.holds(narrow) and not narrow.holds(wide)
    assert not wide.holds(Layout.of({"b": pixels["a"]}))
    with ShardWriter(tmp_path / "narrow.h5", narrow) as writer, pytest.raises(ValueError, match="400 instances"):
        writer.append(*facts)
    with ShardWriter(tmp_path / "wide.h5", wide) as writer:
        writer.append(*facts)
        writer.close()
    file = ShardFile(tmp_path / "wide.h5")
    raw = np.zeros(file.dtype.itemsize, dtype=np.uint8)
    file.read_into(0, memoryview(raw))
    assert np.array_equal(ids_of(raw.view(file.dtype)[0]), ids)


def test_plain_h5py_reads_a_shard_by_names(tmp_path: Path) -> None:
    rows = write(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert file["chips"].chunks == (1,) and len(file["chips"]) == 5
        assert np.array_equal(file["chips"][3]["c"], rows[3]["pixels"]["c"])
        assert file["id"][2].decode() == "chip-2-é" and tuple(file["transform"][4]) == rows[4]["chip"].transform
        assert np.array_equal(
            file["statistics/b"][1], statistics_of(rows[1]["pixels"]["b"], rows[1]["valid"]["b"]).to_array()
        )


def test_the_same_chips_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", 300)
    write(tmp_path / "b.h5", 300)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_record_that_is_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "APART_BYTES", 0)
    write(tmp_path / "a.h5")
    at_once = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, offset: at_once(handle, content[:1000], offset))
    write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_an_error_or_a_discard_leaves_nothing_behind(tmp_path: Path) -> None:
    layout = Layout(16, (("a", 1, "|u1"),))
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "a.h5", layout):
        raise RuntimeError("stop")
    ShardWriter(tmp_path / "b.h5", layout).discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_written")
def test_an_array_of_another_shape_is_refused(tmp_path: Path) -> None:
    pixels, valid = {"a": np.ones((2, 16, 16), np.uint8)}, {"a": np.ones((16, 16), bool)}
    stats = {"a": statistics_of(pixels["a"], valid["a"])}
    chip = Chip("c", "s", "site", (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), "WKT")
    with ShardWriter(tmp_path / "a.h5", Layout(16, (("a", 1, "|u1"),))) as writer:
        with pytest.raises(ValueError, match="shape"):
            writer.append(chip, pixels, valid, np.zeros((16, 16), np.uint16), [], {"a": (1.0, 0.0)}, stats)
        writer.discard()


@pytest.mark.usefixtures("as_written")
def test_truncated_chips_are_gone_and_their_rows_are_used_again(tmp_path: Path) -> None:
    rows = write(tmp_path / "whole.h5", 4)
    with ShardWriter(tmp_path / "cut.h5", Layout.of(rows[0]["pixels"])) as writer:
        for number in (0, 3, 2):
            row = rows[number]
            stats = {name: statistics_of(row["pixels"][name], row["valid"][name]) for name in row["pixels"]}
            scaling = dict.fromkeys(row["pixels"], (1.0, 0.0))
            if number == 2:
                writer.truncate(1)
            writer.append(row["chip"], row["pixels"], row["valid"], row["ids"], row["classes"], scaling, stats)
        writer.close()
    file = ShardFile(tmp_path / "cut.h5")
    assert len(file) == 2
    raw = np.zeros(file.dtype.itemsize, dtype=np.uint8)
    file.read_into(1, memoryview(raw))
    assert np.array_equal(raw.view(file.dtype)[0]["c"], rows[2]["pixels"]["c"])
    file.check(1, raw)


def test_a_flipped_bit_is_found_by_crc_and_by_sha(small_run: Made, tmp_path: Path) -> None:
    data, paths, _ = small_run
    for file in paths.shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert verify_shards(tmp_path / "index.json") == []
    dataset = ShardDataset(tmp_path / "index.json", data, "", ["rgb"], verify=True)
    first = dataset.chips[0]
    path = tmp_path / first["shard"]
    shard = ShardFile(path)
    assert shard._offsets is not None
    offset = int(shard._offsets[first["row"]]) + 1000
    shard.close()
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)
    with pytest.raises(DataError, match="does not match its CRC-32"):
        dataset[0]
    assert dataset[1].id and verify_shards(tmp_path / "index.json") == [first["shard"]]


def test_a_torn_or_missing_shard_is_one_line_for_the_user(tmp_path: Path) -> None:
    write(tmp_path / "s.h5")
    whole = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "s.h5").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path / "s.h5", tmp_path / "none.h5"):
        with pytest.raises(DataError, match="no readable shard") as caught:
            ShardFile(path)
        assert "\n" not in str(caught.value)


def test_pixels_masks_and_places_survive_from_geotiff_to_shard(small_run: Made) -> None:
    data, paths, _ = small_run
    scenes = {scene.id: scene for scene in list_scenes(data, paths.scenes)}
    dataset = ShardDataset(paths.index, data, "", list(data.modalities))
    assert len(dataset) == len(read_index(paths.index)["chips"]) > 0
    for number, chip in enumerate(dataset.chips):
        record = dataset.read([number]).records()[0]
        scene = scenes[chip["scene"]]
        with rasterio.open(scene.image) as image, rasterio.open(scene.label) as label:
            col, row = (round(v) for v in ~image.transform @ (chip["transform"][2], chip["transform"][5]))
            window = rasterio.windows.Window(col, row, 64, 64)
            pixels, ids = image.read(window=window), label.read(1, window=window)
            assert tuple(image.window_transform(window))[:6] == tuple(chip["transform"])
            assert rasterio.crs.CRS.from_wkt(chip["crs_wkt"]) == image.crs
            valid = image.read_masks(1, window=window) > 0
        assert np.array_equal(record["rgb"], pixels[:3]) and np.array_equal(record["ndvi"][0], pixels[3])
        assert np.array_equal(np.unpackbits(record["rgb" + VALID], axis=-1).astype(bool), valid)
        present = np.unique(ids[ids > 0])
        assert chip["instances"] == len(present) == int(ids_of(record).max())
        for new, old in enumerate(present, 1):
            assert np.array_equal(ids_of(record) == new, ids == old)
        assert chip["valid_fraction"] == valid.mean()


def test_samples_are_normalised_and_carry_their_target(small_run: Made) -> None:
    data, paths, _ = small_run
    dataset = ShardDataset(paths.index, data, "train", ["rgb", "ndvi"])
    assert dataset.channels == {"rgb": 3, "ndvi": 1} and dataset.classes == ("rts",)
    samples = [dataset[number] for number in range(len(dataset))]
    for name in dataset.channels:
        values = torch.cat([s.images[name][:, s.modality_valid[name]] for s in samples], dim=1).double()
        assert torch.allclose(values.mean(dim=1), torch.zeros(len(values)).double(), atol=1e-5)
        assert torch.allclose(values.std(dim=1, unbiased=False), torch.ones(len(values)).double(), atol=1e-5)
        assert all((s.images[name][:, ~s.modality_valid[name]] == 0).all() for s in samples)
    for sample, chip in zip(samples, dataset.chips, strict=True):
        assert len(sample.target) == chip["instances"] and sample.id == chip["id"]
        assert torch.equal(sample.target.boxes, boxes_of(sample.target.masks)) and sample.native_size == (64, 64)


def test_a_batch_is_its_samples_in_any_order(small_run: Made) -> None:
    data, paths, _ = small_run
    dataset = ShardDataset(paths.index, data, "", ["ndvi", "rgb"], augment=AugmentConfig(noise=0.1), seed=5)
    dataset.set_epoch(3)
    rows = [4, 0, 7, 2]
    for sample, row in zip(dataset.__getitems__(rows), rows, strict=True):
        alone = dataset[row]
        assert sample.id == alone.id and torch.equal(sample.images["rgb"], alone.images["rgb"])
        assert list(sample.images) == ["ndvi", "rgb"]


def test_enlarging_repeats_masks_and_keeps_nodata(small_run: Made) -> None:
    data, paths, _ = small_run
    big = data.model_copy(update={"chip": data.chip.model_copy(update={"enlarge": 3})})
    dataset, small = ShardDataset(paths.index, big, "", ["rgb"]), ShardDataset(paths.index, data, "", ["rgb"])
    assert dataset.size_px == 192
    for number in range(4):
        one, three = small[number], dataset[number]
        assert three.size == (192, 192) and three.native_size == (64, 64)
        assert torch.equal(three.target.masks[:, 1::3, 1::3], one.target.masks)
        assert torch.equal(three.target.boxes, boxes_of(three.target.masks))
        assert (three.images["rgb"][:, ~three.valid] == 0).all()
        assert torch.equal(enlarged(one, 3).images["rgb"], three.images["rgb"])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_the_process_itself_gives(small_run: Made, start: str) -> None:
    data, paths, _ = small_run
    dataset = ShardDataset(paths.index, data, "", ["rgb"], augment=AugmentConfig(brightness=0.1))
    own = collate([dataset[number] for number in range(4)])  # handles are open before the fork
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    batch = next(iter(loader))
    assert torch.equal(batch.images["rgb"], own.images["rgb"])
    assert torch.equal(batch.targets[2].masks, own.targets[2].masks)


def test_a_raw_batch_in_shared_memory_holds_the_same_records(small_run: Made) -> None:
    data, paths, _ = small_run
    dataset = ShardDataset(paths.index, data, "", ["rgb"])
    shared = dataset.read([3, 1], shared=True)
    assert shared.data.is_shared()
    assert np.array_equal(shared.records()[1]["rgb"], dataset.read([1]).records()[0]["rgb"])


def test_unknown_names_are_guessed(small_run: Made) -> None:
    data, paths, _ = small_run
    with pytest.raises(DataError, match='Did you mean "ndvi"'):
        ShardDataset(paths.index, data, "train", ["ndvy"])
    with pytest.raises(DataError, match='Did you mean "train"'):
        ShardDataset(paths.index, data, "trian", ["rgb"])
    with pytest.raises(DataError, match="no index of shards"):
        ShardDataset(paths.root / "elsewhere.json", data, "train", ["rgb"])


@pytest.mark.parametrize("compression", ["gzip", "lz4"])
def test_compression_changes_no_sample(
    small_run: Made, small_data: Any, make_shards: Callable[..., Any], tmp_path: Path, compression: str
) -> None:
    data, paths, _ = small_run
    other = small_data(shard={"tasks": 1, "target_mib": 1, "compression": compression})
    packed, results = make_shards(other, tmp_path)
    assert len(list(packed.shards.glob("*.h5"))) >= 1 and results["bytes"] < read_bytes(paths)
    one, two = (ShardDataset(p.index, data, "", list(data.modalities), verify=True) for p in (paths, packed))
    assert one.ids == two.ids
    for number in range(0, len(one), 3):
        for name in data.modalities:
            assert torch.equal(one[number].images[name], two[number].images[name])


def read_bytes(paths: RunPaths) -> int:
    return sum(path.stat().st_size for path in paths.shards.glob("*.h5"))


def test_index_names_every_shard_with_its_hash(small_run: Made) -> None:
    _, paths, _ = small_run
    index = read_index(paths.index)
    assert index["shards"] == {path.name: file_sha256(path) for path in sorted(paths.shards.glob("*.h5"))}
