"""The one place that makes text from outside safe to show: names of files, tensors and models, keys, answers.

Whoever chose a name must not choose what the reader's terminal or page does. Characters that act instead of showing
(escapes that move the cursor or set a title, line ends, marks that turn the direction of writing) appear as the escapes
by which Python would write them.
"""

from __future__ import annotations

import re
import unicodedata

MAX_NAME = 200
"""Characters of a name in a message; tensor names have 60."""

_ACTING = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode's categories of control and format characters, halves of surrogate pairs, private use and line ends."""
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#!|~&$]|@(?=[\w-]+\.)|^[-+=]|(?<=\bwww)\.|:(?=//)")
"""What acts anywhere in a line, at its start, or in an address."""
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


def printable(text: str, *, keep: str = "") -> str:
    """The text in one line, with every acting character but those in ``keep`` as an escape.

    A zero-width joiner (U+200D), which emoji and several scripts need, stays.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep or not _acts(one) else _escaped(one) for one in text)


def name_of(text: str, most: int = MAX_NAME) -> str:
    """A name for a message: printable, and cut in its middle where it is longer than ``most`` characters."""
    shown = printable(text)
    if len(shown) <= most:
        return shown
    half = (most - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def markdown_text(text: str) -> str:
    """The text for a line of Markdown: printable, and with nothing that Markdown or HTML would take as markup."""
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", printable(text)))


def markdown_code(text: str) -> str:
    """The text, printable, as code within a line of Markdown, whatever backticks it holds."""
    shown = printable(text)
    ticks = _fence(shown, 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def markdown_block(text: str, language: str) -> str:
    """The lines as a block of code, whatever backticks they hold."""
    ticks = _fence(text, 3)
    return f"{ticks}{language}\n{printable(text, keep=chr(10))}{ticks}"


def _fence(text: str, least: int) -> str:
    """More backticks in a row than any in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def one_line(error: BaseException) -> str:
    """What a library said, for a message of ours: its beginning, in one line, without the last full stop."""
    return printable(" ".join(str(error).split()))[:300].rstrip(".")


def well_formed(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which has no UTF-8 form."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _acts(character: str) -> bool:
    return character != "\u200d" and unicodedata.category(character) in _ACTING


def _escaped(character: str) -> str:
    code = ord(character)
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    if short is not None:
        return short
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
