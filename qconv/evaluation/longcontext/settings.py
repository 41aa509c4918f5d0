"""What a suite says of the task ``longcontext``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qconv.evaluation.suites import Count, FolderName, Line, Section, TextSettings

LONGEST = 1 << 18
"""Tokens of the longest window: 256K, the native context of Qwen3-Coder."""


class LongContextSettings(Section):
    """Windows of a long text, every token of them scored."""

    kind: Literal["longcontext"]
    name: FolderName
    corpus: Line = "python-stdlib"
    """As of a text task; documents follow each other until a window is full."""
    context: Annotated[Count, Field(ge=512, le=LONGEST)] = 32768
    """Tokens of a window; at most the reference's own context is used."""
    windows: Annotated[Count, Field(ge=2, le=10_000)] = 12

    def text(self, context: int) -> TextSettings:
        """The text with windows of ``context`` tokens, as a text task asks for it."""
        return TextSettings(
            kind="text",
            name=self.name,
            corpus=self.corpus,
            rule="positions",
            context=context,
            stride=1,
            tokens=self.windows * (context - 1),
        )
