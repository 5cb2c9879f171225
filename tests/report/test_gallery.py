"""Pictures show the truth in red and the predictions in blue, holes too, and are the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from rtshpc.report.gallery import draw_picture, stretch


def squares(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A truth with a hole and a prediction elsewhere, (1, H, W) each."""
    truth, prediction = np.zeros((1, size, size), bool), np.zeros((1, size, size), bool)
    truth[0, size // 8 : size // 2, size // 8 : size // 2] = True
    truth[0, size // 4 : size // 3, size // 4 : size // 3] = False
    prediction[0, 5 * size // 8 : 7 * size // 8, 5 * size // 8 : 7 * size // 8] = True
    return truth, prediction


def red(image: np.ndarray) -> np.ndarray:
    return (image[..., 0] > 0.8) & (image[..., 1] < 0.4) & (image[..., 2] < 0.4)


def blue(image: np.ndarray) -> np.ndarray:
    return (image[..., 2] > 0.8) & (image[..., 0] < 0.4) & (image[..., 1] < 0.5)


def drawn(
    path: Path, size: int, truth: np.ndarray, prediction: np.ndarray, names: tuple[str, ...] = ("rgb",)
) -> np.ndarray:
    images = {name: np.full((size, size, 3) if name == "rgb" else (size, size), 0.5) for name in names}
    draw_picture(path, images, truth, prediction, "a title")
    return imread(path)


def test_truth_is_red_and_predictions_are_blue_at_their_places(tmp_path: Path) -> None:
    size = 64
    image = drawn(tmp_path / "a.png", size, *squares(size))
    # The panel of 320 px begins 10 px from the left and 56 px from the top.
    panel = image[56 : 56 + 320, 10:330]
    rows, columns = np.nonzero(red(panel))
    assert (rows.min() / 5, rows.max() / 5) == pytest.approx((8, 32), abs=0.6)
    assert (columns.min() / 5, columns.max() / 5) == pytest.approx((8, 32), abs=0.6)
    rows, columns = np.nonzero(blue(panel))
    assert (rows.min() / 5, rows.max() / 5) == pytest.approx((40, 56), abs=0.6)
    assert (columns.min() / 5, columns.max() / 5) == pytest.approx((40, 56), abs=0.6)


def test_holes_are_outlined(tmp_path: Path) -> None:
    truth, prediction = squares(64)
    panel = drawn(tmp_path / "a.png", 64, truth, prediction & False)[56:376, 10:330]
    inside = red(panel)[16 * 5 - 4 : 21 * 5 + 4, 16 * 5 - 4 : 21 * 5 + 4]
    assert inside.any()
    filled = truth.copy()
    filled[0, 16:22, 16:22] = True
    panel = drawn(tmp_path / "b.png", 64, filled, prediction & False)[56:376, 10:330]
    assert not red(panel)[16 * 5 - 4 : 21 * 5 + 4, 16 * 5 - 4 : 21 * 5 + 4].any()


def test_one_panel_for_each_modality_and_small_chips_are_enlarged(tmp_path: Path) -> None:
    one = drawn(tmp_path / "a.png", 40, *squares(40))
    three = drawn(tmp_path / "b.png", 40, *squares(40), names=("rgb", "ndvi", "nir"))
    assert one.shape[0] == three.shape[0] == 320 + 56 + 34
    assert (one.shape[1], three.shape[1]) == (340, 1000)
    assert drawn(tmp_path / "c.png", 500, *squares(500)).shape[0] == 500 + 90


def test_a_single_pixel_is_visible_and_no_instance_is_no_error(tmp_path: Path) -> None:
    none = np.zeros((0, 64, 64), bool)
    dot = np.zeros((1, 64, 64), bool)
    dot[0, 0, 63] = True
    assert red(drawn(tmp_path / "a.png", 64, dot, none)[56:376, 10:330]).sum() >= 8
    assert not red(drawn(tmp_path / "b.png", 64, none, none)[56:376, 10:330]).any()


def test_the_same_picture_has_the_same_bytes_and_a_title_is_never_markup(tmp_path: Path) -> None:
    truth, prediction = squares(48)
    images = {"$x^$ <b>": np.full((48, 48), np.nan)}
    for name in ("a.png", "b.png"):
        draw_picture(tmp_path / name, images, truth, prediction, "$\\frac{ <script> " + "x" * 200)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_red_and_blue_lines_differ_in_grey(tmp_path: Path) -> None:
    image = drawn(tmp_path / "a.png", 64, *squares(64))[56:376, 10:330]
    grey = image[..., :3] @ (0.2126, 0.7152, 0.0722)
    assert abs(float(grey[red(image)].mean()) - float(grey[blue(image)].mean())) > 0.1


def test_stretch_uses_valid_pixels_only() -> None:
    band = np.arange(100, dtype=np.int16).reshape(1, 10, 10)
    band[0, 0, 0] = -32768
    valid = band[0] != -32768
    shown = stretch(band, valid, 0, 100)
    assert shown.shape == (10, 10) and shown.dtype == np.float32
    assert shown[0, 0] == 0 and shown[0, 1] == 0 and shown[9, 9] == 1
    assert shown[5, 0] == pytest.approx((50 - 1) / 98)


def test_stretch_gives_three_bands_or_one_and_survives_odd_values() -> None:
    valid = np.ones((4, 4), bool)
    assert stretch(np.random.default_rng(0).random((5, 4, 4)), valid).shape == (4, 4, 3)
    assert stretch(np.random.default_rng(0).random((2, 4, 4)), valid).shape == (4, 4)
    flat = stretch(np.full((1, 4, 4), 7.0), valid)
    assert (flat == 0.5).all()
    odd = np.full((1, 4, 4), np.nan)
    odd[0, 0] = (1, 2, 3, np.inf)
    shown = stretch(odd, valid)
    assert np.isfinite(shown).all() and shown.min() >= 0 and shown.max() <= 1
    assert (stretch(odd, ~valid) == 0).all()
