"""`python -m rtshpc.launch COMMAND`: config -> plan -> jobs -> status, from a login node or a laptop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

import rtshpc
from rtshpc.core.errors import RtshpcError, drop_lost_output, system_sentence
from rtshpc.core.paths import write_alone
from rtshpc.launch.commands.doctor import doctor
from rtshpc.launch.commands.jobs import cancel, logs, retry
from rtshpc.launch.commands.map import map_
from rtshpc.launch.commands.report import allocation, report
from rtshpc.launch.commands.status import status
from rtshpc.launch.commands.sweep import measure, plan, scale, sweep
from rtshpc.launch.commands.tools import assess, check, params, track, weights
from rtshpc.launch.commands.usage import usage

COMMANDS = (
    sweep,
    plan,
    measure,
    scale,
    map_,
    status,
    logs,
    cancel,
    retry,
    usage,
    report,
    allocation,
    track,
    assess,
    check,
    params,
    weights,
    doctor,
)


class _InOrder(click.Group):
    """Lists commands in the order a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS."""
        return [str(command.name) for command in COMMANDS]


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(rtshpc.__version__, prog_name="rtshpc")
def cli() -> None:
    """GeoTIFFs to multimodal thaw-slump detectors: plan and run sweeps, here or on a Slurm cluster.

    Start with `sweep`, which runs the demo; `plan CONFIG` shows what a sweep would do.
    """


for command in COMMANDS:
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a mistake of the user is one line and exit code 2, Ctrl-C is 130."""
    write_alone()
    try:
        answer: Any = cli.main(args=arguments, prog_name="python -m rtshpc.launch", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (RtshpcError, OSError) as error:
        text = system_sentence(error) if isinstance(error, OSError) else str(error)
        click.echo(f"error: {text}", err=True)
        drop_lost_output()
        return 2
    return answer if isinstance(answer, int) else 0


if __name__ == "__main__":
    sys.exit(main())
