"""Directives that write reference pages from the code: recipe keys, exit codes, formats, methods, grids, suites."""

from __future__ import annotations

import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import click
from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from qconv import errors
from qconv.cli.main import qconv as command_line


def _loaded(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _documented(kind: type[BaseModel]) -> dict[str, str]:
    """What stands under each field, of the class and those that it comes from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith("qconv."):
            said = ModuleAnalyzer.for_module(each.__module__).find_attr_docs()
            found |= {name: " ".join(lines) for (owner, name), lines in said.items() if owner == each.__name__}
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [f"`{shown(value)}`" for value in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [choice for kind in typing.get_args(annotation) for choice in _choices(kind)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _choices(typing.get_args(annotation)[0])
    named = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "null"}
    if annotation in named:
        return [named[annotation]]
    if typing.get_origin(annotation) is tuple:
        return ["a list"]
    return ["a mapping"] if typing.get_origin(annotation) is dict else []


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {getattr(limit, sign)}"
        for limit in field.metadata
        for sign, word in signs.items()
        if hasattr(limit, sign)
    ]
    return ", ".join(found)


def shown(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "`{}`" if value == {} else f"`{shown(value)}`"


def recipe_rows(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, default, what it may be and what it means, of every key of a recipe; a section's keys follow it."""
    said = _documented(kind)
    for name, field in kind.model_fields.items():
        section = _section(field)
        meaning = said.get(name, "")
        if section is not None:
            optional = field.default is None and not field.is_required()
            if optional or meaning:
                yield f"`{prefix}{name}`", "`null`" if optional else "", "a section", meaning
            yield from recipe_rows(section, f"{prefix}{name}.")
            continue
        may = ", ".join([*_choices(field.annotation), *filter(None, [_bounds(field)])])
        yield f"`{prefix}{name}`", _default(field), may, meaning


class _FromCode(SphinxDirective):
    """A directive whose content is Markdown that it writes."""

    optional_arguments = 1

    def markdown(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.markdown())


class RecipeKeys(_FromCode):
    """``recipe-keys``: every key of a recipe's class, given as module:name."""

    required_arguments = 1
    optional_arguments = 0

    def markdown(self) -> str:
        return table(("key", "default", "may be", "meaning"), recipe_rows(_loaded(self.arguments[0])))


class ExitCodes(_FromCode):
    """``exit-codes``: every error that qconv raises on purpose, by its exit code."""

    def markdown(self) -> str:
        kinds = [
            kind
            for kind in vars(errors).values()
            if inspect.isclass(kind) and issubclass(kind, errors.QconvError) and kind is not errors.Interrupted
        ]
        ordered = sorted(kinds, key=lambda kind: kind.exit_code)
        rows = [(str(kind.exit_code), f"`{kind.__name__}`", inspect.getdoc(kind) or "") for kind in ordered]
        return table(("code", "error", "when"), rows)


class Commands(_FromCode):
    """``commands``: every command of the command line with its arguments, options and examples."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(_shown_commands(command_line, "qconv")), allow_section_headings=True)


def _shown_commands(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _shown_commands(found, f"{path} {name}")
        return
    yield f"## {path}\n"
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "") + "\n"
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield table(("option", "does"), ((f"`{record[0]}`", record[1]) for record in records if record))
    lines = (command.epilog or "").split("\n")[2:]
    if lines:
        yield "\n```bash\n" + textwrap.dedent("\n".join(lines)) + "\n```\n"


class Registered(_FromCode):
    """``registered``: what a package knows by name, given the functions that list names and load one."""

    required_arguments = 2
    optional_arguments = 0

    def markdown(self) -> str:
        names, load = map(_loaded, self.arguments)
        rows = []
        for name in names():
            found = load(name)
            module = inspect.getmodule(found if inspect.isclass(found) else type(found))
            rows.append((f"`{name}`", (inspect.getdoc(module) or "").split("\n\n")[0]))
        return table(("name", "what it is"), rows)


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx the directives."""
    app.add_directive("recipe-keys", RecipeKeys)
    app.add_directive("exit-codes", ExitCodes)
    app.add_directive("commands", Commands)
    app.add_directive("registered", Registered)
    return {"parallel_read_safe": True}
