"""How a run goes about its work: the options of every command that reads a whole model, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from qconv.cli.numbers import THREADS
from qconv.cli.options import devices_option, disk_budget_option, executor_option, json_option
from qconv.cli.progress import reporting

Function = TypeVar("Function", bound=Callable[..., Any])

restart_option = click.option("--restart", is_flag=True, help="Discard what the folder holds, if qconv made all of it.")


def running_options(at_once: str) -> Callable[[Function], Function]:
    """Those of :class:`Running` but ``--restart``.

    Args:
        at_once: What threads work on.
    """

    def decorate(function: Function) -> Function:
        help = f"{at_once} worked on at once; the bytes do not depend on it."
        threads_option = click.option("--threads", type=THREADS, help=help)
        for option in (json_option, devices_option, executor_option, disk_budget_option, threads_option):
            function = option(function)
        return function

    return decorate


@dataclass(frozen=True, slots=True)
class Running:
    """The options as given."""

    restart: bool
    threads: int | None
    disk_budget: int | None
    executor: str
    devices: str
    as_json: bool

    @classmethod
    def taken(cls, options: dict[str, Any]) -> Running:
        """Taken out of a command's options."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    @contextmanager
    def reading(self, model: str, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The model's folder, and what a pipeline of :mod:`qconv.building` is told of its work; progress is shown.

        Args:
            model: A folder or a Hub id.
            out: The folder that the run writes.

        Raises:
            UsageError, CheckpointError, OutputError: as :func:`qconv.checkpoint.hub.model_folder`.
        """
        with reporting(quiet=self.as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
            reporter.log(f"{model}: reading")
            from qconv.checkpoint.hub import model_folder

            with model_folder(model, self.disk_budget, reporter.log) as folder:
                work = {"restart": self.restart, "threads": self.threads, "executor": self.executor}
                yield folder, {**work, "devices": self.devices, "progress": reporter.progress, "log": reporter.log}
