"""Quantize very large mixture-of-experts language models layer by layer, in bounded memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qconv.registration import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qconv.runtime.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """``qconv.load`` is imported when it is asked for: ``import qconv`` alone needs no torch."""
    if name == "load":
        # Not an import statement: every module here imports the package, which must not be seen to import them.
        return importlib.import_module("qconv.runtime.loading").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_with_transformers()
