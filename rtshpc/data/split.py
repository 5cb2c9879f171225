"""Which chips train, which pick the best epoch and which are scored.

Scenes that overlap on the ground, or that the index puts in one group, stay in one split under every rule, as
do the chips of a scene. `split.allow_leakage` lifts both: the paper's own rule (Li et al. 2025, section 4)
splits chip by chip inside every site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from pyproj import CRS, Transformer

from rtshpc.core.config import SplitConfig
from rtshpc.core.errors import DataError, unknown

OVERLAP_SHARE = 1e-5
"""Footprints that share more than this part of the smaller one overlap; less is rounding along a common edge."""
_STEPS = 32
_STRICTEST = ("test", "val", "train")


@dataclass(frozen=True)
class Footprint:
    """Where a scene lies.

    Attributes:
        scene: its id.
        site: its site.
        split: what the index says; "" = nothing.
        group: scenes of one group overlap; "" = not known.
        crs_wkt: CRS of `corners`.
        corners: (x, y) of the four corners, in order around.
    """

    scene: str
    site: str
    split: str
    group: str
    crs_wkt: str
    corners: tuple[tuple[float, float], ...]


def overlap_groups(scenes: Sequence[Footprint]) -> list[list[int]]:
    """Positions of scenes that overlap on the ground, directly or through others, or share a `group`; sorted."""
    parent = list(range(len(scenes)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(one: int, two: int) -> None:
        first, second = sorted((root(one), root(two)))
        parent[second] = first

    named: dict[str, int] = {}
    for number, scene in enumerate(scenes):
        if scene.group:
            join(named.setdefault(scene.group, number), number)
    for one, two in _overlapping(scenes):
        join(one, two)
    groups: dict[int, list[int]] = {}
    for number in range(len(scenes)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def _overlapping(scenes: Sequence[Footprint]) -> list[tuple[int, int]]:
    """Pairs of scenes whose footprints share ground."""
    if len(scenes) < 2:
        return []
    polygons = _on_one_plane(scenes)
    tree = shapely.STRtree(polygons)
    one, two = tree.query(polygons, predicate="intersects")
    pairs = [(int(a), int(b)) for a, b in zip(one, two, strict=True) if a < b]
    smallest = shapely.area(polygons)
    return sorted(
        (a, b)
        for a, b in pairs
        if shapely.intersection(polygons[a], polygons[b]).area > OVERLAP_SHARE * min(smallest[a], smallest[b])
    )


def _on_one_plane(scenes: Sequence[Footprint]) -> list[shapely.Geometry]:
    """Footprints in their common CRS where it is a plane, else in an equal-area plane about their middle."""
    rings = [_dense_ring(scene.corners) for scene in scenes]
    known = {text: CRS.from_wkt(text) for text in {scene.crs_wkt for scene in scenes}}
    if len(known) == 1 and not _wraps(*known.values()):
        return [shapely.Polygon(ring) for ring in rings]
    degrees = [
        np.stack(Transformer.from_crs(known[s.crs_wkt], "EPSG:4326", always_xy=True).transform(*ring.T), axis=1)
        for s, ring in zip(scenes, rings, strict=True)
    ]
    degrees = [ring[np.isfinite(ring).all(axis=1)] for ring in degrees]
    # The middle as a mean of directions: no trouble at the date line or the pole.
    lon, lat = np.radians(np.concatenate(degrees)).T
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    middle = (float(np.degrees(np.arctan2(z, np.hypot(x, y)))), float(np.degrees(np.arctan2(y, x))))
    plane = CRS.from_proj4(f"+proj=laea +lat_0={middle[0]:.6f} +lon_0={middle[1]:.6f} +datum=WGS84 +units=m")
    onto = Transformer.from_crs("EPSG:4326", plane, always_xy=True)
    return [_polygon(np.stack(onto.transform(ring[:, 0], ring[:, 1].clip(-90, 90)), axis=1)) for ring in degrees]


def _wraps(crs: CRS) -> bool:
    """Whether one place has several coordinates: degrees and maps on an upright cylinder repeat every 360 degrees."""
    if not crs.is_projected:
        return True
    method = crs.coordinate_operation.method_name.lower() if crs.coordinate_operation else ""
    upright = any(word in method for word in ("mercator", "cylindrical", "plate carr", "miller"))
    return upright and not any(word in method for word in ("transverse", "oblique"))


def _polygon(ring: np.ndarray) -> shapely.Geometry:
    """The ground inside a ring, without the points that the plane cannot show."""
    ring = ring[np.isfinite(ring).all(axis=1)]
    return shapely.make_valid(shapely.Polygon(ring)) if len(ring) > 2 else shapely.Polygon()


def _dense_ring(corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """A ring with points along the edges, so that it bends with the projection."""
    points = np.asarray(corners, dtype=np.float64)
    share = np.arange(_STEPS)[:, None] / _STEPS
    return np.concatenate(
        [a * (1 - share) + b * share for a, b in zip(points, np.roll(points, -1, axis=0), strict=True)]
    )


def split_scenes(scenes: Sequence[Footprint], config: SplitConfig) -> dict[str, str]:
    """Scene -> train, val or test, by `config.rule`; overlapping scenes together unless leakage is allowed.

    Raises:
        DataError: a scene has no usable value in the split column, or a named site does not exist.
    """
    order = sorted(scenes, key=lambda scene: scene.scene)
    groups = [[number] for number in range(len(order))] if config.allow_leakage else overlap_groups(order)
    if config.rule == "stratified":
        return _stratified([[order[number] for number in group] for group in groups], config)
    wanted = _by_column(order) if config.rule == "column" else _by_site(order, config)
    result: dict[str, str] = {}
    for group in groups:
        # A group that a rule would tear apart goes where it does least harm to honesty: out of training.
        chosen = min((wanted[order[number].scene] for number in group), key=_STRICTEST.index)
        result.update({order[number].scene: chosen for number in group})
    if config.rule == "site" and not config.val_sites:
        rest = [[order[n] for n in group] for group in groups if result[order[group[0]].scene] == "train"]
        result.update(_draw(rest, config, "val", config.val_fraction))
    return result


def _by_column(scenes: Sequence[Footprint]) -> dict[str, str]:
    for scene in scenes:
        if scene.split not in _STRICTEST:
            raise DataError(unknown(f"scene {scene.scene}: split", scene.split, _STRICTEST))
    return {scene.scene: scene.split for scene in scenes}


def _by_site(scenes: Sequence[Footprint], config: SplitConfig) -> dict[str, str]:
    sites = {scene.site for scene in scenes}
    for key in ("test_sites", "val_sites"):
        for site in getattr(config, key):
            if site not in sites:
                raise DataError(unknown(f"split.{key}", site, sites))

    def split(site: str) -> str:
        return "test" if site in config.test_sites else "val" if site in config.val_sites else "train"

    return {scene.scene: split(scene.site) for scene in scenes}


def _stratified(groups: list[list[Footprint]], config: SplitConfig) -> dict[str, str]:
    """Draw test, then val, inside every site; a group counts for the site of its first scene."""
    result = {scene.scene: "train" for group in groups for scene in group}
    sites = sorted({group[0].site for group in groups})
    for site in sites:
        here = [group for group in groups if group[0].site == site]
        test = _draw(here, config, "test", config.test_fraction)
        rest = [group for group in here if group[0].scene not in test]
        result.update(test)
        result.update(_draw(rest, config, "val", config.val_fraction))
    return result


def _draw(groups: Sequence[Sequence[Footprint]], config: SplitConfig, split: str, share: float) -> dict[str, str]:
    """Scenes of the groups that go to `split`: `share` of the scenes, at least one group, never all groups; nothing of a single group."""
    if share <= 0 or len(groups) < 2:
        return {}
    wanted = max(1, round(share * sum(map(len, groups))))
    order = sorted(groups, key=lambda group: _lot(config.seed, split, group[0].scene))
    chosen: list[Sequence[Footprint]] = []
    for group in order:
        if len(chosen) < len(groups) - 1 and sum(map(len, chosen)) + len(group) <= wanted:
            chosen.append(group)
    chosen = chosen or [min(order, key=len)]
    return {scene.scene: split for group in chosen for scene in group}


def _lot(seed: int, split: str, name: str) -> str:
    """A draw that depends on nothing but its arguments: new scenes do not shuffle the old ones."""
    return hashlib.sha256(f"{seed}/{split}/{name}".encode()).hexdigest()


def split_chips(chips: Sequence[Mapping[str, str]], scenes: Sequence[Footprint], config: SplitConfig) -> list[str]:
    """Split of each chip.

    Args:
        chips: `{id, scene, site}` each.
        scenes: where the chips' scenes lie.
        config: the rule. With `allow_leakage` and `stratified`, chips are drawn one by one inside every site.
    """
    if not (config.allow_leakage and config.rule == "stratified"):
        of_scene = split_scenes(scenes, config)
        return [of_scene[chip["scene"]] for chip in chips]
    alone = [
        [Footprint(chip["id"], chip["site"], "", "", "", ())] for chip in sorted(chips, key=lambda chip: chip["id"])
    ]
    of_chip = _stratified(alone, config)
    return [of_chip[chip["id"]] for chip in chips]
