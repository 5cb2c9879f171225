"""The allocation report's files: whole after any kill, of any name, and never in the place of somebody's own."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asking import SMALL, asked, evidence_of, spend

from rtshpc.core.paths import AllocationPaths
from rtshpc.report.allocation import page
from rtshpc.report.allocation.page import build, write_allocation
from rtshpc.report.entries import csv_text
from rtshpc.report.page import flat, render_html, render_markdown
from rtshpc.stages.__main__ import main

HOSTILE = "=a \"b\" 'c' $HOME <script>alert(1)</script> | x\ny ![i](j) `k` ÅØ北 " + "long" * 30
FOLDER = "=a 'b' $HOME <script>alert(1)<\\script> | ¦ x\ny ÅØ北"


class Printer:
    """In place of WeasyPrint, which takes seconds: it writes the page in two halves."""

    def __init__(self, string: str, url_fetcher: Any) -> None:
        self.halves = string[: len(string) // 2], string[len(string) // 2 :]

    def write_pdf(self, path: Path) -> None:
        with path.open("w") as file:
            for half in self.halves:
                file.write(half)
                file.flush()
                os.fsync(file.fileno())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def killed_at(number: int, paths: AllocationPaths, evidence: Any) -> bool:
    """Write the report in a process that is killed at its `number`-th sync; whether it came so far."""
    process = os.fork()
    if process == 0:
        syncs, sync = iter(range(number)), os.fsync
        os.fsync = lambda descriptor: sync(descriptor) if next(syncs, None) is not None else os.kill(os.getpid(), signal.SIGKILL)  # fmt: skip
        write_allocation(paths, evidence)
        os._exit(0)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_a_report_that_is_killed_leaves_no_half_file_and_a_second_start_makes_it_whole(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = evidence_of(study(**SMALL).root)
    content = build(evidence)
    monkeypatch.setattr(page, "build", lambda *_: content)  # drawn once
    monkeypatch.setattr(page, "printer", lambda: SimpleNamespace(HTML=Printer))
    write_allocation(AllocationPaths(tmp_path / "whole"), evidence)
    whole, paths = files_of(tmp_path / "whole"), AllocationPaths(tmp_path / "killed")
    syncs = 2 * len(whole)  # one of each file and one of its folder; of the lock none, of the PDF two more
    for number in (0, 3, syncs - 2, syncs - 1):
        shutil.rmtree(paths.root, ignore_errors=True)
        assert killed_at(number, paths, evidence), number
        left = {name: text for name, text in files_of(paths.root).items() if not name.endswith(".tmp")}
        assert all(whole[name] == text for name, text in left.items()), number
        write_allocation(paths, evidence)
        assert files_of(paths.root) == whole
    assert not killed_at(syncs + 2, paths, evidence)


def test_a_folder_of_other_files_is_left_alone(study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, file = tmp_path / "own", tmp_path / "file"
    own.mkdir()
    for path in (own / "budget.csv", file):
        path.write_text("mine")
    run = study(**SMALL).root
    for out, said in (
        (own, f"error: {own}: holds other files and no report; give a new or an empty folder (--out DIR)\n"),
        (file, f"error: {file}: File exists\n"),
        (file / "below", f"error: {file / 'below'}: Not a directory\n"),
    ):
        assert main(["allocation", str(run), "--request", "example", "--out", str(out)]) == 2
        assert capsys.readouterr().err == said
    assert (own / "budget.csv").read_text() == file.read_text() == "mine" and len(list(own.iterdir())) == 1


class Parsed(HTMLParser):
    """Elements of a page, and whether every one of them was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tables_of(markdown: str) -> Iterator[list[str]]:
    rows: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            yield rows
            rows = []


def test_no_name_breaks_a_form_of_the_report(run: Any, tmp_path: Path) -> None:
    spend(run)
    folder = Path(shutil.copytree(run.paths.root, tmp_path / FOLDER))
    item = {"name": HOSTILE, "stage": "finetune", "run": FOLDER, "runs": 2, "why": HOSTILE}
    texts = {"goals": f"{HOSTILE}\n\n- no list\n\n1. no list\n\n---"}
    storage = [{"name": HOSTILE, "gb": 1, "lifetime": "job"}]
    evidence = evidence_of(folder, request=asked(title=HOSTILE, items=[item], texts=texts, storage=storage))
    evidence = replace(evidence, site=evidence.site.model_copy(update={"name": HOSTILE}))
    content = build(evidence)
    text, plain = render_html(content), render_markdown(content)
    parsed = Parsed(text)
    assert not parsed.open and "script" not in parsed.seen and "&lt;script&gt;" in text
    for rows in tables_of(plain):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows[0]
    assert "<script>" not in re.sub(r"\\<", "", plain) and "\n- no list" not in plain and "\n1. no" not in plain
    assert "\n---\n" not in plain and "\\- no list" in plain
    for part in content.parts:
        for table in part.tables:
            columns, *rows = csv.reader(io.StringIO(csv_text(*flat(table))))
            assert all(len(row) == len(columns) for row in rows)
            assert not [field for row in (columns, *rows) for field in row if field.startswith("=")]
    (request,) = [table for part in content.parts for table in part.tables if table.name == "T6"]
    assert request.rows[0][2].value and request.rows[0][-1].text not in ("", "–")  # its jobs are named
