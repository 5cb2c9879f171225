"""What a batch script says: the site's words for a request, and the lines around a task.

Submitit writes the script; the lines here come before and after its `srun`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rtshpc.core.config import SiteConfig
from rtshpc.hpc.site import request


def parameters(
    site: SiteConfig, stage: str, folder: Path, dependency: str = "", avoid: Iterable[str] = ()
) -> dict[str, Any]:
    """Parameters of Submitit's Slurm executor for jobs of one stage.

    Args:
        site: where to.
        stage: says what is asked for.
        folder: of the scripts, pickles and logs.
        dependency: as sbatch spells it, e.g. `afterok:12_3`; empty = none.
        avoid: nodes that are not to be used.
    """
    asked = request(site, stage)
    gpus = f"{site.gpu_type}:{asked.gpus}" if site.gpu_type else str(asked.gpus)
    extra: dict[str, Any] = {"no-requeue" if site.requeue == "never" else "requeue": True}
    # Else the others of a training would wait for the one that failed.
    together = ["--kill-on-bad-exit=1"] if asked.nodes * asked.tasks > 1 else []
    if dependency:
        # Without it a job whose dependency failed stays in the queue for ever.
        extra["kill-on-invalid-dep"] = "yes"
    return {
        "job_name": f"rtshpc-{stage}",
        "account": site.account or None,
        "partition": site.partition or None,
        "qos": site.qos or None,
        "constraint": site.constraint or None,
        "wckey": site.wckey or None,
        "exclude": ",".join(avoid) or None,
        "time": asked.minutes,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks,
        "cpus_per_task": asked.cpus,
        "mem": f"{asked.memory_gb}GB",
        "gpus_per_node": gpus if asked.gpus and site.gres == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if asked.gpus and site.gres == "gres" else None,
        "array_parallelism": site.max_jobs,
        "dependency": dependency or None,
        "signal_delay_s": site.warn_seconds,
        "stderr_to_stdout": True,
        # Since Slurm 22.05 a step does not take it over from its job, and would be held to one core.
        "srun_args": [f"--cpus-per-task={asked.cpus}", *together],
        "setup": before(site),
        "teardown": after(folder),
        "additional_parameters": extra,
    }


def before(site: SiteConfig) -> list[str]:
    """Lines before the task."""
    lines = ["trap : TERM USR1 USR2  # the task saves on these; this shell stays to see how it ended"]
    if site.modules:
        lines.append(shlex.join(["module", "load", *site.modules]) + " || exit")
    if site.network_interface:
        name = shlex.quote(site.network_interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    return lines


def after(folder: Path) -> list[str]:
    """Lines after the task, on the host: a task that did not end well is judged, and perhaps queued again."""
    judge = shlex.join([sys.executable, "-m", "rtshpc.hpc.attempt", str(folder)])
    return [
        "code=$?",
        '[ "$code" = 0 ] && exit 0',
        "trap '' TERM USR1 USR2  # what ended the task must not end what judges it",
        f'exec {judge} "$code" "$SECONDS"',
    ]
