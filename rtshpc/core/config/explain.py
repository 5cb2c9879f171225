"""What pydantic found wrong -> where it is written, its value, what is allowed and a guess, on one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rtshpc.core.errors import guess, unknown

Locate = Callable[[tuple[str, ...]], tuple[str, tuple[str, ...]]]
"""Full key -> (the file or `--set` that gave the value, the key as it is spelled there)."""

WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of names to values",
    "mapping": "a mapping of names to values",
    "model": "a section of keys and values",
}
"""First word of a pydantic error type -> what the value should have been."""

LIMITS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}

KEY_FIRST = re.compile(r"^([A-Za-z_][\w.]*) = ")


def explain(error: ValidationError, model: type[BaseModel], locate: Locate) -> str:
    """The first mistake of `error` as `FILE: KEY = VALUE ...`, and how many others there are.

    An unknown key comes before a missing one: its guess usually answers both.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _sentence(dict(problems[0]), model, locate) + more


def fields_at(model: type[BaseModel], key: tuple[str, ...]) -> list[str] | None:
    """Names a config may have under the dotted `key`; None where the key leads to no section."""
    _, annotation = walk(model, key)
    section = _section(annotation)
    return sorted(section.model_fields) if section is not None else None


def walk(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[tuple[str, ...], Any]:
    """Follow a location through sections, mappings and tagged unions.

    Returns the key without the tags that pydantic puts into it, and the annotation found at its end
    (None where the location leaves the model).
    """
    key: list[str] = []
    annotation: Any = model
    for step in location:
        members = [member for member in _members(annotation) if _section(member) is not None]
        tagged = [member for member in members if step in _tags(member)]
        if len(members) > 1 and tagged:
            annotation = tagged[0]
            continue
        key.append(str(step))
        annotation = _child(annotation, step)
    return tuple(key), annotation


def _child(annotation: Any, step: Any) -> Any:
    """Annotation one step further down, or None."""
    for member in _members(annotation):
        section = _section(member)
        if section is not None and step in section.model_fields:
            return section.model_fields[step].annotation
        if get_origin(member) is dict:
            return get_args(member)[1]
        if get_origin(member) in (tuple, list):
            items = [item for item in get_args(member) if item is not Ellipsis]
            return items[min(int(step), len(items) - 1)] if items else None
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for member in get_args(annotation) if member is not type(None))
    return (annotation,)


def _section(annotation: Any) -> type[BaseModel] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def _tags(section: Any) -> tuple[Any, ...]:
    """Values of the `kind` that tells this section from its siblings in a union."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _sentence(problem: dict[str, Any], model: type[BaseModel], locate: Locate) -> str:
    """One pydantic error as the house writes it."""
    location, _ = walk(model, tuple(problem["loc"]))
    kind, value, context = str(problem["type"]), problem["input"], problem.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return _own_check(str(context.get("error", problem["msg"])), location, locate)
    place, key = locate(location)
    if kind.startswith("union_tag"):
        place, key = locate((*location, "kind"))
    dotted = ".".join(key)
    if kind == "extra_forbidden":
        _, parent = walk(model, tuple(problem["loc"])[:-1])
        section = _section(parent)
        known = guess(key[-1], section.model_fields) if section is not None else ""
        return f"{place}: {dotted} is no known key.{known}"
    if kind == "missing":
        return f"{place}: {dotted} is missing{_meaning(model, location)}"
    return f"{place}: {_wrong_value(dotted, kind, value, context, str(problem['msg']))}"


def _own_check(text: str, location: tuple[str, ...], locate: Locate) -> str:
    """A sentence of one of our validators; a leading `KEY =` is relative to its section."""
    named = KEY_FIRST.match(text)
    if named:
        place, key = locate(location + tuple(named[1].split(".")))
        return f"{place}: {'.'.join(key)} = {text[named.end() :]}"
    place, key = locate(location)
    return f"{place}: {'.'.join(key)}: {text}" if key else f"{place}: {text}"


def _meaning(model: type[BaseModel], location: tuple[str, ...]) -> str:
    """` (what the field is)` from its description."""
    _, parent = walk(model, location[:-1])
    section = _section(parent)
    field = section.model_fields.get(location[-1]) if section is not None else None
    return f" ({field.description})" if field is not None and field.description else ""


def _wrong_value(key: str, kind: str, value: Any, context: Mapping[str, Any], message: str) -> str:
    """`KEY = VALUE ...` for a value that is of the wrong type, out of bounds, or no member of a set."""
    if kind == "literal_error":
        return unknown(key, str(value), re.findall(r"'([^']*)'", str(context.get("expected", ""))))
    if kind == "union_tag_invalid":
        return unknown(key, str(context.get("tag", "")), _tag_names(context))
    if kind == "union_tag_not_found":
        return f"{key} is missing: it says which other keys are allowed"
    if kind in LIMITS:
        name, word = LIMITS[kind]
        return f"{key} = {show(value)} must be {word} {show(context.get(name))}"
    if kind == "string_pattern_mismatch":
        return f"{key} = {show(value)} must match {context.get('pattern')}"
    if kind in ("too_short", "too_long"):
        name, word = ("min_length", "at least") if kind == "too_short" else ("max_length", "at most")
        found = context.get("actual_length")
        return f"{key} = {show(value)} must have {word} {context.get(name)} items, found {found}"
    if kind == "int_from_float":
        return f"{key} = {show(value)} must be a whole number"
    wanted = WANTED.get(kind.split("_")[0])
    if wanted is not None:
        return f"{key} = {show(value)} must be {wanted}"
    return f"{key} = {show(value)}: {message}"


def _tag_names(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected_tags", "")))


def show(value: Any, width: int = 60) -> str:
    """A value as short as a message can bear it, on one line."""
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, tuple):
        text = str(list(value))  # pyright: ignore[reportUnknownArgumentType]
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
