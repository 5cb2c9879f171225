"""The base of every config section, and the words for one field's meaning."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One frozen section of a YAML file; an unknown key is an error, a default is always checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def doc(meaning: str, default: Any = ..., **checks: Any) -> Any:
    """A field with its meaning and unit first; without a default the YAML must give it."""
    return Field(default, description=meaning, **checks)
