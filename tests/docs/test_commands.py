"""Every command that README, documentation and help name exists, with those options and choices."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qconv.cli.main import qconv
from tests.docs.console import CHECKOUT, PAGES, commands


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that is no group, with its names."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from leaves(found, (*path, name))


LEAVES = dict(leaves(qconv))


def check(line: str) -> None:
    """Parse a line that begins with qconv, without looking at files."""
    words = shlex.split(line, comments=True)[1:]
    for word in ("|", ">", "&&", ";"):
        words = words[: words.index(word)] if word in words else words
    if words in (["--version"], ["--help"]):
        return
    path = next((path for path in LEAVES if tuple(words[: len(path)]) == path), None)
    assert path is not None, f"there is no such command: {line}"
    command = LEAVES[path]
    context = click.Context(command)
    values, left, order = command.make_parser(context).parse_args(list(words[len(path) :]))
    assert left == [], line
    for parameter in {*order}:
        found = values.get(parameter.name or "")
        given = found if isinstance(found, list | tuple) else [found]
        if isinstance(parameter.type, click.Choice):
            for value in given:
                parameter.type.convert(value, parameter, context)


def lines(page: Path) -> list[str]:
    typed = [command.text for command in commands(page.read_text())]
    return [line for line in typed if line.split()[:1] == ["qconv"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_commands_of_a_page_parse(page: Path) -> None:
    for line in lines(page):
        check(line)


def test_pages_hold_commands() -> None:
    assert sum(len(lines(page)) for page in PAGES) > 40


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_each_command_has_examples_that_parse(path: tuple[str, ...]) -> None:
    shown = re.findall(r"\bqconv .*", LEAVES[path].epilog or "")
    assert any(line.split()[1 : 1 + len(path)] == list(path) for line in shown), path
    for line in shown:
        check(line)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("qconv quantize MODEL --frmt awq -o OUT", click.NoSuchOption),
        ("qconv check BUILD --engine vlm", click.BadParameter),
        ("qconv quantise MODEL", AssertionError),
    ],
)
def test_what_does_not_exist_is_found(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check(line)
