"""The call of GDAL's bindings, against a stand-in for them; the image's own test calls the real ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rtshpc.core.errors import MissingExtra, RunError
from rtshpc.hpc.gdal import gdal

BINDINGS = """
import os
class Dataset:
    def __init__(self, path):
        self.path = path
    def FlushCache(self):
        open(self.path, "w").write("whole")
def UseExceptions():
    print("a driver that talks")
def Translate(path, source, **options):
    if source == "absent":
        raise RuntimeError("absent: No such file or directory")
    return Dataset(path)
def Info(path, **options):
    return {"path": path, "options": options, "environment": sorted(os.environ)}
"""


@pytest.fixture
def bindings(gdal_bindings: Callable[[str], None]) -> None:
    gdal_bindings(BINDINGS)


def test_a_call_passes_arguments_and_answer_but_not_what_other_gdals_were_told(
    bindings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GDAL_DATA", "PROJ_LIB", "PROJ_DATA", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("CPL_DEBUG", "OFF")
    answer = gdal("Info", "a b.tif", format="json", bands=[1, 2])
    assert (answer["path"], answer["options"]) == ("a b.tif", {"format": "json", "bands": [1, 2]})
    seen = set(answer["environment"])
    assert "CPL_DEBUG" in seen
    assert not seen & {"GDAL_DATA", "PROJ_LIB", "PROJ_DATA", "PYTHONPATH", "LD_LIBRARY_PATH"}


def test_a_data_set_that_a_call_makes_is_written_before_it_returns(bindings: None, tmp_path: Path) -> None:
    assert gdal("Translate", str(tmp_path / "out.tif"), "in.tif") is None
    assert (tmp_path / "out.tif").read_text() == "whole"


def test_what_gdal_refuses_is_one_line(bindings: None) -> None:
    with pytest.raises(RunError, match=r"^gdal\.Translate: absent: No such file or directory$"):
        gdal("Translate", "out.tif", "absent")
    with pytest.raises(RunError, match=r"^gdal\.Nothing: .*has no attribute 'Nothing'"):
        gdal("Nothing")


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
def test_without_bindings_a_line_says_where_they_come_from(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setenv("RTSHPC_GDAL_PYTHON", python)
    with pytest.raises(MissingExtra, match=r"python3-gdal\), or name their Python in RTSHPC_GDAL_PYTHON") as missing:
        gdal("VersionInfo")
    assert str(missing.value).startswith(f"GDAL's bindings: {python}: ")
