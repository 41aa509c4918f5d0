"""Forms of model families in GGUF: one short declarative file a family; the file's name is the config's ``model_type``.

``base`` says what a form declares. A family without a file here has no GGUF.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from qconv.boundary.printable import name_of
from qconv.errors import UsageError
from qconv.formats.gguf.forms.base import Form

_SHARED = ("base", "chunked", "delta", "latent")


def families() -> list[str]:
    """The ``model_type`` of every family that has a form, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


@cache
def form(family: str) -> Form:
    """The form of a family.

    Raises:
        UsageError: it has none.
    """
    if family not in families():
        raise UsageError(
            f"family {name_of(family)} has no GGUF form in qconv.",
            hint=f"GGUF is written for {', '.join(families())}.",
        )
    declared: Form = importlib.import_module(f"{__name__}.{family}").FORM
    return declared


__all__ = ["Form", "families", "form"]
