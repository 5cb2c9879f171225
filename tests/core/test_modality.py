from __future__ import annotations

import numpy as np
import pytest

from rtshpc.core.config.modality import Expression
from rtshpc.core.errors import ConfigError

NUMPY = {"min": np.minimum, "max": np.maximum, "abs": np.abs, "sqrt": np.sqrt, "log": np.log, "exp": np.exp}


def test_names_come_in_order_of_appearance() -> None:
    assert Expression("(nir - red) / (nir + red)").names == ("nir", "red")


def test_numbers_and_arrays_follow_the_same_rules() -> None:
    expression = Expression("max(a, 2) ** 2 - -b / 4 + abs(b) * sqrt(a)")
    plain = expression.evaluate({"a": 9.0, "b": -8.0})
    assert plain == 81 - 2 + 24
    arrays = expression.evaluate({"a": np.full(3, 9.0), "b": np.full(3, -8.0)}, NUMPY)
    assert arrays.tolist() == [plain] * 3


def test_ndvi_equals_numpys() -> None:
    draw = np.random.default_rng(0)
    nir, red = draw.random((2, 5, 5))
    found = Expression("(nir - red) / (nir + red)").evaluate({"nir": nir, "red": red}, NUMPY)
    assert np.array_equal(found, (nir - red) / (nir + red))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("__import__('os').system('true')", "Call|function"),
        ("nir.__class__", "Attribute"),
        ("[nir]", "List"),
        ("nir if red else 0", "IfExp"),
        ("(lambda: nir)()", "unknown"),
        ("nir @ red", "BinOp"),
        ("nir & red", "BinOp"),
        ("nir > red", "Compare"),
        ("'a'", "no number"),
        ("nir + True", "no number"),
        ("1 + 2", "names no band"),
        ("", "no arithmetic"),
        ("nir +", "no arithmetic"),
        ("sqr(nir)", 'Did you mean "sqrt"'),
        ("min(nir)", "takes 2"),
        ("nir + " * 200 + "nir", "longer"),
        ("-" * 60 + "nir", "nested"),
    ],
)
def test_anything_but_arithmetic_is_refused(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        Expression(text)


def test_a_tower_of_powers_is_refused_and_not_computed() -> None:
    with pytest.raises(ConfigError, match="too large"):
        Expression("nir * 9 ** 9 ** 9 ** 9").evaluate({"nir": 1.0})


def test_an_unknown_band_is_named_with_a_guess() -> None:
    with pytest.raises(ConfigError, match='Did you mean "red"'):
        Expression("rde + 1").evaluate({"red": 1.0, "nir": 1.0})
