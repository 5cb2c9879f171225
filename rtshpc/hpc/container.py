"""The Apptainer line a task runs in, which image that was, and whether the code in it is ours.

Nothing here needs Apptainer but the line itself: a login node without it reads an image's labels from the file.
At import this module needs the standard library alone: the image's build asks it for the labels (Apptainer.def).
"""

from __future__ import annotations

import ast
import csv
import io
import json
import platform
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rtshpc.core.errors import RunError
from rtshpc.core.paths import COMMIT_FILE

if TYPE_CHECKING:
    from rtshpc.core.config import SiteConfig

PROGRAM = "apptainer"

SOURCE = "/opt/rtshpc/src"
"""Where the code lies in the image; `site.dev_bind` puts a clone over it."""

VERSIONS_LABEL = "rtshpc.result_versions"
COMMIT_LABEL = "rtshpc.commit"

# A site that sets APPTAINER_CLEANENV, APPTAINER_CONTAIN or APPTAINER_CONTAINALL for its users would drop SLURM_*,
# CUDA_VISIBLE_DEVICES, SUBMITIT_* and /dev/shm. What must not come in (PYTHONPATH, ...), the image itself unsets.
_OPEN = ("--cleanenv=false", "--contain=false", "--containall=false")

_OF_THE_IMAGE = frozenset(map(Path, ("/", "/bin", "/etc", "/lib", "/lib64", "/opt", "/sbin", "/usr")))
"""Folders that are never bound just because a task has to do with them: they would hide the image's own."""

# SIF version 1: a header, a table of descriptors, and what they describe (github.com/apptainer/sif).
_HEADER = struct.Struct("<32s10s3s3s16s8q")
_DESCRIPTOR = struct.Struct("<i?III7q128s384s")
_MAGIC = b"SIF_MAGIC\0"
_JSON = 0x4006
_METADATA = b"inspect-metadata.json"
_MOST_DESCRIPTORS, _MOST_BYTES = 4096, 16 << 20


def command(site: SiteConfig, arguments: Sequence[str], folders: Sequence[Path], python: str) -> list[str]:
    """The argument list that runs `python ARGUMENTS` at a site.

    Args:
        site: its `image` is empty for this environment, else an Apptainer image.
        arguments: what follows the interpreter, e.g. `-m rtshpc.stages ...`.
        folders: seen inside the image under the same names, besides `site.binds`; those that are not there are left out.
        python: interpreter outside an image; inside it is the image's own `python`.
    """
    if not site.image:
        return [python, *arguments]
    # Neither home nor the current folder come along by themselves: what a task sees is what is listed here.
    line = [PROGRAM, "--quiet", "exec", *_OPEN, "--no-mount", "home,cwd"]
    if site.gpus > 0:
        line.append("--nv")
    # A folder is seen under the name that configs use and under its real one; parents come before what is in them.
    names = {name for folder in folders if folder.is_dir() for name in (folder.absolute(), folder.resolve())}
    for name in sorted(names - _OF_THE_IMAGE):
        line += _mount(str(name), str(name))
    for bind in site.binds:
        source, _, rest = bind.partition(":")
        destination, _, access = rest.partition(":")
        line += _mount(source, destination or source, access == "ro")
    if site.dev_bind:
        line += _mount(str(Path(site.dev_bind).absolute()), SOURCE, read_only=True)
    return [*line, "--pwd", str(Path.cwd()), str(Path(site.image).absolute()), "python", *arguments]


def _mount(source: str, destination: str, read_only: bool = False) -> list[str]:
    """One bind as CSV, which takes commas, colons and quotes in names where `--bind` does not."""
    text = io.StringIO()
    fields = ["type=bind", f"source={source}", f"destination={destination}", *(["ro"] if read_only else [])]
    csv.writer(text, lineterminator="").writerow(fields)
    return ["--mount", text.getvalue()]


def refuse_image(site: SiteConfig) -> None:
    """Raise RunError where tasks could not run in `site.image` as this launcher means them; takes milliseconds.

    Apptainer itself is asked for only where tasks run on this machine.
    """
    if not site.image:
        return
    labels = image_labels(Path(site.image))
    if site.executor != "slurm":
        _refuse_without_apptainer(site)
    if site.dev_bind:
        _refuse_other_results(f"site.dev_bind = {site.dev_bind}", result_versions(Path(site.dev_bind)), "")
        return
    text = labels.get(VERSIONS_LABEL)
    if text is None:
        raise RunError(f"site.image = {site.image}: its code is unknown, it has no label {VERSIONS_LABEL}; {_REBUILD}")
    _refuse_other_results(f"site.image = {site.image}", _versions_of(text), labels.get(COMMIT_LABEL, ""))


_REBUILD = "build it with containers/build.sh"


def _refuse_other_results(place: str, theirs: Mapping[str, int], commit: str) -> None:
    """Raise RunError unless every stage gives the same results there as here."""
    from rtshpc.core.cell import RESULT_VERSION

    names = [name for name in {**RESULT_VERSION, **theirs} if RESULT_VERSION.get(name) != theirs.get(name)]
    if names:
        told = ", ".join(
            f"{name} {theirs.get(name, 'none')} (here {RESULT_VERSION.get(name, 'none')})" for name in names
        )
        way_out = f"; {_REBUILD} from this clone" + (f", or launch from commit {commit}" if commit else "")
        raise RunError(f"{place}: its RESULT_VERSION differs from the launcher's: {told}{way_out}")


