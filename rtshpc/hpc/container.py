"""The Apptainer line a task runs in, and which image that was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RunError


def command(site: SiteConfig, arguments: Sequence[str], folders: Sequence[Path], python: str) -> list[str]:
    """The argument list that runs `python ARGUMENTS` at a site.

    Args:
        site: its `image` is empty for this environment, else an Apptainer image.
        arguments: what follows the interpreter, e.g. `-m rtshpc.stages ...`.
        folders: seen inside the image under the same names, besides `site.binds`.
        python: interpreter outside an image; inside it is the image's own `python`.
    """
    if not site.image:
        return [python, *arguments]
    seen = dict.fromkeys(str(folder.resolve()) for folder in folders)
    binds = [f"{folder}:{folder}" for folder in seen] + list(site.binds)
    line = ["apptainer", "exec"]
    if site.gpus > 0:
        line.append("--nv")
    for bind in binds:
        line += ["--bind", bind]
    return [*line, "--pwd", str(Path.cwd()), site.image, "python", *arguments]


def image_facts(image: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Path, size, time of change and SHA-256 of an image; `{}` without one.

    Args:
        image: path of a .sif file, or empty.
        known: facts found before; the hash is taken from there while size and time are the same.

    Raises:
        RunError: there is no such image.
    """
    if not image:
        return {}
    path = Path(image)
    if not path.is_file():
        raise RunError(f"site.image = {image}: no such image; build it, or leave image empty")
    stat = os.stat(path)
    facts: dict[str, Any] = {"path": str(path), "bytes": stat.st_size, "changed": int(stat.st_mtime)}
    if known is not None and all(known.get(key) == value for key, value in facts.items()):
        return dict(known)
    with path.open("rb") as file:
        facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts
