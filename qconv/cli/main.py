"""The command group, and what becomes of every error: the only way out of the process."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from qconv import __version__
from qconv.boundary.printable import printable
from qconv.cli.console import ReaderGone, print_error
from qconv.cli.signals import Interrupts
from qconv.errors import OutputError, QconvError, ResourceError, UsageError
from qconv.heap import settle_allocation

COMMANDS = (
    *("plan", "quantize", "collect", "imatrix", "sensitivity", "inspect", "verify", "convert", "check"),
    *("generate", "eval", "nightly", "bench"),
)
"""In the order of use. A command is the attribute ``command`` of the module of its name in qconv.cli."""

_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory")


class CommandLine(click.Group):
    """A group whose commands are imported when they are asked for, and whose errors end the process as documented."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qconv.cli.{cmd_name}").command
        return command

    def main(  # type: ignore[override]  # click's overloads tell apart modes that are not offered here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, and exit with the code of the outcome."""
        arguments = list(sys.argv[1:] if args is None else args)
        interrupts = Interrupts()
        with interrupts.installed():
            code = self._exit_code(arguments, prog_name, interrupts, extra)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # what cannot be written was told; a captured stream may be closed
            _drop_output()
        sys.exit(code)

    def _exit_code(
        self, arguments: list[str], prog_name: str | None, interrupts: Interrupts, extra: dict[str, Any]
    ) -> int:
        try:
            try:
                _require_unicode(arguments)
                code = super().main(arguments, prog_name, **extra, standalone_mode=False, obj=interrupts)
                sys.stdout.flush()
            except Exception as error:
                if isinstance(error, click.exceptions.NoArgsIsHelpError):
                    click.echo(error.format_message(), err=True)
                    return UsageError.exit_code
                known = as_qconv_error(error)
                if known is None:
                    raise
                print_error(known, as_json="--json" in arguments)
                return known.exit_code
        except (ReaderGone, BrokenPipeError):
            # That is no error.
            _drop_output()
            return 128 + signal.SIGPIPE
        except Exception:
            traceback.print_exc()
            return 1
        return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """Let what was printed and not written go nowhere, or the interpreter fails to write it at exit, with code 120."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_unicode(arguments: Sequence[str]) -> None:
    """Check that every argument is UTF-8: names go into reports, checksum lists and databases.

    Raises:
        UsageError: one is not.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{printable(argument)}: an argument that is not UTF-8.",
                hint="Rename the file or folder, or give a link to it.",
            ) from None


def as_qconv_error(error: Exception) -> QconvError | None:
    """What went wrong, as one of our errors; None for a reader that is gone and for bugs."""
    if isinstance(error, QconvError):
        return error
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = None if context is None else f"Try '{context.command_path} --help'."
        return UsageError(error.format_message(), hint=hint)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)
    ):
        return ResourceError(
            "out of memory.", hint="Free some, or ask for fewer calibration tokens; the same command continues."
        )
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = "" if error.filename is None else f"{error.filename}: "
        hint = "Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return OutputError(f"{where}{error.strerror or error}.", hint=hint)
    return None


@click.group(
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 regression, 4 inconclusive, 5 corrupt or stale artifact, "
    "6 sandbox unavailable, 130 and 143 interrupted.",
)
@click.version_option(__version__, prog_name="qconv")
def qconv() -> None:
    """Quantize very large mixture-of-experts language models, layer by layer, in bounded memory."""


def main() -> NoReturn:
    """The console script ``qconv``."""
    settle_allocation()
    # Its advice on kernels and configs would stand before our own words; who wants it sets the variable.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    qconv.main(prog_name="qconv")
