"""Suites: which tasks are measured, on how much of what, and which gates judge them. YAML in, errors that name the key.

Packaged suites and gates lie in ``evals/suites`` and ``evals/gates``; a suite may also be any file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qconv.errors import UsageError
from qconv.evaluation.windows import Rule

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Settings of a suite: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSettings(Section):
    """A text task: perplexity and, beside a reference, divergence. See :mod:`qconv.evaluation.windows` for rules."""

    kind: Literal["text"]
    name: Annotated[str, Field(min_length=1)]
    corpus: str = "python-stdlib"
    """``python-stdlib``, ``text:PATH``, ``jsonl:PATH[:FIELD]``, ``hf:DATASET[:CONFIG][:SPLIT][:FIELD]``."""
    rule: Rule = "documents"
    context: Annotated[int, Field(ge=16)] = 512
    stride: Annotated[int, Field(ge=1)] = 256
    """For ``documents``."""
    tokens: Annotated[int, Field(ge=1)] = 16384
    """At least so many are scored, if the corpus has them."""
    document_tokens: Annotated[int, Field(ge=16)] | None = None
    """The most tokens of one document, for ``documents``; null: all of them."""

    @model_validator(mode="after")
    def _stride_within_context(self) -> TextSettings:
        if self.stride >= self.context:
            raise ValueError(f"stride {self.stride} must be less than context {self.context}")
        return self


class NoiseSettings(Section):
    """The noise floor: the reference against itself, in ``dtype``, with ``rows`` instead of the engine's rows."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    rows: Annotated[int, Field(ge=1)] = 3
    tokens: Annotated[int, Field(ge=1)] = 4096


class EngineSettings(Section):
    """How models are computed."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a processor, bfloat16 on a GPU."""
    rows: Annotated[int, Field(ge=1)] = 8
    """Sequences or prompts of one batch; part of what is pinned."""


class Suite(Section):
    """A suite as written."""

    seed: Annotated[int, Field(ge=0)] = 0
    engine: EngineSettings = EngineSettings()
    noise: NoiseSettings | None = NoiseSettings()
    gates: str = "default"
    """Name of packaged gates, or a file's path."""
    tasks: Annotated[tuple[dict[str, JsonValue], ...], Field(min_length=1)]
    """Each with its ``kind`` and ``name``; the rest is checked by the kind (:mod:`qconv.evaluation.tasks`)."""

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> Suite:
        names = [task.get("name") for task in self.tasks]
        if any(not isinstance(name, str) or names.count(name) > 1 for name in names):
            raise ValueError("every task needs a name of its own")
        return self

    def digest(self) -> str:
        """sha256 of the suite's canonical JSON, hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def packaged_folder(kind: Literal["suites", "gates"]) -> Path:
    """Where packaged suites or gates lie: inside the wheel, or in the checkout in an editable install."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "evals" / kind
    return packaged if packaged.is_dir() else package.parent / "evals" / kind


def packaged_names(kind: Literal["suites", "gates"]) -> list[str]:
    """Names of the packaged suites or gates, sorted."""
    return sorted(path.stem for path in packaged_folder(kind).glob("*.yaml"))


def load_suite(source: str) -> Suite:
    """A suite by packaged name or file path.

    Raises:
        UsageError: no such suite, not YAML, an unknown key, a value out of range; names file and key.
    """
    return load_settings(Suite, "suites", source)


def load_settings(model: type[Model], kind: Literal["suites", "gates"], source: str) -> Model:
    """Settings by packaged name or file path.

    Raises:
        UsageError: as :func:`load_suite`.
    """
    names = packaged_names(kind)
    path = packaged_folder(kind) / f"{source}.yaml" if source in names else Path(source)
    what = kind.removesuffix("s")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {what} {source!r}: {error.strerror if isinstance(error, OSError) else error}.",
            hint=f"Give a YAML file or one of: {', '.join(names)}.",
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {error}.") from error
    return parse_settings(model, values, f"{what} {path.name}")


def parse_settings(model: type[Model], values: Any, where: str) -> Model:
    """Check settings.

    Raises:
        UsageError: names every wrong key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'it'}: "
            + ("unknown key" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, "))
            for one in error.errors()
        ]
        raise UsageError(f"{where}: {'; '.join(problems)}.", hint="See README.md, Evals.") from error
