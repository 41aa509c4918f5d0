"""``qconv eval``: the group; each of its commands is the module ``eval_NAME`` beside this one."""

from __future__ import annotations

import importlib

import click

COMMANDS = ("reference", "templates", "run", "compare", "gate", "report", "history", "blame")
"""In the order of use."""


class _Commands(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"qconv.cli.eval_{cmd_name}").command
        return found


@click.group(cls=_Commands, short_help="Measure builds and judge them.")
def command() -> None:
    """Measure how far builds are from their reference, and whether a build is worse than the last."""
