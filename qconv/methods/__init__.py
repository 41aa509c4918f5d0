"""Methods: pure functions that choose a weight's values from what its inputs are like.

``awq`` searches scales that are folded into the operation before. Every other module here is a rounding by its own
name (:class:`qconv.core.method.Rounding`): ``gptq`` rounds column by column, each column taking up the errors of those
before it. ``rtn``, which is no module, takes what a grid makes of a weight by itself. ``compensated`` is what roundings
on any grid share: problems, columns, refinement.

Methods know each other as little as files or architectures.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qconv.core.method import Rounding  # which imports torch: names of methods are known without

_SHARED = ("awq", "compensated")
"""The modules that are no roundings."""


def roundings() -> list[str]:
    """The names of all roundings that look at second moments, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def rounding_of(method: Sequence[str] | None) -> str | None:
    """The rounding among a method's steps that looks at second moments: ``gptq`` or another; None for none."""
    return next((step for step in method or () if step not in ("rtn", "awq")), None)


def get_rounding(name: str) -> Rounding:
    """The rounding of that name, one of :func:`roundings`."""
    found: Rounding = importlib.import_module(f"{__name__}.{name}").ROUNDING
    return found


__all__ = ["get_rounding", "rounding_of", "roundings"]
