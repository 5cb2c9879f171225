"""The base of every config section, and the words for one field's meaning."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rtshpc.core.config.checks import refuse_look_alikes


class Section(BaseModel):
    """One frozen section of a YAML file; an unknown key is an error, a default is always checked, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _types_as_written(cls, values: Any) -> Any:
        if isinstance(values, dict):
            fields = ((name, field.annotation) for name, field in cls.model_fields.items())
            refuse_look_alikes(cast(dict[str, Any], values), fields)
        return cast(Any, values)


def doc(meaning: str, default: Any = ..., **checks: Any) -> Any:
    """A field with its meaning and unit first; without a default the YAML must give it."""
    return Field(default, description=meaning, **checks)
