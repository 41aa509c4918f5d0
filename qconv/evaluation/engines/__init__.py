"""Engines by name: what computes a build while it is measured.

==================  ================================================================================================
``local``           transformers in this process, on a checkpoint or a build
==================  ================================================================================================
"""

from __future__ import annotations

from pathlib import Path

from qconv.errors import UsageError
from qconv.evaluation.engines.base import Engine

ENGINES = ("local",)


def open_engine(name: str, path: Path, *, dtype: str, device: str, rows: int) -> Engine:
    """An engine with a model loaded.

    Args:
        name: A name of the table above.
        path: What to load.
        dtype: In which arithmetic is done, where the engine has a choice.
        device: On which torch device, where the engine has a choice.
        rows: Sequences or prompts of one batch.

    Raises:
        UsageError: no such engine.
        EngineError: the engine cannot load the model.
    """
    if name == "local":
        from qconv.evaluation.engines.local import LocalEngine  # torch and transformers take seconds to import

        return LocalEngine(path, dtype=dtype, device=device, rows=rows)
    raise UsageError(f"--engine: there is no engine {name!r}.", hint=f"Choose one of {', '.join(ENGINES)}.")
