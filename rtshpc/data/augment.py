"""Augmentation: the same geometry for every modality and the masks, drawn from (seed, epoch, sample id) alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rtshpc.core.config import AugmentConfig
from rtshpc.data.sample import Sample, Target, boxes_of, keep

SMALLEST_PX = 4
"""Instances that the zoom leaves with fewer pixels become ignore regions: too little to learn from."""


@dataclass(frozen=True)
class Geometry:
    """One drawn change of geometry: flips, then quarter turns, then a zoom about (y, x) in 0..1 of the slack."""

    flip_x: bool
    flip_y: bool
    turns: int
    zoom: float
    place: tuple[float, float]


def generator(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """Random numbers that depend on nothing but the three arguments (not on worker, order or process)."""
    key = hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def augment(sample: Sample, config: AugmentConfig, seed: int, epoch: int) -> Sample:
    """A changed copy of `sample`, of the same size; a pure function of its arguments.

    Geometry (flips, quarter turns, zoom) is shared by all modalities, masks and validity. Radiometry
    (brightness, contrast, noise) is drawn for each modality and leaves nodata at 0. The transform is that
    of the unchanged chip: augmented samples are for training only.
    """
    random = generator(seed, epoch, sample.id)
    geometry = draw_geometry(config, random, square=sample.size[0] == sample.size[1])
    changed = _with_geometry(sample, geometry)
    images = {
        name: _radiometry(image, changed.modality_valid.get(name, changed.valid), config, random)
        for name, image in changed.images.items()
    }
    return replace(changed, images=images)


def draw_geometry(config: AugmentConfig, random: np.random.Generator, square: bool) -> Geometry:
    """Draw flips, turns and zoom; always the same number of draws, so that one switch moves no other draw."""
    draws = random.random(6)
    low, high = config.scale
    turns = int(draws[2] * 4) if config.quarter_turns else 0
    if not square:
        turns = turns // 2 * 2  # a quarter turn of an oblong chip would change the batch's shape
    return Geometry(
        flip_x=bool(config.flip and draws[0] < 0.5),
        flip_y=bool(config.flip and draws[1] < 0.5),
        turns=turns,
        zoom=float(low + (high - low) * draws[3]),
        place=(float(draws[4]), float(draws[5])),
    )


def variant_of(geometry: Geometry) -> int:
    """Number in `core.features.VARIANTS` of a drawn geometry without zoom: two flips are half a turn."""
    return 4 * (geometry.flip_x != geometry.flip_y) + (geometry.turns + 2 * geometry.flip_y) % 4


def geometry_of(variant: int) -> Geometry:
    """The geometry of a variant: at most one flip, then quarter turns."""
    return Geometry(flip_x=variant >= 4, flip_y=False, turns=variant % 4, zoom=1.0, place=(0.0, 0.0))


def drawn_variant(sample_id: str, config: AugmentConfig, seed: int, epoch: int) -> int:
    """The variant that `augment` makes of a square chip, where it only flips and turns."""
    return variant_of(draw_geometry(config, generator(seed, epoch, sample_id), square=True))


def _with_geometry(sample: Sample, geometry: Geometry) -> Sample:
    def image(layers: Tensor) -> Tensor:
        return zoom(turn(layers, geometry), geometry, "bilinear")

    def mask(layers: Tensor) -> Tensor:
        return zoom(turn(layers, geometry), geometry, "nearest")

    masks = mask(sample.target.masks)
    sizes, before = masks.sum(dim=(1, 2)), sample.target.masks.sum(dim=(1, 2))
    # Only what the zoom cut or shrank can fall away: an instance that was tiny from the start stays.
    chosen = (sizes > 0) & ((sizes >= SMALLEST_PX) | (sizes >= before))
    ignore = mask(sample.target.ignore) | masks[~chosen].any(dim=0)
    target = Target(boxes_of(masks), sample.target.classes, masks, ignore)
    return replace(
        sample,
        images={name: image(layers) for name, layers in sample.images.items()},
        valid=mask(sample.valid),
        modality_valid={name: mask(layers) for name, layers in sample.modality_valid.items()},
        target=keep(target, chosen),
    )


def turn(layers: Tensor, geometry: Geometry) -> Tensor:
    """Flip and turn (..., H, W): moves pixels, computes nothing."""
    axes = [axis for axis, flipped in ((-1, geometry.flip_x), (-2, geometry.flip_y)) if flipped]
    if axes:
        layers = layers.flip(axes)
    if geometry.turns:
        layers = torch.rot90(layers, geometry.turns, (-2, -1))
    return layers.contiguous()


def zoom(layers: Tensor, geometry: Geometry, kernel: str) -> Tensor:
    """Resize (..., H, W) by `geometry.zoom` and cut or pad with 0 back to H x W."""
    height, width = layers.shape[-2:]
    if geometry.zoom == 1.0:
        return layers
    new = (max(1, round(height * geometry.zoom)), max(1, round(width * geometry.zoom)))
    flat = layers.reshape(1, -1, height, width)
    if flat.shape[1] == 0:
        return layers
    if kernel == "nearest":
        resized = F.interpolate(flat.to(torch.float32), size=new, mode="nearest-exact").to(layers.dtype)
    else:
        resized = F.interpolate(flat, size=new, mode="bilinear", align_corners=False)
    place = [
        int(share * (abs(full - now) + 1))
        for share, full, now in zip(geometry.place, (height, width), new, strict=True)
    ]
    if geometry.zoom > 1.0:
        out = resized[..., place[0] : place[0] + height, place[1] : place[1] + width]
    else:
        out = layers.new_zeros((1, flat.shape[1], height, width))
        out[..., place[0] : place[0] + new[0], place[1] : place[1] + new[1]] = resized
    return out.reshape(layers.shape).contiguous()


def _radiometry(image: Tensor, valid: Tensor, config: AugmentConfig, random: np.random.Generator) -> Tensor:
    """Change gain, shift and noise of one modality, in standard deviations; nodata stays 0."""
    gain, shift, level = random.uniform(-1, 1, 3)
    if not (config.contrast or config.brightness or config.noise):
        return image
    changed = image * (1 + gain * config.contrast) + shift * config.brightness
    if config.noise:
        noise = random.standard_normal(tuple(image.shape), dtype=np.float32)
        changed = changed + torch.from_numpy(noise) * (abs(level) * config.noise)
    return torch.where(valid, changed, torch.zeros_like(changed)).to(torch.float32)
