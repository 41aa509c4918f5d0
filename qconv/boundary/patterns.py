"""Regular expressions from outside, matched in time that no pattern can make explode.

Python's own engine tries one way after the other, and for a pattern such as ``(a+)+b`` there are 2^n of them. Here each
part of a pattern is asked once for every place of the text where it may begin, and answers with the set of places where
it may end. That takes at most (parts of the pattern) x (length of the text)^2 steps and gives what ``re`` gives. What
needs a memory of what was matched (back references), and what is rare (look-behind, flags), is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MAX_LENGTH = 1000
"""Characters of a pattern."""
MAX_DEPTH = 20
"""Groups within groups."""
MAX_REPEATS = 100
"""Of a part that is repeated a stated number of times."""

QUICK_REPEATS = 2
"""Repeats behind each other with which Python's engine takes at most the length of the text to the third."""

_CLASS_LETTERS = "dDwWsS"
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}


class PatternError(ValueError):
    """The pattern is malformed, or of a kind that is not matched; says what and where."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression; ``text`` as it was given.

    Attributes:
        quick: The same for Python's engine, where it cannot take long: at most :data:`QUICK_REPEATS`, each of one
            character.
    """

    text: str
    quick: re.Pattern[str] | None
    _root: _Node

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            PatternError: it is malformed, too long, or of a kind that is not matched.
        """
        if len(text) > MAX_LENGTH:
            raise PatternError(f"a pattern of {len(text)} characters; at most {MAX_LENGTH} are read")
        parser = _Parser(text)
        root = parser.pattern()
        try:
            return cls(text, re.compile(text) if parser.is_quick else None, root)
        except re.error as error:
            raise PatternError(error.msg) from error

    def search(self, text: str) -> bool:
        """Whether some part of a text fits, as ``re.search``."""
        if self.quick is not None:
            return self.quick.search(text) is not None
        match = _Match(text)
        return any(match.ends(self._root, start) for start in range(len(text) + 1))

    def match(self, text: str) -> bool:
        """Whether the beginning of a text fits, as ``re.match``."""
        if self.quick is not None:
            return self.quick.match(text) is not None
        return bool(_Match(text).ends(self._root, 0))


@dataclass(frozen=True, eq=False, slots=True)
class _Character:
    """One character that ``fits``."""

    fits: Callable[[str], bool]


@dataclass(frozen=True, eq=False, slots=True)
class _Edge:
    """The beginning or end of a text, or a word's edge: a condition on the place, given as (text, place)."""

    holds: Callable[[str, int], bool]


@dataclass(frozen=True, eq=False, slots=True)
class _Ahead:
    """A condition on what follows."""

    part: _Node
    wanted: bool


