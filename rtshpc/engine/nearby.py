"""The shards that a stage reads: whole, and where the site says so, from a copy on the scratch disk of the node."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rtshpc.core.cell import Cell
from rtshpc.core.errors import BadNode
from rtshpc.core.paths import RunPaths, make_private
from rtshpc.core.records import Progress, file_sha256, locked, replacing
from rtshpc.data.reader import read_index, require_whole_shards
from rtshpc.hpc.site import scratch_folder

WAIT_SECONDS = 7200.0
"""How long a task waits for another one of its node that copies a shard."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk without room."""


def near(cell: Cell, paths: RunPaths, progress: Progress) -> RunPaths:
    """The run with shards that are what preprocess wrote, copied to this node first where `site.stage_shards` says so.

    The tasks of a node share one copy, of whatever runs they are: its folder is named by the index. Every task compares
    it with the index's SHA-256. Where scratch has no room, the shards are read where they are.

    Raises:
        DataError: shards are missing or were altered; those are removed, which makes their preprocess cell undone.
        RunError: the variable that `site.scratch` names is not set.
        BadNode: the copy differs although the shards are whole.
    """
    folder = scratch_folder(cell.config.site) if cell.config.site.stage_shards else None
    if folder is not None:
        try:
            return replace(paths, staged=_staged(paths, folder, progress))
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(f"{folder}: {error.strerror}; shards are read from {paths.shards}", flush=True)
    require_whole_shards(paths.index, progress)
    return paths


def _staged(paths: RunPaths, folder: Path, progress: Progress) -> Path:
    """Folder of whole copies of the index and its shards."""
    wanted: dict[str, str] = read_index(paths.index)["shards"]
    index_sha256 = file_sha256(paths.index)
    own = make_private(folder / f"rtshpc-{os.getuid()}" / index_sha256[:16])
    for done, (name, sha256) in enumerate(sorted(wanted.items())):
        progress("stage shards", done, len(wanted))
        _stage(paths.shards / name, own / name, sha256, paths, progress)
    _stage(paths.index, own / paths.index.name, index_sha256, paths, progress)
    progress("stage shards", len(wanted), len(wanted))
    return own


def _stage(source: Path, target: Path, sha256: str, paths: RunPaths, progress: Progress) -> None:
    """Make `target` a whole copy, once for all tasks of the node."""
    with locked(target.with_name(f".{target.name}.lock"), WAIT_SECONDS, f"{target}: another task copies it for hours"):
        if target.is_file() and file_sha256(target) == sha256:
            return
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a task that was killed
            leftover.unlink()
        with suppress(_Differs, FileNotFoundError), replacing(target) as temporary:
            shutil.copyfile(source, temporary)
            if file_sha256(temporary) == sha256:
                return
            raise _Differs
    require_whole_shards(paths.index, progress)
    raise BadNode(f"{source} is whole, but its copy in {target.parent} is not")


class _Differs(Exception):
    """What was copied is not what was wanted."""
