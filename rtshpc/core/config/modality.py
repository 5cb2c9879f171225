"""Modalities made by arithmetic over named bands, e.g. `(nir - red) / (nir + red)`. Standard library only."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from rtshpc.core.errors import ConfigError, guess

SCALAR_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
}
"""What an expression may call, for plain numbers; array libraries are given by the caller."""

_ARGUMENTS = {"min": 2, "max": 2, "abs": 1, "sqrt": 1, "log": 1, "exp": 1}


def _divide(one: Any, two: Any) -> Any:
    return one / two


def _power(one: Any, two: Any) -> Any:
    return one**two


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.Pow: _power,
}

_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

_LONGEST = 500
_DEEPEST = 40


class Expression:
    """Checked arithmetic over band names; nothing but the operators and functions named here can run.

    Allowed: `+ - * / **`, signs, parentheses, numbers, band names, `min(a, b)`, `max(a, b)`, `abs`,
    `sqrt`, `log`, `exp`.

    Raises:
        ConfigError: the text holds anything else.
    """

    def __init__(self, text: str, place: str = "expression") -> None:
        self.text = text.strip()
        self._place = place
        if len(self.text) > _LONGEST:
            raise self._error(f"longer than {_LONGEST} characters")
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._error("no arithmetic expression") from None
        found: list[str] = []
        self._check(self._tree, found, 0)
        if not found:
            raise self._error("names no band")
        self.names: tuple[str, ...] = tuple(dict.fromkeys(found))
        """Band names in order of appearance."""

    def evaluate(self, bands: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
        """The value over `bands`: numbers, or arrays of one shape when `functions` are an array library's.

        Args:
            bands: name -> value in physical units (scale and offset applied).
            functions: `min max abs sqrt log exp` for the type of the bands; default: plain numbers.

        Raises:
            ConfigError: a band is missing, or a constant part overflows.
        """
        missing = [name for name in self.names if name not in bands]
        if missing:
            raise self._error(f'band "{missing[0]}" is unknown.{guess(missing[0], bands)}')
        try:
            return self._value(self._tree, bands, functions or SCALAR_FUNCTIONS)
        except OverflowError:
            raise self._error("a number in it is too large") from None

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f'{self._place} = "{self.text[:80]}": {what}')

    def _check(self, node: ast.expr, names: list[str], depth: int) -> None:
        if depth > _DEEPEST:
            raise self._error(f"nested deeper than {_DEEPEST}")
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, int | float):
                raise self._error(f"{node.value!r} is no number")
        elif isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            self._check(node.operand, names, depth + 1)
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            self._check(node.left, names, depth + 1)
            self._check(node.right, names, depth + 1)
        elif isinstance(node, ast.Call):
            self._check_call(node, names, depth)
        else:
            allowed = "+ - * / **, signs, parentheses, numbers, band names and the functions " + ", ".join(_ARGUMENTS)
            raise self._error(f"{type(node).__name__} is not allowed; allowed: {allowed}")

    def _check_call(self, node: ast.Call, names: list[str], depth: int) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else "?"
        if name not in _ARGUMENTS:
            raise self._error(f'function "{name}" is unknown.{guess(name, _ARGUMENTS)}')
        if node.keywords or len(node.args) != _ARGUMENTS[name]:
            raise self._error(f"{name} takes {_ARGUMENTS[name]} arguments")
        for argument in node.args:
            self._check(argument, names, depth + 1)

    def _value(self, node: ast.expr, bands: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Any:
        if isinstance(node, ast.Constant):
            # Floats, so that a tower of powers overflows at once instead of filling the memory.
            return float(node.value)  # pyright: ignore[reportArgumentType]
        if isinstance(node, ast.Name):
            return bands[node.id]
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](self._value(node.operand, bands, functions))
        if isinstance(node, ast.BinOp):
            left = self._value(node.left, bands, functions)
            return _BINARY[type(node.op)](left, self._value(node.right, bands, functions))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return functions[node.func.id](*(self._value(argument, bands, functions) for argument in node.args))
