"""Checks that several sections share; each raises ValueError with what is wrong and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import AfterValidator, Field

from rtshpc.core.config.explain import show

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What may be part of a file's name on every file system."""

MODALITY_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""A modality's name is part of file names, labels (`rgb+ndvi`) and dotted keys."""

Line = Annotated[str, Field(pattern=r"^[ -~]*$")]
"""Text for one line of a batch script: a line break would begin a command."""

SHA256 = r"^([0-9a-f]{64})?$"
"""A checksum, or nothing."""

_BIND = re.compile(r"/[^:]*(:/[^:]*(:(ro|rw))?)?")


def _absolute(values: tuple[str, ...]) -> tuple[str, ...]:
    """Folders as Apptainer takes them: absolute, and nothing that it would read as an option."""
    for value in values:
        if not _BIND.fullmatch(value):
            raise ValueError(f"{show(value)} must be SOURCE[:DESTINATION[:ro]] with absolute paths")
    return values


def unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values of which none is empty or there twice."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{show(value)} is given twice in {show(values)}")
        if value in ("", ()):
            raise ValueError(f"{show(values)} holds an empty value")
    return values


def ordered(low: float, high: float, key: str) -> None:
    """Raise ValueError unless a range begins below its end."""
    if low > high:
        raise ValueError(f"{key} = {show((low, high))} must be the smallest, then the largest")


def rising(values: Sequence[float], key: str, over: float, under: float | None = None) -> None:
    """Raise ValueError unless values rise, from more than `over` to less than `under`."""
    within = all(value > over and (under is None or value < under) for value in values)
    if not within or any(one >= two for one, two in pairwise(values)):
        limit = f"more than {over:g}" if under is None else f"between {over:g} and {under:g}"
        raise ValueError(f"{key} = {show(tuple(values))} must be {limit} and rise")


Binds = Annotated[tuple[str, ...], AfterValidator(_absolute)]
"""Folders for a container: "SOURCE[:DESTINATION[:ro]]"."""

Names = Annotated[tuple[str, ...], AfterValidator(unique)]
"""Names of which none is empty or given twice."""


def refuse_look_alikes(values: dict[str, Any], annotations: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError for `true` or "1" in place of a number and `yes` in place of `true`.

    Pydantic would read them as numbers, which nobody meant. Text stays good for a float: YAML 1.1 takes `1e-4` for text.
    """
    for name, annotation in annotations:
        if name in values:
            _refuse(name, values[name], annotation)


def _refuse(key: str, value: Any, annotation: Any) -> None:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    members = [member for member in members if member is not type(None)]
    if len(members) != 1 or value is None:
        return
    wanted = members[0]
    if get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if get_origin(wanted) is tuple and isinstance(value, list | tuple):
        items = [item for item in get_args(wanted) if item is not Ellipsis]
        for number, item in enumerate(cast(Sequence[Any], value)):
            _refuse(f"{key}.{number}", item, items[min(number, len(items) - 1)])
    elif (wanted is int and isinstance(value, bool | str)) or (wanted is float and isinstance(value, bool)):
        kind = "a whole number" if wanted is int else "a number"
        raise ValueError(f"{key} = {show(value)} must be {kind}")
    elif wanted is bool and not isinstance(value, bool):
        raise ValueError(f"{key} = {show(value)} must be true or false")
