"""Examples at the end of a command's help: lines that a reader can take, each with a command that parses."""

from __future__ import annotations


def examples(*lines: str) -> str:
    """A command's epilog: lines as they are, below a heading."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))