def image_facts(site: SiteConfig, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What records say of the image: path, size, time of change, SHA-256, commit, and `dev_bind`; `{}` without one.

    Args:
        site: names the image.
        known: facts found before; the hash is taken from there while path, size and time are the same.

    Raises:
        RunError: there is no such image, or it is not the one that `site.image_sha256` asks for.
    """
    if not site.image:
        return {}
    path = Path(site.image)
    facts = {**_stat(path), "commit": image_labels(path).get(COMMIT_LABEL)}
    facts["sha256"] = _sha256(path, known or {})
    if site.image_sha256 not in ("", facts["sha256"]):
        asked = f"site.image_sha256 asks for {site.image_sha256[:12]}"
        raise RunError(
            f"site.image = {site.image} has SHA-256 {facts['sha256'][:12]}, but {asked}; take that file, or pin this one"
        )
    if site.dev_bind:
        from rtshpc.hpc.site import code_version

        clone = Path(site.dev_bind).absolute()
        facts["dev_bind"] = {"path": str(clone), "commit": code_version(clone)}
    return facts


def refuse_start(site: SiteConfig, pinned: Mapping[str, Any] | None) -> None:
    """Raise RunError where a task cannot be started here, in the image that its run's records will name.

    Args:
        site: names the image.
        pinned: what `image_facts` gave at submission.
    """
    if not site.image:
        return
    _refuse_without_apptainer(site)
    asked, found = (pinned or {}).get("sha256"), _sha256(Path(site.image), pinned or {})
    if found != asked:
        text = f"it has SHA-256 {found[:12]}, and this run was submitted with {str(asked)[:12]}"
        raise RunError(f"site.image = {site.image} was replaced: {text}; `sweep` or `retry` takes the new one")


def _refuse_without_apptainer(site: SiteConfig) -> None:
    if shutil.which(PROGRAM) is None:
        text = f"tasks start on {platform.node()}, which has no {PROGRAM} on PATH; install or load it, or leave image empty"
        raise RunError(f"site.image = {site.image}: {text}")


def _stat(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except OSError:
        raise RunError(f"site.image = {path}: no such image; {_REBUILD}, or leave image empty") from None
    return {"path": str(path.absolute()), "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}


def _sha256(path: Path, known: Mapping[str, Any]) -> str:
    """The file's hash, from `known` while path, size and time of change are the same."""
    if all(known.get(key) == value for key, value in _stat(path).items()) and known.get("sha256"):
        return str(known["sha256"])
    from rtshpc.core.records import file_sha256

    return file_sha256(path)


def image_labels(path: Path) -> dict[str, str]:
    """Labels of an image, read from the file itself.

    Raises:
        RunError: there is no such file, or it is no Apptainer image.
    """
    _stat(path)
    try:
        with path.open("rb") as file:
            facts: Any = _metadata(file)
        labels: Any = facts["data"]["attributes"]["labels"] if facts else {}
        return {str(key): str(value) for key, value in cast(dict[Any, Any], labels or {}).items()}
    except OSError as error:
        raise RunError(f"site.image = {path}: cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"site.image = {path}: is no whole Apptainer image (SIF); {_REBUILD}") from None


def _metadata(file: BinaryIO) -> Any:
    """What `apptainer inspect` would read; None where the image has none."""
    _, magic, *_, total, start, _, _, _ = _HEADER.unpack(file.read(_HEADER.size))
    if magic != _MAGIC or not 0 <= total <= _MOST_DESCRIPTORS:
        raise ValueError("no SIF")
    file.seek(start)
    rows = [_DESCRIPTOR.unpack(file.read(_DESCRIPTOR.size)) for _ in range(total)]
    for kind, used, _, _, _, offset, size, *_, name, _ in rows:
        if used and kind == _JSON and name.rstrip(b"\0") == _METADATA and 0 <= size <= _MOST_BYTES:
            file.seek(offset)
            return json.loads(file.read(size))
    return None


def result_versions(source: Path) -> dict[str, int]:
    """RESULT_VERSION of a clone, read from its source: nothing of it is run.

    Raises:
        RunError: it is no clone of this project.
    """
    file = source / "rtshpc" / "core" / "cell.py"
    try:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RESULT_VERSION":
                return dict(ast.literal_eval(node.value))
    except (OSError, ValueError, SyntaxError, TypeError):
        pass
    raise RunError(f"{source}: is no clone of rtshpc: RESULT_VERSION cannot be read from {file.relative_to(source)}")


def label_lines(source: Path) -> str:
    """The labels of an image that holds the code in `source`, one a line: name, space, value."""
    versions = " ".join(f"{name}={version}" for name, version in result_versions(source).items())
    note = source / COMMIT_FILE
    commit = note.read_text(encoding="utf-8").strip() if note.is_file() else "unknown"
    return f"{VERSIONS_LABEL} {versions}\n{COMMIT_LABEL} {commit}"


def _versions_of(text: str) -> dict[str, int]:
    pairs = [word.partition("=") for word in text.split()]
    return {name: int(version) for name, _, version in pairs if version.isdecimal()}
