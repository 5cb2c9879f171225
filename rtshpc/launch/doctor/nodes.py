"""What a site file says of nodes, their GPUs, their disks and their price, beside what Slurm says of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtshpc.core.config import SiteConfig
from rtshpc.hpc.site import node_share, request
from rtshpc.launch.doctor.finding import GIB, Finding, ask

GPU_MEMORY_GB = {
    "v100": (16, 32),
    "rtx6000": (24, 48),
    "rtx8000": (48,),
    "a5000": (24,),
    "a6000": (48,),
    "a10": (24,),
    "a30": (24,),
    "a40": (48,),
    "a100": (40, 80),
    "l4": (24,),
    "l40s": (48,),
    "h100": (64, 80, 94, 96),
    "h200": (141,),
}
"""Names of GPUs, as sites spell them -> memory they are sold with, GB."""

ROOM = 0.1
"""Share by which a node's memory may be more than Slurm gives away of it."""


@dataclass(frozen=True)
class Node:
    """One node as sinfo tells it."""

    name: str
    state: str
    cpus: int
    memory_mb: int
    gres: str
    features: str


def examine_nodes(site: SiteConfig, partition: str) -> Iterable[Finding]:
    """Whether nodes of the partition can hold what the site asks for, and are what it says they are."""
    text = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T|%c|%m|%G|%f") or ""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 5]
    nodes = [Node(row[0], row[1], int(row[2].rstrip("+")), int(row[3].rstrip("+")), row[4], row[5]) for row in rows]
    if not nodes:
        yield Finding("nodes", "bad", f"partition {partition} has none", "ask the administrators, or take another")
        return
    yield _able(site, partition, nodes)
    yield from _as_described(site, nodes)
    yield from _gpu_memory(site, nodes)


def _able(site: SiteConfig, partition: str, nodes: Sequence[Node]) -> Finding:
    """Whether enough nodes can hold a task (of a training), and how many of those are up."""
    asked = request(site, "pretrain")
    cpus, tasks = asked.cpus * asked.tasks, f" x {asked.tasks} tasks" if asked.tasks > 1 else ""
    able: list[Node] = []
    lacks: dict[str, None] = {}
    for node in nodes:
        short = [
            what
            for what, enough in (
                (f"cores {node.cpus} < site.cpus = {site.cpus}{tasks}", node.cpus >= cpus),
                (
                    f"memory {node.memory_mb} MB < site.memory_gb = {site.memory_gb}{tasks}",
                    node.memory_mb >= asked.memory_gb * 1024,
                ),
                (f"GPUs {node.gres} < site.gpus = {site.gpus}", _gpus(node.gres, site.gpu_type) >= site.gpus),
                (f"features {node.features} without {site.constraint}", _has_features(node.features, site.constraint)),
            )
            if not enough
        ]
        lacks.update(dict.fromkeys(short))
        if not short:
            able.append(node)
    if len(able) < site.nodes:
        why = f": {'; '.join(lacks)}" if lacks else ""
        found = f"none of {len(nodes)} in {partition} can hold a task{why}"
        if able:
            found = f"{len(able)} of {len(nodes)} in {partition} can hold a task, site.nodes = {site.nodes}{why}"
        return Finding("nodes", "bad", found, "ask for less")
    down = sum(any(word in node.state for word in ("down", "drain", "fail", "maint")) for node in able)
    found = f"{len(able)} of {len(nodes)} in {partition} can hold a task, {down} of them are down or drained"
    stuck = len(able) - down < site.nodes
    return Finding("nodes", "bad" if stuck else "ok", found, "jobs wait until one is back" if stuck else "")


