"""Shell patterns from outside, matched against modules' names in time that no pattern can make explode."""

from __future__ import annotations

import fnmatch
import functools
import re

MAX_LENGTH = 1000
"""Characters of a pattern."""


def names_module(pattern: str, module: str) -> bool:
    """Whether a shell pattern fits a module's full name, or that from one of its dots on.

    ``experts.*.down_proj`` fits ``model.layers.0.mlp.experts.7.down_proj``: a leading ``*.`` is implied, and a ``*``
    spans dots. Takes at most (length of the pattern) x (length of the name) steps.
    """
    return _compiled(pattern).match(f".{module}") is not None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    # The standard library makes each * take the first place where the text up to the next * fits, and never go back.
    return re.compile(fnmatch.translate(f"*.{pattern}"))
