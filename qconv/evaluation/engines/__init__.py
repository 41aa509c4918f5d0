"""Engines by name: what computes a build while it is measured.

======================  ============================================================================================
``local``               qconv's runtime in this process: a checkpoint, a build from its packed weights, GGUF
``stream``              the same, layer by layer, for what is larger than memory; it cannot generate
``llamacpp``            llama.cpp in a process of its own, on GGUF (``pip install 'qconv[llamacpp]'``)
``openai:URL``          an endpoint's ``/completions``; prompts are rendered here
``openai-chat:URL``     an endpoint's ``/chat/completions``; the server renders them
======================  ============================================================================================
"""

from __future__ import annotations

from pathlib import Path

from qconv.errors import UsageError
from qconv.evaluation.engines.base import Engine

ENGINES = ("local", "stream", "llamacpp", "openai:URL", "openai-chat:URL")


def is_endpoint(name: str) -> bool:
    """Whether an engine computes elsewhere, on files that may not be here."""
    return name.startswith(("openai:", "openai-chat:"))


def is_engine(name: str) -> bool:
    """Whether the table above has a name."""
    return name in ("local", "stream", "llamacpp") or (is_endpoint(name) and bool(name.partition(":")[2]))


def open_engine(name: str, path: Path, *, dtype: str, device: str, rows: int, round_inputs: bool = False) -> Engine:
    """An engine; models are loaded when they are first needed.

    Args:
        name: A name of the table above.
        path: What to load.
        dtype: In which arithmetic is done, where the engine has a choice.
        device: On which torch device, where the engine has a choice.
        rows: Sequences or prompts of one batch.
        round_inputs: Whether this process rounds inputs as engines do that compute in FP8, where the build says so.

    Raises:
        UsageError: no such engine.
        EngineError: the engine does not answer.
    """
    # torch and transformers take seconds to import, and an endpoint needs neither.
    if name == "local":
        from qconv.evaluation.engines.local import LocalEngine

        return LocalEngine(path, dtype=dtype, device=device, rows=rows, round_inputs=round_inputs)
    if name == "stream":
        from qconv.evaluation.engines.streamed import StreamEngine

        return StreamEngine(path, dtype=dtype, device=device, rows=rows, round_inputs=round_inputs)
    if name == "llamacpp":
        from qconv.evaluation.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(path, rows=rows)
    if is_endpoint(name):
        from qconv.evaluation.engines.openai import OpenAIEngine

        kind, _, address = name.partition(":")
        return OpenAIEngine(address, chat=kind == "openai-chat", rows=rows)
    raise UsageError(f"--engine: there is no engine {name!r}.", hint=f"Choose one of {', '.join(ENGINES)}.")
