from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rtshpc.core.errors import RunError
from rtshpc.core.paths import CellPaths, RunPaths, make_private, write_alone


def test_no_two_names_of_a_run_or_a_cell_are_the_same(tmp_path: Path) -> None:
    for paths in (RunPaths(tmp_path), CellPaths(tmp_path)):
        kinds = vars(type(paths))
        names = [getattr(paths, name) for name, value in kinds.items() if isinstance(value, property)]
        assert len(set(names)) == len(names) > 5


def test_everything_lies_in_the_run_folder(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for path in (paths.cell("abc").record, paths.shard(3, 1), paths.report_page, paths.index):
        assert path.is_relative_to(tmp_path)
    assert paths.shard(3, 1).name == "0003-001.h5"


def test_nobody_else_can_write_where_pickles_lie(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    RunPaths(tmp_path / "other").create()
    assert not any(path.stat().st_mode & 0o022 for path in (tmp_path / "other").iterdir())


def test_a_folder_of_somebody_else_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert make_private(tmp_path) == tmp_path
    tmp_path.chmod(0o775)
    with pytest.raises(RunError, match=r"belongs to user .*chmod go-w"):
        make_private(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o022), (0o002, 0o022), (0o077, 0o077)])
def test_what_is_created_is_ours_alone_to_write_and_a_stricter_umask_stays(before: int, after: int) -> None:
    old = os.umask(before)
    try:
        write_alone()
        assert os.umask(0o022) == after
    finally:
        os.umask(old)
