"""Where a scene to map lies, and what else a map run has to know of it before any pixel is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from rtshpc.core.config.section import Section, doc
from rtshpc.core.records import read_json, write_json
from rtshpc.core.scenes import VIRTUAL, Scene


class Ground(Section):
    """The grid a scene is mapped on: that of its primary modality, north up."""

    crs_wkt: str = doc("coordinate reference system, WKT")
    transform: tuple[float, float, float, float, float, float] = doc("a, b, c, d, e, f of pixel corners")
    height: int = doc("px", ge=1)
    width: int = doc("px", ge=1)
    resolution_m: float = doc("side of a square of a pixel's ground area, m")


class Seen(Section):
    """What the headers of a scene's files say; scenes of one date on one pixel lattice whose grounds meet are a group."""

    ground: Ground | None = doc("its grid; none where it cannot be used", None)
    blocks: int = doc("tasks that map it", 1, ge=1)
    group: int = doc("scenes of the same number are merged together", 0, ge=0)
    row: int = doc("of its pixel (0, 0) on the lattice of its group, px; the group's first row is 0", 0, ge=0)
    col: int = doc("likewise", 0, ge=0)
    reason: str = doc("why it cannot be used, a short stable word; empty = it can", "")
    detail: str = doc("the same for people", "")


class MapScene(Seen):
    """A scene of a map run."""

    scene: Scene = doc("its files, site and date")
    fingerprint: str = doc("SHA-256 of its facts and of its files' names, sizes and ends")


def folders_of(scenes: Iterable[Scene]) -> list[Path]:
    """Folders of the files of scenes, each once; virtual files have none."""
    files = (file for scene in scenes for file in (scene.image, *scene.files.values()))
    return list(dict.fromkeys(Path(file).parent for file in files if file and not file.startswith(VIRTUAL)))


def read_frozen(path: Path) -> list[MapScene] | None:
    """The scenes that a map run was submitted with; None where the file is absent, torn or of another form."""
    try:
        return [MapScene.model_validate(one) for one in cast(list[Any], read_json(path) or ())] or None
    except (ValidationError, TypeError):
        return None


def write_frozen(path: Path, scenes: Sequence[MapScene]) -> None:
    """Freeze the scenes of a map run."""
    write_json(path, [scene.model_dump(mode="json", exclude_defaults=True) for scene in scenes])
