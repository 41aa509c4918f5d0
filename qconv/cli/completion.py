"""What a shell offers where an option takes one of our names: recipes, types of GGUF, layouts, suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from qconv.planning.recipe import packaged_recipes

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def among(names: Callable[[], Iterable[str]], *, or_file: bool = False) -> Complete:
    """Complete to one of the names, which are asked for when a shell asks.

    Args:
        names: What there is.
        or_file: Whether the shell shall complete files where no name begins so.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [name for name in names() if name.startswith(incomplete)]
        if or_file and not found:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in found]

    return complete


def formats() -> list[str]:
    """What ``--fmt`` takes."""
    from qconv.formats.gguf.mixture import FILE_TYPES  # imports torch, which only who completes this must wait for

    return [*packaged_recipes(), *(f"gguf:{name}" for name in FILE_TYPES)]


def suites() -> list[str]:
    """The packaged suites."""
    from qconv.evaluation.suites import packaged_names  # as above

    return packaged_names("suites")
