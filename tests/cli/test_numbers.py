"""Options that are no usable numbers or no text end with exit code 2 and the option's name, on every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

from qconv.cli.main import COMMANDS, qconv
from qconv.cli.numbers import SEED, FiniteRange, Temperature

HUGE = "99999999999999999999999"  # more than 64 bits


def numeric_options() -> list[tuple[list[str], click.Option]]:
    """Every option of every command that takes a number, found and not listed."""
    context = click.Context(qconv)
    found = []
    for name in COMMANDS:
        command = qconv.get_command(context, name)
        assert command is not None
        commands = {name: command}
        if isinstance(command, click.Group):
            commands = {f"{name} {inner}": one for inner, one in command.commands.items()}
        for words, one in commands.items():
            for option in one.params:
                if isinstance(option, click.Option) and isinstance(
                    option.type, (click.types.IntParamType, click.types.FloatParamType)
                ):
                    found.append((words.split(), option))
    return found


NUMBERS = numeric_options()


def test_the_options_are_found() -> None:
    assert len(NUMBERS) > 20


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", HUGE, "1e400", ""])
@pytest.mark.parametrize(
    ("words", "option"), NUMBERS, ids=lambda one: " ".join(one) if isinstance(one, list) else one.name
)
def test_no_number_is_nan_infinite_or_beyond_64_bits(words: list[str], option: click.Option, value: str) -> None:
    with pytest.raises(click.BadParameter):
        option.type.convert(value, option, None)


@pytest.mark.parametrize("value", ["1e-300", "0.0009", "101", "-1"])
def test_a_temperature_is_greedy_or_one_that_divides_logits(value: str) -> None:
    with pytest.raises(click.BadParameter):
        Temperature().convert(value, None, None)
    assert [Temperature().convert(one, None, None) for one in ("0", "0.001", "0.7")] == [0.0, 0.001, 0.7]


def test_what_is_in_range_is_taken() -> None:
    assert SEED.convert(2**63 - 1, None, None) == 2**63 - 1
    assert FiniteRange(min=0.5).convert("0.5", None, None) == 0.5


@pytest.mark.parametrize(
    "command", [["plan", "m", "--fmt"], ["generate", "m", "--prompt"], ["eval", "history", "h", "--name"]]
)
def test_an_argument_that_is_not_utf8_is_refused(command: list[str]) -> None:
    given = [os.fsencode(one) for one in (sys.executable, "-m", "qconv", *command)] + [b"a\xff"]
    done = subprocess.run([*given, b"--json"], capture_output=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == "a\\udcff: an argument that is not UTF-8."
    assert b"Traceback" not in done.stderr


def test_standard_input_that_is_not_utf8_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qconv", "generate", "m"], input=b"\xff", capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"standard input is not UTF-8" in done.stderr
