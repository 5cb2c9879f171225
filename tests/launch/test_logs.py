"""A log that is followed while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.launch import jobs


def test_a_letter_that_is_written_in_two_parts_is_followed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, parts, told = tmp_path / "log", ["━━".encode()[:4], "━━\n".encode()[4:]], list[str]()

    def status(_: Any) -> dict[str, Any]:
        with log.open("ab") as file:
            file.write(parts.pop(0))
        return {"cells": [{"id": "aa", "label": "a", "state": "running" if parts else "done", "reason": None}]}

    monkeypatch.setattr(jobs, "run_status", status)
    monkeypatch.setattr(jobs, "_log_path", lambda *_: log)
    monkeypatch.setattr(jobs, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    jobs.follow_log(RunPaths(tmp_path), "aa", lambda text, **_: told.append(text))
    assert told == ["━", "━\n"]
