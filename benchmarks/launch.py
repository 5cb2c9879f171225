"""Submitting a sweep to Slurm: seconds and calls of sbatch, as arrays, one Submitit job a cell, and by Hydra.

Brings up the four-node cluster of the tests (root on Debian with Slurm's packages) with its partitions closed, so
that jobs are accepted and none starts. Ours is the whole command: planning, the run folder with every cell's config, and
the submission with its dependencies. The other sides only submit: the same task, pickled, without a dependency.
Hydra's launcher waits for its jobs, so its clock stops when the last is in the queue; it is left out where the package
hydra-submitit-launcher is not installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import conclude, options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.lab import Lab, missing, wait_for  # noqa: E402

PER_SEED = 8
"""Cells of one seed of the sweep: four trained fusions and their evaluations."""

TARGET = 20.0
LIMIT_SECONDS = 10.0

COUNTING = """#!/bin/sh
echo x >> {calls}
exec {sbatch} "$@"
"""

HYDRA = """
import sys
import hydra
from rtshpc.hpc.executor import become

@hydra.main(version_base=None)
def main(config):
    become("finetune", sys.argv[1], str(config.cell))

main()
"""


class Bench:
    """A closed cluster, and what is submitted to it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.calls = folder / "calls"
        sbatch = lab("sh", "-c", "command -v sbatch").strip()
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "sbatch").write_text(COUNTING.format(calls=self.calls, sbatch=sbatch))
        (folder / "bin" / "sbatch").chmod(0o755)
        self.environment = lab.environment | {"PYTHONPATH": str(ROOT)}
        self.environment["PATH"] = f"{folder / 'bin'}:{self.environment['PATH']}"
        for partition in ("a5000", "a100", "low"):
            lab("scontrol", "update", f"PartitionName={partition}", "State=DOWN")

    def measure(self, side: Callable[[int, Path], None], cells: int) -> dict[str, Any]:
        """Seconds, calls of sbatch and jobs in the queue of one side."""
        self.calls.write_text("")
        place = self.folder / f"{side.__name__}-{cells}"
        place.mkdir()
        began = time.monotonic()
        side(cells, place)
        seconds = time.monotonic() - began
        facts = {"cells": cells, "seconds": seconds, "sbatch": len(self.calls.read_text().split())}
        facts["jobs"] = len(self.lab.queue())
        self.lab("scancel", "--user=root", "--full")
        self.lab.wait_until_empty(120)
        return facts

    def arrays(self, cells: int, place: Path) -> None:
        """The launcher."""
        seeds = max(1, round((cells - 9) / PER_SEED))
        line = [sys.executable, "-m", "rtshpc.launch", "sweep", "demo", "--site", "lab", "--runs", str(place)]
        line += ["--set", f"grid.seed={list(range(seeds))}"]
        subprocess.run(line, cwd=ROOT, env=self.environment, check=True, capture_output=True)

    def job_per_cell(self, cells: int, place: Path) -> None:
        """Submitit, called once a cell."""
        code = (
            "import sys, submitit; from rtshpc.hpc.executor import become\n"
            "executor = submitit.AutoExecutor(folder=sys.argv[1], cluster='slurm')\n"
            "executor.update_parameters(timeout_min=10, mem_gb=3, cpus_per_task=1, slurm_partition='a5000')\n"
            "for cell in range(int(sys.argv[2])): executor.submit(become, 'finetune', sys.argv[1], str(cell))\n"
        )
        line = [sys.executable, "-c", code, str(place), str(cells)]
        subprocess.run(line, cwd=ROOT, env=self.environment, check=True, capture_output=True)

    def hydra(self, cells: int, place: Path) -> None:
        """Hydra's launcher, a grid of `cells` values."""
        (place / "app.py").write_text(HYDRA)
        line = [sys.executable, str(place / "app.py"), "--multirun", "hydra/launcher=submitit_slurm"]
        line += ["hydra.launcher.partition=a5000", "hydra.launcher.mem_gb=3", f"+cell=range({cells})"]
        process = subprocess.Popen(
            line, cwd=place, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for("Hydra has submitted", lambda: len(self.lab.queue()) == cells or process.poll() is not None, 600)
            assert process.poll() is None, "Hydra ended before its jobs"
        finally:
            process.kill()
            process.wait()


def measure(counts: list[int]) -> dict[str, Any]:
    """All sides at all counts."""
    has_hydra = any(importlib.metadata.distributions(name="hydra-submitit-launcher"))
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name) / "lab")
        try:
            lab.up()
            bench = Bench(lab, Path(name) / "bench")
            sides = [bench.arrays, bench.job_per_cell, *([bench.hydra] if has_hydra else [])]
            found = {side.__name__: [bench.measure(side, count) for count in counts] for side in sides}
        finally:
            lab.down()
    last = {name: rows[-1] for name, rows in found.items()}
    ratios = {
        f"{name} / arrays": last[name]["seconds"] / last["arrays"]["seconds"] for name in found if name != "arrays"
    }
    return {
        "benchmark": "launch",
        "sides": found,
        "hydra": "measured" if has_hydra else "hydra-submitit-launcher is not installed",
        "ratios": ratios,
        "targets": {"job_per_cell / arrays": TARGET} if counts[-1] >= 1000 else {},
        "met": {"arrays in 10 s": last["arrays"]["seconds"] < LIMIT_SECONDS},
    }


def main() -> int:
    """Measure, print, and say whether the targets are met."""
    parser = options(__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=[10, 100, 1000], help="default 10 100 1000")
    given = parser.parse_args()
    if lacking := missing():
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report = measure(given.cells)
    lines = [
        f"{name:13} {row['cells']:5} cells: {row['seconds']:7.2f} s, {row['sbatch']:4} calls of sbatch, {row['jobs']} jobs"
        for name, rows in report["sides"].items()
        for row in rows
    ]
    return conclude(report, [*lines, f"hydra: {report['hydra']}"], given.json)


if __name__ == "__main__":
    sys.exit(main())
