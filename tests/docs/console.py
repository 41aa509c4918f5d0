"""Blocks of commands in Markdown: what is typed after a prompt, and what is then to be seen."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PAGES = (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"^([ ]*)```console\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it is typed, with the lines that stand below it."""

    text: str
    shown: tuple[str, ...]


def commands(page: str) -> Iterator[Command]:
    """The commands of a page, in order."""
    for block in _BLOCK.finditer(page):
        text: str | None = None
        shown: list[str] = []
        for line in textwrap.dedent(block[2]).splitlines():
            if line.startswith("$ "):
                if text is not None:
                    yield Command(text, tuple(shown))
                text, shown = line[2:], []
            elif text is not None:
                shown.append(line)
        if text is not None:
            yield Command(text, tuple(shown))


def is_shown(shown: tuple[str, ...], printed: str) -> bool:
    """Whether a command printed what a page shows of it; ``...`` stands for anything, also for any number of lines."""
    if not shown:
        return True
    pattern = ""
    for line in shown:
        pattern += r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(re.escape("..."), ".*") + r"[ ]*\n"
    return re.fullmatch(pattern, printed if printed.endswith("\n") or not printed else printed + "\n") is not None