def _as_described(site: SiteConfig, nodes: Sequence[Node]) -> Iterable[Finding]:
    """`node_gpus`, `node_cpus` and `node_memory_gb` beside the nodes, of which any may be meant."""
    told = [key for key in ("node_gpus", "node_cpus", "node_memory_gb") if getattr(site, key)]
    if not told:
        return
    wrong: list[str] = []
    for key, there in (
        ("node_gpus", {_gpus(node.gres, site.gpu_type) for node in nodes}),
        ("node_cpus", {node.cpus for node in nodes}),
    ):
        if key in told and getattr(site, key) not in there:
            wrong.append(f"site.{key} = {getattr(site, key)}, Slurm says {_or(there)}")
    sizes = {round(node.memory_mb / 1024) for node in nodes}
    if site.node_memory_gb and not any(
        (1 - ROOM) * site.node_memory_gb <= size <= (1 + ROOM) * site.node_memory_gb for size in sizes
    ):
        wrong.append(f"site.node_memory_gb = {site.node_memory_gb}, Slurm says {_or(sizes)}")
    advice = "`usage` reckons the price of node-hours by them, `retry --oom` what it may ask for"
    yield Finding(
        "node counts", "off" if wrong else "ok", "; ".join(wrong) or "as Slurm has them", advice if wrong else ""
    )


def _gpu_memory(site: SiteConfig, nodes: Sequence[Node]) -> Iterable[Finding]:
    """`gpu_memory_gb` beside what GPUs of that name have: a task that finds less calls its node bad."""
    if not site.gpu_memory_gb:
        return
    types = {name for node in nodes for name in re.findall(r"gpu:([A-Za-z][^:,(]*):", node.gres)}
    names = {name.lower() for name in ([site.gpu_type] if site.gpu_type else types)}
    known = {size for name in names for size in GPU_MEMORY_GB.get(name.replace("nvidia_", ""), ())}
    if not site.gpus:
        yield Finding(
            "GPU memory", "off", f"site.gpu_memory_gb = {site.gpu_memory_gb}, but site.gpus = 0", "set site.gpus"
        )
    elif known and site.gpu_memory_gb > max(known):
        advice = "every task would call its node broken: set site.gpu_memory_gb to what they have, or to 0"
        found = f"site.gpu_memory_gb = {site.gpu_memory_gb}, {', '.join(sorted(names))} has {_or(known)} GB"
        yield Finding("GPU memory", "bad", found, advice)
    else:
        yield Finding("GPU memory", "ok", f"tasks look for GPUs of {site.gpu_memory_gb} GB")


def scratch(site: SiteConfig) -> Iterable[Finding]:
    """The scratch folder, as this node sees it: on a login node it may have another one or none."""
    if not site.scratch:
        return
    folder = os.environ.get(site.scratch)
    if not folder:
        advice = "well if compute nodes set it; else tasks end with that in one line"
        yield Finding("scratch", "off", f"site.scratch = {site.scratch} is not set here", advice)
    elif not os.access(folder, os.W_OK | os.X_OK):
        advice = "well if it is there on compute nodes; a task that cannot write it calls its node broken"
        yield Finding("scratch", "off", f"site.scratch = {site.scratch}: {folder} cannot be written here", advice)
    else:
        disk = os.statvfs(folder)
        free = f"{disk.f_bavail * disk.f_frsize / GIB:.1f} GiB free here"
        yield Finding("scratch", "ok", f"{Path(folder)}, {free}{', shards are staged' if site.stage_shards else ''}")


def charges(site: SiteConfig) -> Iterable[Finding]:
    """What an hour of a training costs by the site's price."""
    if site.charge_per_gpu_hour:
        price = site.charge_per_gpu_hour * site.gpus * site.nodes
        yield Finding("charge", "ok", f"a training costs {price:g} an hour ({site.gpus * site.nodes} GPUs)")
    elif site.charge_per_node_hour:
        share = node_share(site, site.gpus, site.cpus * site.tasks, site.memory_gb * site.tasks)
        price = site.charge_per_node_hour * share * site.nodes
        yield Finding("charge", "ok", f"a training costs {price:g} an hour ({share * site.nodes:g} nodes)")


def _or(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def _gpus(gres: str, kind: str) -> int:
    """GPUs in sinfo's `gpu:a5000:4(S:0-1),shard:8`."""
    found = re.findall(r"gpu(?::([A-Za-z][^:,(]*))?:(\d+)", gres)
    return sum(int(count) for name, count in found if not kind or name == kind)


def _has_features(features: str, constraint: str) -> bool:
    """Whether a node may meet a constraint; one with more than `&` is left to sbatch."""
    if not constraint or re.search(r"[|\[\]()*!]", constraint):
        return True
    return set(constraint.split("&")) <= set(features.split(","))
