from __future__ import annotations

import stat
from pathlib import Path

from rtshpc.core.paths import CellPaths, RunPaths, make_private


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
