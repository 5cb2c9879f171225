"""A real Apptainer and a real thin image for tests; both are kept in .cache/, what was changed is built anew."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "containers"

BOUND = f"{sysconfig.get_path('purelib')}:/opt/rtshpc/bound:ro"
"""What a thin image lacks: the libraries of the environment that runs the tests."""


def image_environment() -> dict[str, str]:
    """Environment variables with which `apptainer` is found and can build here; skips where there is none."""
    missing = _missing()
    if missing:
        pytest.skip(
            f"{missing}; needs root on Debian, whose Python must be {sys.version_info[0]}.{sys.version_info[1]}"
        )
    if shutil.which("apptainer"):
        return dict(os.environ)
    with _alone():
        line = [ROOT / "tests" / "cluster" / "apptainer.sh", CACHE / "apptainer"]
        answer = subprocess.run(line, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"needs Apptainer, which could not be installed: {' '.join(answer.stderr.split())[-300:]}")
    # The program's new /usr hides the host's own Python, so only apptainer itself is taken from there.
    return {**os.environ, "PATH": f"{CACHE / 'apptainer' / 'bin'}:{os.environ['PATH']}"}


def thin_image() -> Path:
    """The thin image of the code as it is; skips where it cannot be built."""
    environment = image_environment()
    image = CACHE / f"thin-{_code()}.sif"
    with _alone():
        if not image.is_file():
            for old in CACHE.glob("thin-*.sif*"):
                old.unlink()
            kind = ["--variant", "thin", "--base", "debootstrap", "--fakeroot", "--fast"]
            line = [ROOT / "containers" / "build.sh", *kind, "--output", image]
            answer = subprocess.run(line, env=_in_memory(environment), capture_output=True, text=True, check=False)
            assert answer.returncode == 0, answer.stdout + answer.stderr
    return image


def _in_memory(environment: dict[str, str]) -> dict[str, str]:
    """The same, with a build's half-made systems in memory where there is room: many small files."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30
    return {**environment, "TMPDIR": str(memory), "APPTAINER_TMPDIR": str(memory)} if roomy else environment


@functools.cache
def _missing() -> str:
    """Why no image can be built and used here; empty where one can."""
    if os.getuid() != 0 or not shutil.which("apt-get") or not Path("/etc/debian_version").is_file():
        return "this is not root on Debian"
    asked = ["apt-cache", "show", "--no-all-versions", "python3"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}."
    return "" if f"Version: {ours}" in shown else f"the distribution's Python is not {ours}x"


@functools.cache
def _code() -> str:
    """Hash of all that goes into the image."""
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    parts = ["rtshpc", "configs", "slurm", "containers", "requirements", "Apptainer.def", "pyproject.toml"]
    names = subprocess.run([*asked, "--", *parts], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    total = hashlib.sha256()
    for name in sorted(filter(None, names.split("\0"))):
        total.update(name.encode() + (ROOT / name).read_bytes())
    return total.hexdigest()[:12]


@contextmanager
def _alone() -> Generator[None]:
    """One process at a time builds."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
