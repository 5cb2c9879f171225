"""What a cluster gives to a site: asked of Slurm itself, from a login node."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RtshpcError, unknown
from rtshpc.core.paths import RunPaths
from rtshpc.hpc.accounting import seconds
from rtshpc.hpc.container import image_facts, refuse_image
from rtshpc.hpc.executor import script
from rtshpc.launch.doctor.finding import GIB, Finding, ask, nearest
from rtshpc.launch.doctor.nodes import charges, examine_nodes, scratch

SLURM_PROGRAMS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel")

CLOCK_SECONDS = 5.0
"""Clocks that differ by less agree: one second is the controller's unit, the rest is the way there."""


def examine_site(site: SiteConfig, runs: Path) -> list[Finding]:
    """Look at everything that runs at a site depend on, from a login node where it is a Slurm site.

    Nothing is submitted and nothing is left behind; `sbatch --test-only` uses up a job number for each kind of task.
    """
    return [
        *(_slurm(site, runs) if site.executor == "slurm" else ()),
        *_image(site),
        *_binds(site),
        *scratch(site),
        *charges(site),
    ]


def _slurm(site: SiteConfig, runs: Path) -> Iterable[Finding]:
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    config = None if missing else _cluster_config()
    if config is None:
        what = f"no {', '.join(missing)}" if missing else "the controller does not answer (scontrol show config)"
        advice = f"site {site.name} is a Slurm site: run this on a login node of its cluster, or load its slurm module"
        yield Finding("slurm", "bad", what, advice)
        return
    yield Finding("slurm", "ok", f"{config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}")
    yield _clock(config)
    yield _file_clock(runs)
    yield from _partition(site)
    yield from _limits(site, config)
    yield _account(site)
    yield from (_accepted(site, stage) for stage in ("preprocess", "pretrain"))
    yield _accounting(site, config)
    yield from _modules(site)


def _cluster_config() -> dict[str, str] | None:
    text = ask("scontrol", "show", "config")
    if text is None:
        return None
    pairs = [line.partition("=") for line in text.splitlines() if "=" in line]
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    told = re.search(r"Configuration data as of (\S+)", text)
    return facts | ({"asof": told[1]} if told else {})


def _clock(config: Mapping[str, str]) -> Finding:
    """The controller stamps its answer: its clock against ours."""
    try:
        apart = time.time() - datetime.fromisoformat(config["asof"]).timestamp()
    except (KeyError, ValueError):
        return Finding("cluster clock", "off", "the controller does not tell its time")
    if abs(apart) > CLOCK_SECONDS:
        advice = (
            "ask the administrators for time synchronisation: start estimates and ages of files are off by this much"
        )
        return Finding(
            "cluster clock", "off", f"{abs(apart):.0f} s {'behind' if apart > 0 else 'ahead of'} this node", advice
        )
    return Finding("cluster clock", "ok", "agrees with this node's")


def _file_clock(runs: Path) -> Finding:
    """The file server stamps a new file: its clock against ours."""
    folder = nearest(runs)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            apart = time.time() - os.stat(file.name).st_mtime
    except OSError as error:
        return Finding(
            "file clock", "bad", f"{folder}: {error.strerror}", "give a folder that can be written with --runs DIR"
        )
    if abs(apart) > CLOCK_SECONDS:
        advice = "the file server's clock differs: whether a training advanced before its time limit is then misjudged"
        return Finding(
            "file clock", "off", f"{abs(apart):.0f} s {'behind' if apart > 0 else 'ahead of'} this node", advice
        )
    return Finding("file clock", "ok", "agrees with this node's")


def _partition(site: SiteConfig) -> Iterable[Finding]:
    text = ask("scontrol", "--oneliner", "show", "partition") or ""
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    known = {row["PartitionName"]: row for row in rows if "PartitionName" in row}
    name = site.partition or next((name for name, row in known.items() if row.get("Default") == "YES"), "")
    if name not in known:
        what = (
            unknown("site.partition", name, known) if name else "site.partition is empty and the cluster has no default"
        )
        yield Finding("partition", "bad", what, "" if name else f"give one of {', '.join(known)}")
        return
    row = known[name]
    if row.get("State") != "UP":
        yield Finding("partition", "bad", f"{name} is {row.get('State')}", "jobs wait until the administrators open it")
    allowed = row.get("AllowAccounts", "ALL")
    if site.account and allowed != "ALL" and site.account not in allowed.split(","):
        yield Finding("partition", "bad", f"{name} is closed to account {site.account}", f"it takes {allowed}")
    longest = seconds(row.get("MaxTime", ""))
    if longest is not None and site.minutes * 60 > longest:
        advice = f"set site.minutes to {int(longest // 60)} or less; trainings go on from their checkpoint"
        yield Finding("time limit", "bad", f"site.minutes = {site.minutes}, {name} allows {int(longest // 60)}", advice)
    else:
        most = "no limit" if longest is None else f"{int(longest // 60)} minutes"
        yield Finding("time limit", "ok", f"site.minutes = {site.minutes}, {name} allows {most}")
    yield from examine_nodes(site, name)


