"""What the headers of scenes say: where they lie, in how many blocks they are mapped, and which are merged together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from rtshpc.core.config import DataConfig, MapConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.mapping.ground import Ground, Seen
from rtshpc.core.scenes import Scene
from rtshpc.geo.raster import Grid, rejecting
from rtshpc.geo.scene import scene_grid
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.scenes.groups import grouped

READERS = 8
"""Headers read at once: most of the time is the file system's, or the network's."""


def survey(scenes: Sequence[Scene], data: DataConfig, config: MapConfig) -> list[Seen]:
    """What the header of each scene's primary file says, in the order of `scenes`; reads no pixel.

    A scene that cannot be used has a reason in place of a ground, and a group of its own.

    Raises:
        LayoutError: chips of `data` cannot overlap as `config` asks.
    """
    size = data.chip.size_px
    Layout(size, size, size, config.overlap(size))
    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(lambda scene: _seen(scene, data, config), scenes))
    return grouped(seen, [scene.date for scene in scenes])


def layout_of(ground: Ground, data: DataConfig, config: MapConfig) -> Layout:
    """How a scene is cut into chips. Raises LayoutError."""
    return Layout(ground.height, ground.width, data.chip.size_px, config.overlap(data.chip.size_px))


def ground_of(grid: Grid) -> Ground:
    """A raster's grid as a run's files hold it."""
    return Ground(**asdict(grid))


def _seen(scene: Scene, data: DataConfig, config: MapConfig) -> Seen:
    try:
        with rejecting(scene.id):
            grid = scene_grid(scene, data)
    except SceneRejected as error:
        return Seen(reason=error.reason, detail=error.detail)
    ground = ground_of(grid)
    return Seen(ground=ground, blocks=len(layout_of(ground, data, config).blocks(config.block_px)))
