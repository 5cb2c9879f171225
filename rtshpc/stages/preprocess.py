"""Scenes -> chips -> shards: one task of an array takes every n-th scene and writes shards of its own."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rtshpc.core.cell import Cell, digest
from rtshpc.core.config import DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, append_line, file_sha256, read_lines, sync_folder, write_text
from rtshpc.core.scenes import Scene, list_scenes
from rtshpc.data.cut import CutChip, SceneFacts, cut_scene
from rtshpc.data.normalise import Statistics, merge
from rtshpc.data.shard import Layout, ShardWriter, statistics_in
from rtshpc.data.synthetic import draw_scene
from rtshpc.geo.scene import reading_scenes

Entry = dict[str, Any]


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write this task's shards.

    Killed at any instant and started again, it goes on behind the last whole shard and ends with the same
    bytes: a shard gets its name when it is whole, and the journal names it after that.

    Returns:
        `shards`, `chips`, `accepted`, `rejected`, `warned`, `statistics`, `modalities`, `scenes`; accepted and
        rejected scenes together are this task's scenes.
    """
    data = cell.config.data
    scenes = list_scenes(data, paths.scenes)[cell.task :: cell.tasks]
    task = _Task(cell, paths, scenes)
    task.resume()
    try:
        with reading_scenes(data):
            while task.next < len(scenes):
                progress("scenes", task.next, len(scenes), scenes[task.next].id)
                task.take(scenes[task.next])
        task.close_shard()
    finally:
        task.abandon()
    progress("scenes", len(scenes), len(scenes), f"{len(task.total['chips'])} chips")
    return task.results()