def _limits(site: SiteConfig, config: Mapping[str, str]) -> Iterable[Finding]:
    most = int(config.get("MaxArraySize", "1001")) - 1
    if site.max_array > most:
        advice = f"set site.max_array: {most}, else larger arrays are refused"
        yield Finding("array size", "bad", f"site.max_array = {site.max_array}, the cluster takes {most}", advice)
    else:
        yield Finding("array size", "ok", f"site.max_array = {site.max_array}, the cluster takes {most}")
    text = ask("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,MaxSubmitPU,GrpSubmit") or ""
    rows = {row[0]: row[1:] for line in text.splitlines() if len(row := line.split("|")) == 3}
    limits = [int(value) for value in rows.get(site.qos or "normal", []) if value.isdigit()]
    if site.qos and rows and site.qos not in rows:
        yield Finding("qos", "bad", unknown("site.qos", site.qos, rows))
    elif limits and not 0 < site.submit_limit <= min(limits):
        advice = f"set site.submit_limit: {min(limits)}, so that larger sweeps go in parts instead of being refused"
        yield Finding("submit limit", "off", f"QOS {site.qos or 'normal'} takes {min(limits)} jobs of a user", advice)


def _account(site: SiteConfig) -> Finding:
    """The user's associations; a cluster without a database has none."""
    user = getpass.getuser()
    text = ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=Account,Partition"
    )
    if text is None:
        return Finding(
            "account", "off", "sacctmgr does not answer", "the test submissions below tell whether it is taken"
        )
    accounts = sorted({line.split("|")[0] for line in text.splitlines() if line.strip()})
    if site.account and accounts and site.account not in accounts:
        return Finding("account", "bad", unknown("site.account", site.account, accounts))
    if not accounts:
        return Finding(
            "account",
            "off",
            f"{user} has no association here",
            "the test submissions below tell whether none is needed",
        )
    default = "" if site.account else "; site.account is empty: the default one pays"
    return Finding("account", "ok", f"{site.account or ', '.join(accounts)}{default}")


def _accepted(site: SiteConfig, stage: str) -> Finding:
    """What sbatch itself says of a task's request: its word counts, whatever else was found."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            text = script(site, RunPaths(Path(folder)), stage, 1)
        line = ["sbatch", "--test-only"]
        answer = subprocess.run(line, input=text, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired, RtshpcError) as error:
        return Finding(f"request of {stage}", "bad", f"sbatch --test-only: {error}")
    said = " ".join(answer.stderr.split()).removeprefix("sbatch: ")
    if answer.returncode:
        return Finding(
            f"request of {stage}",
            "bad",
            f"refused: {said.removeprefix('error: ')}",
            "`plan --sbatch` shows what is asked for",
        )
    return Finding(f"request of {stage}", "ok", f"accepted: {re.sub(r'^Job [0-9]+ to start', 'would start', said)}")


def _accounting(site: SiteConfig, config: Mapping[str, str]) -> Finding:
    if not site.accounting:
        return Finding(
            "accounting", "off", "site.accounting is off", "`status` and `usage` go by what the tasks note themselves"
        )
    kind = config.get("AccountingStorageType", "").rpartition("/")[2]
    if kind in ("", "none", "(null)"):
        return Finding(
            "accounting", "off", "the cluster keeps none", "`status` and `usage` go by what the tasks note themselves"
        )
    if ask("sacct", "--noheader", "--parsable2", "--format=JobID", "--starttime=now") is None:
        return Finding(
            "accounting",
            "off",
            f"{kind}, but sacct does not answer here",
            "`status` and `usage` go by what the tasks note themselves",
        )
    if "gres/gpu" not in config.get("AccountingStorageTRES", ""):
        return Finding(
            "accounting", "off", f"{kind}, GPUs are not counted", "`usage` counts GPUs as the tasks saw them"
        )
    return Finding("accounting", "ok", f"{kind}, GPUs are counted")


def _modules(site: SiteConfig) -> Iterable[Finding]:
    if not site.modules:
        return
    line = ["bash", "-lc", 'module load "$@"', "bash", *site.modules]
    try:
        answer = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("modules", "bad", f"bash -lc 'module load': {error}")
        return
    failed = answer.returncode != 0
    said = f": {' '.join(answer.stderr.split())[:200]}" if failed else ""
    yield Finding(
        "modules",
        "bad" if failed else "ok",
        f"{' '.join(site.modules)}{said}",
        "`module avail` lists what there is" if failed else "",
    )


def _image(site: SiteConfig) -> Iterable[Finding]:
    if not site.image:
        yield Finding("image", "off", "site.image is empty", "tasks run in this environment, which every node must see")
        return
    try:
        refuse_image(site)
        facts = image_facts(site)
    except RtshpcError as error:
        yield Finding("image", "bad", str(error))
        return
    pinned = "" if site.image_sha256 else "; pin it: site.image_sha256"
    yield Finding(
        "image", "ok", f"{site.image}, {facts['bytes'] / GIB:.2f} GiB, SHA-256 {facts['sha256'][:12]}{pinned}"
    )


def _binds(site: SiteConfig) -> Iterable[Finding]:
    gone = [source for bind in site.binds if not Path(source := bind.split(":")[0]).exists()]
    if gone:
        yield Finding(
            "binds", "bad", f"not there: {', '.join(gone)}", "Apptainer refuses to start with a bind that is missing"
        )
    elif site.binds:
        yield Finding("binds", "ok", f"{len(site.binds)} folders, all there on this node")
