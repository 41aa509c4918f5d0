"""Fenced code in what models write: CommonMark's fences, and the ways in which models get them wrong.

A fence may stand behind text on its line, within a list or a quotation, be longer than three, made of tildes, be
followed by text where it closes, or be missing at one end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_RUN = re.compile(r"`+")
_NESTED = re.compile(r"\s*(?:python|py)\w*\b", re.IGNORECASE)
"""What follows a fence within a block where the one before it was never closed."""
_QUOTE = re.compile(r"^(?:[ ]{0,3}>[ ]?)+")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+$")
_SLACK = 3
"""Columns by which a closing fence may be indented more than its block: CommonMark 0.31, section 4.5."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer taken apart.

    Attributes:
        before: What stands before the first fence.
        blocks: The content of each fenced block; the last may lack its end.
    """

    before: str
    blocks: tuple[str, ...]


@dataclass(slots=True)
class _Block:
    character: str
    length: int
    indent: int
    """Columns that each line of the content may have on top of its own."""
    quoted: bool
    lines: list[str] = field(default_factory=list)

    def closing(self, line: str) -> str | None:
        """What follows the fence on a line that closes the block; None on any other."""
        stripped = line.lstrip(" \t")
        rest = stripped.lstrip(self.character)
        long_enough = len(stripped) - len(rest) >= self.length
        if not long_enough or self.character in rest or _columns(line) > self.indent + _SLACK:
            return None
        return rest

    def content(self, *, closed: bool) -> str:
        lines = self.lines if closed else _up_to_fence(self.lines)
        if self.indent and all(not line.strip() or _columns(line) >= self.indent for line in lines):
            lines = [_without_columns(line, self.indent) for line in lines]
        return "".join(f"{line}\n" for line in lines)


def take_apart(answer: str) -> Answer:
    """Find the fenced blocks of an answer."""
    before: list[str] = []
    blocks: list[str] = []
    block: _Block | None = None
    for whole in answer.replace("\r\n", "\n").split("\n"):
        line = whole
        if block is not None:
            line = _QUOTE.sub("", whole) if block.quoted else whole
            rest = block.closing(line)
            if rest is None:
                block.lines.append(line)
                continue
            blocks.append(block.content(closed=True))
            block = None
            if not _NESTED.match(rest):
                continue
        block = _opened(line)
        if block is None and not blocks:
            before.append(line)
        elif block is not None and not blocks:
            before.append(line.rpartition(block.character * block.length)[0])
    if block is not None:
        blocks.append(block.content(closed=False))
    return Answer("\n".join(before), tuple(blocks))


def _opened(line: str) -> _Block | None:
    """The block that a line begins, if it does; code within a line stands between two runs of backticks."""
    quote = _QUOTE.match(line)
    text = line[quote.end() :] if quote else line
    runs = list(_RUN.finditer(text))
    if len(runs) % 2 and len(runs[-1][0]) >= 3:
        before, fence = text[: runs[-1].start()], runs[-1][0]
    else:
        before, _, rest = text.partition("~~~")
        fence = text[len(before) : len(text) - len(rest.lstrip("~"))]
        if not fence or "~" in rest.lstrip("~") or not (_ITEM.match(before) or not before.strip()):
            return None
    indented = _ITEM.match(before) or not before.strip()
    return _Block(fence[0], len(fence), _columns(before, whole=True) if indented else 0, quote is not None)


def _up_to_fence(lines: list[str]) -> list[str]:
    """The lines of a block that was never closed, or not as it must be: up to a line that ends with a fence."""
    for number, line in enumerate(lines):
        text = line.rstrip()
        if text.endswith(("```", "~~~")):
            last = text.rstrip(text[-1])
            return [*lines[:number], *([last] if last.strip() else [])]
    return lines


def _columns(line: str, *, whole: bool = False) -> int:
    """How far a line is indented, or how wide the whole of it is."""
    expanded = line.expandtabs(4)
    return len(expanded) if whole else len(expanded) - len(expanded.lstrip(" "))


def _without_columns(line: str, columns: int) -> str:
    expanded = line[: len(line) - len(line.lstrip(" \t"))].expandtabs(4)
    return expanded[columns:] + line.lstrip(" \t")
