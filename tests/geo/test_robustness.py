"""Every row of ../shared/robustness/TABLE.csv, judged by rule."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rtshpc.stages.tools import check

ROOT = Path(__file__).resolve().parents[3] / "shared" / "robustness"
TABLE = ROOT / "TABLE.csv"
ROWS = list(csv.DictReader(TABLE.open(encoding="utf-8"))) if TABLE.exists() else []

# Its contradiction lies in a world file and a PAM file that were beside it upstream and are not here; the
# TIFF's own tags are those of uint32.tif, which the table accepts. The rule is tested on made files in
# test_judge.py: test_a_sidecar_that_contradicts_the_tags_is_told.
CONTRADICTION_NOT_HERE = "files/byte_inconsistent_georef.tif"


def judged(capsys: Any, *arguments: str) -> list[dict[str, Any]]:
    assert check.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def cases() -> list[Any]:
    if not ROWS:
        reason = "needs ../shared/robustness (real odd and broken rasters)"
        return [pytest.param("", "", id="absent", marks=pytest.mark.skip(reason=reason))]
    found: list[Any] = []
    for row in ROWS:
        marks = []
        if row["file"] == CONTRADICTION_NOT_HERE:
            marks = [pytest.mark.xfail(strict=True, reason="the sidecar files that contradict the TIFF are not here")]
        found.append(pytest.param(row["file"], row["verdict"], id=row["file"].strip("/"), marks=marks))
    return found


@pytest.mark.parametrize(("file", "wanted"), cases())
def test_the_verdict_is_the_tables(file: str, wanted: str, capsys: Any) -> None:
    found = judged(capsys, str(ROOT / file))
    assert len(found) == 1
    assert found[0]["verdict"] == wanted, found[0]["reasons"]
    assert bool(found[0]["reasons"]) == (wanted != "accept")


@pytest.mark.skipif(not ROWS, reason="needs ../shared/robustness (real odd and broken rasters)")
def test_a_folder_of_all_cases_is_judged_in_one_go(capsys: Any) -> None:
    wanted = {row["file"].strip("/"): row["verdict"] for row in ROWS}
    found = judged(capsys, str(ROOT / "sample_defects"), str(ROOT / "files"))
    given = {str(Path(one["path"]).relative_to(ROOT)): one["verdict"] for one in found}
    wrong = {name for name in wanted if given.get(name) != wanted[name]}
    assert wrong == {CONTRADICTION_NOT_HERE}