class _Task:
    """The state of one preprocess task: what is in the journal, and the shard being written."""

    def __init__(self, cell: Cell, paths: RunPaths, scenes: list[Scene]) -> None:
        self._data: DataConfig = cell.config.data
        self._paths = paths
        self._number = cell.task
        self._journal: Path = paths.cell(cell.id).journal
        self._scenes = scenes
        self._key = digest([scene.model_dump(mode="json") for scene in scenes])
        self._writer: ShardWriter | None = None
        self._parts = 0
        self._fresh = _empty()
        self._seen: dict[str, Any] = {}
        self.total = _empty()
        self.next = 0

    def resume(self) -> None:
        """Take over the shards that an earlier attempt finished; remove what it left half-written."""
        self._paths.shards.mkdir(parents=True, exist_ok=True)
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self._paths.shards.glob(f".{self._number:04d}-*.h5.*.tmp"):
            leftover.unlink()
        good: list[Entry] = []
        for entry in read_lines(self._journal):
            if entry.get("key") != self._key or not _is_whole(self._paths.shards, entry["shards"][0]):
                break
            good.append(entry)
        lines = "".join(_line(entry) for entry in good)
        if not self._journal.exists() or self._journal.read_text(encoding="utf-8") != lines:
            write_text(self._journal, lines)
        for entry in good:
            self._add(entry)
            self.next = entry["next"]
        self._parts = len(good)
        for stale in self._paths.shards.glob(f"{self._number:04d}-*.h5"):
            if stale.name not in {shard["file"] for shard in self.total["shards"]}:
                stale.unlink()

    def take(self, scene: Scene) -> None:
        """Cut one scene into the open shard, or quarantine it; then close the shard if it is large enough."""
        generated = self._data.scenes.generated
        if scene.generated is not None and generated is not None and not Path(scene.image).exists():
            draw_scene(generated, scene.site, scene.generated, Path(scene.image).parent)
        facts, rows, start = SceneFacts(), 0, 0
        self._seen = {}
        try:
            with closing(cut_scene(scene, self._data, facts)) as cuts:
                for cut in cuts:
                    if rows == 0:
                        cut, start = self._open_shard(cut, facts)
                    else:
                        cut = self._adapted(cut, facts)
                    self._append(scene, cut)
                    rows += 1
        except SceneRejected as error:
            # Chips of a large scene may be in the shard already: take them out again.
            if self._writer is not None and rows:
                del self._fresh["chips"][-rows:]
                self._writer.truncate(start)
            self._fresh["rejected"].append({"scene": scene.id, "reason": error.reason, "detail": error.detail})
        else:
            self._accept(scene, facts, rows)
        self.next += 1
        if self._writer is not None and self._writer.size_bytes >= self._data.shard.target_mib << 20:
            self.close_shard()

    def _open_shard(self, cut: CutChip, facts: SceneFacts) -> tuple[CutChip, int]:
        """Make sure that a shard of the chip's layout is open; gives the chip in that layout and the first row."""
        cut = self._adapted(cut, facts)
        layout = Layout.of(cut.pixels, facts.instances)
        if self._writer is not None and not self._writer.layout.holds(layout):
            self.close_shard()
        if self._writer is None:
            path = self._paths.shard(self._number, self._parts)
            self._writer = ShardWriter(path, layout, self._data.shard.compression)
        return cut, len(self._writer)

    def _adapted(self, cut: CutChip, facts: SceneFacts) -> CutChip:
        """Give modalities that the scene lacks (all 0 and invalid) the type they have in the open shard."""
        if not facts.missing or self._writer is None:
            return cut
        types = {name: kind for name, _, kind in self._writer.layout.modalities}
        pixels = {
            name: np.zeros(layers.shape, types[name]) if name in facts.missing else layers
            for name, layers in cut.pixels.items()
        }
        return replace(cut, pixels=pixels)

    def _append(self, scene: Scene, cut: CutChip) -> None:
        assert self._writer is not None
        row = self._writer.append(cut.chip, cut.pixels, cut.valid, cut.ids, cut.classes, cut.scaling, cut.statistics)
        self._fresh["chips"].append(
            {
                "id": cut.chip.id,
                "scene": scene.id,
                "site": scene.site,
                "shard": self._writer.path.name,
                "row": row,
                "instances": len(cut.classes),
                "valid_fraction": cut.valid_fraction,
                "transform": list(cut.chip.transform),
                "crs_wkt": cut.chip.crs_wkt,
                "date": scene.date,
                "group": scene.group,
            }
        )
        for name, _, kind in self._writer.layout.modalities:
            if cut.statistics[name].count.any() and name not in self._seen:
                scale, offset = cut.scaling[name]
                self._seen[name] = {"channels": len(cut.pixels[name]), "dtype": kind, "scale": scale, "offset": offset}

    def _accept(self, scene: Scene, facts: SceneFacts, chips: int) -> None:
        self._fresh["accepted"].append(
            {
                "scene": scene.id,
                "site": scene.site,
                "split": scene.split,
                "group": scene.group,
                "crs_wkt": facts.crs_wkt,
                "corners": [list(corner) for corner in facts.corners],
                "chips": chips,
            }
        )
        self._fresh["modalities"] = {**self._seen, **self._fresh["modalities"]}
        if facts.warnings:
            self._fresh["warned"].append({"scene": scene.id, "warnings": facts.warnings})

    def close_shard(self) -> None:
        """Sync and rename the open shard, then name it in the journal."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        chips = len(writer)
        if chips == 0:
            writer.discard()
            return
        sha256 = writer.close()
        self._parts += 1
        shard = {"file": writer.path.name, "sha256": sha256, "bytes": writer.path.stat().st_size, "chips": chips}
        entry = {**self._fresh, "shards": [shard], "key": self._key, "next": self._next_after_shard()}
        append_line(self._journal, entry)
        sync_folder(self._journal.parent)
        self._add(entry)
        self._fresh = _empty()

    def abandon(self) -> None:
        """Remove the shard that an error left open, if any."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _next_after_shard(self) -> int:
        """Scenes that this shard and those before it settle: accepted or rejected ones, none in progress."""
        done = (self.total, self._fresh)
        return sum(len(part["accepted"]) + len(part["rejected"]) for part in done)

    def _add(self, entry: Entry) -> None:
        for key in ("shards", "chips", "accepted", "rejected", "warned"):
            self.total[key] += entry[key]
        self.total["modalities"] = {**entry["modalities"], **self.total["modalities"]}

    def results(self) -> dict[str, Any]:
        """The task's record."""
        self._add({**self._fresh, "shards": []})
        parts: dict[str, list[Statistics]] = {}
        for shard in self.total["shards"]:
            for name, chips in statistics_in(self._paths.shards / shard["file"], range(shard["chips"])).items():
                parts.setdefault(name, []).extend(chips)
        statistics = {name: merge(chips, len(chips[0].count)).to_json() for name, chips in parts.items()}
        return {**self.total, "statistics": statistics, "scenes": len(self._scenes)}


def _empty() -> Entry:
    return {"shards": [], "chips": [], "accepted": [], "rejected": [], "warned": [], "modalities": {}}


def _line(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True, allow_nan=False) + "\n"


def _is_whole(folder: Path, shard: Entry) -> bool:
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"] and file_sha256(path) == shard["sha256"]
