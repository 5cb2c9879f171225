"""What an allocation request asks for, and what a programme wants to read: the two YAML files behind `allocation`."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, NonNegativeFloat, model_validator

from rtshpc.core.cell import STAGES
from rtshpc.core.config.checks import FILE_NAME, Names, unique
from rtshpc.core.config.explain import show
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import unknown
from rtshpc.core.load import load_section

GENERIC = "generic"
"""The programme of our own making; every other one cites where its fields come from."""

TABLES = ("T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7")
"""Provenance, strong and weak scaling, throughput, memory, storage, the request, frozen against full."""

TEXTS = ("parallelisation", "job_size", "checkpointing", "bottleneck")
"""Texts that are made of records."""

LIFETIMES = {
    "job": "until the job ends",
    "stage": "until the next stage is over",
    "project": "until the project ends",
    "archive": "kept after the project",
}
"""How long a file is wanted."""

MOST = 1_000_000_000
"""More jobs, times or GB than this are a slip of the hand."""

DAY = r"^(\d{4}-\d\d-\d\d)?$"


def _as_text(value: object) -> object:
    """A day as it was written: YAML takes it for a date."""
    return value.isoformat() if isinstance(value, date) else value


class Item(Section):
    """A line of the request: so many jobs of a stage."""

    name: str = doc("what it is, for people", min_length=1)
    stage: str = doc("whose records tell what one job costs")
    run: str = doc("name of the run folder they lie in; empty = all that are given", "")
    modalities: Names = doc("only of cells with these modalities, the primary first; empty = any", ())
    arm: Literal["", "unimodal", "pretrained", "full", "cached"] = doc("only of cells of this arm; empty = any", "")
    runs: int = doc("jobs of this kind", ge=1, le=MOST)
    times: float = doc(
        "work of one such job over that of a measured one; other than 1 is an extrapolation", 1.0, gt=0, le=MOST
    )
    gpus: int = doc("GPUs of such a job; 0 = as many as were measured", 0, ge=0)
    periods: tuple[NonNegativeFloat, ...] = doc("weight of each period; empty = the same in each", ())
    why: str = doc("what it is for", "")

    @model_validator(mode="after")
    def _stage_is_one(self) -> Item:
        if self.stage not in STAGES:
            raise ValueError(unknown("stage", self.stage, STAGES))
        if self.periods and not sum(self.periods):
            raise ValueError(f"periods = {show(self.periods)} must hold a weight above 0")
        return self


class Storage(Section):
    """Files of the project that no record tells of, e.g. the scenes."""

    name: str = doc("what they are", min_length=1)
    gb: float = doc("how much, GB (1e9 bytes)", ge=0, le=MOST)
    lifetime: Literal["job", "stage", "project", "archive"] = doc("how long they are wanted")


class AllocationRequest(Section):
    """What `configs/requests/*.yaml` holds: what is asked for. What a job costs is never in it: records tell."""

    title: str = doc("name of the project", min_length=1)
    start: str = doc("first month, YYYY-MM; empty = none is named", "", pattern=r"^(\d{4}-(0[1-9]|1[0-2]))?$")
    periods: int = doc("parts of the allocation's time", 4, ge=1, le=60)
    period_months: int = doc("months of each", 3, ge=1, le=60)
    site: str = doc("name or file of the site that is asked; empty = the site of the first run", "")
    items: tuple[Item, ...] = doc("what is to be run", min_length=1)
    storage: tuple[Storage, ...] = doc("files that no record tells of", ())
    texts: dict[str, str] = doc("field of the programme -> what a person has written for it", {})

    @model_validator(mode="after")
    def _periods_agree(self) -> AllocationRequest:
        unique(tuple(item.name for item in self.items))
        for number, item in enumerate(self.items):
            if item.periods and len(item.periods) != self.periods:
                raise ValueError(
                    f"items.{number}.periods = {show(item.periods)} must have {self.periods} weights, one a period"
                )
        return self


class Field(Section):
    """What a programme wants to read."""

    id: str = doc("short name", pattern=FILE_NAME)
    title: str = doc("heading", min_length=1)
    asks: str = doc("what is asked, in a sentence", min_length=1)
    answered_by: Annotated[tuple[str, ...], AfterValidator(unique)] = doc("tables and texts of ours that answer it", ())
    person: str = doc("what a person must write; empty = nothing", "")
    words: int = doc("most words a person may write; 0 = no limit", 0, ge=0)
    source: str = doc("address that demands the field", "", pattern=r"^(https?://\S+)?$")
    date: Annotated[str, BeforeValidator(_as_text)] = doc("day it was read, YYYY-MM-DD", "", pattern=DAY)

    @model_validator(mode="after")
    def _is_answered(self) -> Field:
        for name in self.answered_by:
            if name not in (*TABLES, *TEXTS):
                raise ValueError(unknown("answered_by", name, (*TABLES, *TEXTS)))
        if not (self.answered_by or self.person):
            raise ValueError("answered_by is empty and person is too: nobody would answer the field")
        return self


class Programme(Section):
    """What `configs/programmes/*.yaml` holds: the fields of a programme, each with the page that demands it."""

    name: str = doc("name of the programme", pattern=FILE_NAME)
    title: str = doc("its name for people", min_length=1)
    fields: tuple[Field, ...] = doc("what it wants to read, in its order", min_length=1)

    @model_validator(mode="after")
    def _fields_have_sources(self) -> Programme:
        unique(tuple(field.id for field in self.fields))
        for number, field in enumerate(self.fields):
            if self.name != GENERIC and not (field.source and field.date):
                raise ValueError(
                    f'fields.{number}.source = "{field.source}" and its date = "{field.date}" must say where and when'
                    f' {self.name} demands "{field.id}"'
                )
        return self


def load_request(name_or_path: str | Path) -> AllocationRequest:
    """A request of configs/requests, or of a path. Raises ConfigError."""
    return load_section("request", name_or_path, (), AllocationRequest)


def load_programme(name_or_path: str | Path) -> Programme:
    """A programme of configs/programmes, or of a path. Raises ConfigError."""
    return load_section("programme", name_or_path, (), Programme)
