"""`python -m rtshpc.stages STAGE --run-dir RUN --task TASK`: one task by hand or by a job.

`python -m rtshpc.stages allocation|assess|check|params|survey|trace|track|weights ARGUMENTS...` runs a tool that needs more than a
login node has.
Exit codes: 0 done (or done before), 1 failed, 2 a mistake of the user or a missing library, 75 told to stop: what was
done is saved, and the same line goes on from there; 69 this node or its GPU is broken, another one may do it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rtshpc.core.cell import STAGES
from rtshpc.core.errors import RtshpcError, drop_lost_output, system_sentence
from rtshpc.core.paths import write_alone

TOOLS = ("allocation", "assess", "check", "params", "survey", "trace", "track", "weights")
"""Modules of `rtshpc.stages.tools`."""


def main(arguments: Sequence[str]) -> int:
    """Run one stage or tool; errors of the user are one line."""
    write_alone()
    try:
        if arguments and arguments[0] in TOOLS:
            return _tool(arguments[0], arguments[1:])
        given = _parser().parse_args(list(arguments))
        from rtshpc.stages import runner

        return runner.run(given.stage, Path(given.run_dir), given.task)
    except (RtshpcError, OSError) as error:
        text = system_sentence(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        drop_lost_output()
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m rtshpc.stages", description="Run one task of a run.")
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument("--run-dir", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--task", required=True, metavar="TASK", help="cell id, or index in the stage's array")
    return parser


def _tool(name: str, arguments: Sequence[str]) -> int:
    """A tool's own main, or one line when the libraries of the tasks are not installed."""
    try:
        module = importlib.import_module(f"rtshpc.stages.tools.{name}")
    except ModuleNotFoundError as error:
        from rtshpc.stages.runner import missing_library

        raise missing_library(error) from None
    return int(module.main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