@dataclass(frozen=True, eq=False, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Choice:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Repeat:
    """``most`` is None where there is no limit."""

    part: _Node
    least: int
    most: int | None


_Node: TypeAlias = _Character | _Edge | _Ahead | _Sequence | _Choice | _Repeat


class _Match:
    """Places where parts of a pattern end in one text; a set of places is an integer with a bit for each."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.known: dict[tuple[int, int], int] = {}

    def ends(self, node: _Node, start: int) -> int:
        """Where a part that begins at ``start`` may end."""
        key = id(node), start
        if key not in self.known:
            self.known[key] = self._ends(node, start)
        return self.known[key]

    def _ends(self, node: _Node, start: int) -> int:
        match node:
            case _Character(fits):
                return 2 << start if start < len(self.text) and fits(self.text[start]) else 0
            case _Edge(holds):
                return 1 << start if holds(self.text, start) else 0
            case _Ahead(part, wanted):
                return 1 << start if bool(self.ends(part, start)) == wanted else 0
            case _Choice(parts):
                found = 0
                for part in parts:
                    found |= self.ends(part, start)
                return found
            case _Sequence(parts):
                places = 1 << start
                for part in parts:
                    places = self._after(part, places)
                return places
            case _Repeat(part, least, most):
                return self._repeated(part, 1 << start, least, most)

    def _after(self, node: _Node, places: int) -> int:
        """Where a part may end that begins at one of ``places``."""
        found = 0
        while places:
            lowest = places & -places
            found |= self.ends(node, lowest.bit_length() - 1)
            places ^= lowest
        return found

    def _repeated(self, part: _Node, places: int, least: int, most: int | None) -> int:
        for _ in range(least):
            places = self._after(part, places)
        found = fresh = places
        # Without a limit, until no new place is found: each is new once.
        rounds = len(self.text) + 1 if most is None else most - least
        while fresh and rounds:
            fresh = self._after(part, fresh) & ~found
            found |= fresh
            rounds -= 1
        return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.repeats = 0
        self.is_quick = True

    def pattern(self) -> _Node:
        node = self._choice()
        if self.position < len(self.text):
            raise self._error("an unmatched )")
        return node

    def _choice(self) -> _Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Choice(tuple(parts))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.position < len(self.text) and self.text[self.position] not in "|)":
            parts.append(self._repeated())
        return _Sequence(tuple(parts))

    def _repeated(self) -> _Node:
        """An atom and how often it is there."""
        node = self._atom()
        found = self._repeat()
        if found is None:
            return node
        self.repeats += 1
        self.is_quick = self.is_quick and isinstance(node, _Character) and self.repeats <= QUICK_REPEATS
        if isinstance(node, _Edge):
            raise self._error("nothing to repeat")
        # Which of several ends is preferred does not matter to whether there is one.
        self._take("?")
        if self.text[self.position : self.position + 1] == "+" or self._repeat() is not None:
            raise self._error("several repeats in a row")
        return _Repeat(node, *found)

    def _repeat(self) -> tuple[int, int | None] | None:
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if self._take("?"):
            return 0, 1
        counts = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self.text, self.position)
        if counts is None or counts.group() in ("{}", "{,}"):
            return None  # such braces stand for themselves
        self.position = counts.end()
        least = int(counts[1] or 0) if len(counts[1]) < 5 else MAX_REPEATS + 1
        most = least if not counts[2] else None if not counts[3] else int(counts[3][:5])
        if least > MAX_REPEATS or (most is not None and most > MAX_REPEATS):
            raise self._error(f"more than {MAX_REPEATS} repeats")
        if most is not None and most < least:
            raise self._error(f"at least {least} and at most {most} repeats")
        return least, most

    def _atom(self) -> _Node:
        character = self._next()
        match character:
            case "(":
                return self._group()
            case "[":
                return _Character(self._set())
            case ".":
                return _Character(lambda one: one != "\n")
            case "^":
                return _Edge(lambda text, place: place == 0)
            case "$":
                return _Edge(_at_end)
            case "\\":
                return self._escaped()
            case "*" | "+" | "?":
                raise self._error("nothing to repeat")
        return _literal(character)

    def _group(self) -> _Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} groups within each other")
        ahead = None
        if self._take("?"):
            kind = self._next()
            if kind not in ":=!":
                raise self._error(f"(?{kind}, which is not read")
            ahead = None if kind == ":" else kind == "="
        node = self._choice()
        if not self._take(")"):
            raise self._error("a group without )")
        self.depth -= 1
        return node if ahead is None else _Ahead(node, ahead)

    def _escaped(self) -> _Node:
        character = self._next()
        if character in _CLASS_LETTERS:
            return _Character(_class(character))
        match character:
            case "A":
                return _Edge(lambda text, place: place == 0)
            case "Z":
                return _Edge(lambda text, place: place == len(text))
            case "b":
                return _Edge(_at_word)
            case "B":
                return _Edge(lambda text, place: not _at_word(text, place))
        return _literal(self._plain(character))

    def _plain(self, character: str) -> str:
        """The character that an escape stands for."""
        if character in _CONTROL:
            return _CONTROL[character]
        if character.isascii() and character.isalnum():
            raise self._error(f"\\{character}, which is not read")
        return character

    def _set(self) -> Callable[[str], bool]:
        inverted = self._take("^")
        tests: list[Callable[[str], bool]] = []
        while not tests or self.text[self.position : self.position + 1] != "]":
            tests.append(self._member())
        self.position += 1
        return lambda one: any(test(one) for test in tests) != inverted

    def _member(self) -> Callable[[str], bool]:
        """A character of a set, a range of them or a class."""
        first = self._next()
        if first in "[-&~|":
            self.is_quick = False  # sets of sets, which ``re`` warns of
        if first == "\\":
            letter = self._next()
            if letter in _CLASS_LETTERS:
                return _class(letter)
            first = self._plain(letter)
        if self.text[self.position : self.position + 1] != "-" or self.text[self.position + 1 : self.position + 2] in (
            "]",
            "",
        ):
            return lambda one: one == first
        self.position += 1
        last = self._next()
        if last == "\\":
            last = self._plain(self._next())
        if last < first:
            raise self._error(f"a range from {first!r} to {last!r}")
        return lambda one: first <= one <= last

    def _next(self) -> str:
        if self.position == len(self.text):
            raise self._error("it ends too early")
        self.position += 1
        return self.text[self.position - 1]

    def _take(self, character: str) -> bool:
        if self.text[self.position : self.position + 1] != character:
            return False
        self.position += 1
        return True

    def _error(self, what: str) -> PatternError:
        return PatternError(f"{what} (character {self.position})")


def _literal(character: str) -> _Node:
    return _Character(lambda one: one == character)


def _class(letter: str) -> Callable[[str], bool]:
    """``\\d`` and the like, as ``re`` has them; a single character is never slow."""
    compiled = re.compile(f"\\{letter}")
    return lambda one: compiled.match(one) is not None


def _at_end(text: str, place: int) -> bool:
    """``$``: the end, or before a newline that ends the text."""
    return place == len(text) or (place == len(text) - 1 and text[place] == "\n")


def _at_word(text: str, place: int) -> bool:
    is_word = _class("w")
    before = place > 0 and is_word(text[place - 1])
    return before != (place < len(text) and is_word(text[place]))
