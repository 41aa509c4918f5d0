"""Suites: which tasks are measured, on how much of what, and which gates judge them. YAML in, errors that name the key.

Packaged suites and gates lie in ``evals/suites`` and ``evals/gates``; a suite may also be any file.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qconv.boundary.reading import read_yaml
from qconv.errors import UsageError
from qconv.evaluation.windows import Rule

Model = TypeVar("Model", bound=BaseModel)

MAX_NAME_BYTES = 200
"""Of a task's or build's name: a file system's limit of 255 less what folders are called around it."""
_PROBLEMS = 5
"""So many wrong keys of a file are named."""


def _folder_name(value: str) -> str:
    """Tasks and builds have folders of their names, so that a name must not lead anywhere else."""
    if not value or value != value.strip() or not value.isprintable() or value[0] == "." or set(value) & set("/\\"):
        raise ValueError("a name is one line that neither begins with a dot nor holds a slash, for it names a folder")
    if len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a name has at most {MAX_NAME_BYTES} bytes, for it names a folder")
    return value


def _line(value: str) -> str:
    if any(unicodedata.category(one) in ("Cc", "Cs") for one in value):
        raise ValueError("holds control characters")
    return value


FolderName: TypeAlias = Annotated[str, AfterValidator(_folder_name)]
"""A name that is also a folder's."""
Line: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_line)]
"""A path or another name, without control characters."""
Count: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=10**12)]
Rows: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=1 << 16)]
Seed: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]


def shared_names(names: Iterable[str]) -> list[str]:
    """Names that some file system takes for one that came before: by case, or by how accents are written."""
    seen: set[str] = set()
    found = []
    for name in names:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        found += [name] if folded in seen else []
        seen.add(folded)
    return found


class Section(BaseModel):
    """Settings of a suite: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSettings(Section):
    """A text task: perplexity and, beside a reference, divergence. See :mod:`qconv.evaluation.windows` for rules."""

    kind: Literal["text"]
    name: FolderName
    corpus: Line = "python-stdlib"
    """``python-stdlib``, ``text:PATH``, ``jsonl:PATH[:FIELD]``, ``hf:DATASET[:CONFIG][:SPLIT][:FIELD]``."""
    rule: Rule = "documents"
    context: Annotated[Count, Field(ge=16)] = 512
    stride: Count = 256
    """For ``documents``."""
    tokens: Count = 16384
    """At least so many are scored, if the corpus has them."""
    document_tokens: Annotated[Count, Field(ge=16)] | None = None
    """The most tokens of one document, for ``documents``; null: all of them."""

    @model_validator(mode="after")
    def _stride_within_context(self) -> TextSettings:
        if self.stride >= self.context:
            raise ValueError(f"stride {self.stride} must be less than context {self.context}")
        return self


class NoiseSettings(Section):
    """The noise floor: the reference against itself, in ``dtype``, with ``rows`` instead of the engine's rows."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    rows: Rows = 3
    tokens: Count = 4096


class EngineSettings(Section):
    """How models are computed."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a processor, bfloat16 on a GPU."""
    rows: Rows = 8
    """Sequences or prompts of one batch; part of what is pinned."""


class Suite(Section):
    """A suite as written."""

    seed: Seed = 0
    engine: EngineSettings = EngineSettings()
    noise: NoiseSettings | None = NoiseSettings()
    gates: Line = "default"
    """Name of packaged gates, or a file's path, relative to the suite's own file (:func:`gates_of`)."""
    tasks: Annotated[tuple[dict[str, JsonValue], ...], Field(min_length=1)]
    """Each with its ``kind`` and ``name``; the rest is checked by the kind (:mod:`qconv.evaluation.tasks`)."""

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> Suite:
        names = [name for task in self.tasks if isinstance(name := task.get("name"), str)]
        if len(names) < len(self.tasks) or shared_names(names):
            raise ValueError("every task needs a name of its own")
        for name in names:
            _folder_name(name)
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


def load_suite(source: str, beside: Path | None = None) -> Suite:
    """A suite by packaged name or file path.

    Args:
        source: The name or path.
        beside: The folder that a path is relative to; None for the working directory.

    Raises:
        UsageError: no such suite, not YAML, an unknown key, a value out of range; names file and key.
    """
    return load_settings(Suite, "suites", source, beside)


def gates_of(suite: Suite, source: str, beside: Path | None = None) -> str:
    """The gates of a suite that was loaded from ``source``: a packaged name, or a path that holds from here."""
    if suite.gates in packaged_names("gates"):
        return suite.gates
    return str(settings_path("suites", source, beside).parent / suite.gates)


def settings_path(kind: Literal["suites", "gates"], source: str, beside: Path | None = None) -> Path:
    """The file that a packaged name or a path means."""
    if source in packaged_names(kind):
        return packaged_folder(kind) / f"{source}.yaml"
    return Path(source) if beside is None else beside / source


def load_settings(
    model: type[Model], kind: Literal["suites", "gates"], source: str, beside: Path | None = None
) -> Model:
    """Settings by packaged name or file path.

    Raises:
        UsageError: as :func:`load_suite`.
    """
    path = settings_path(kind, source, beside)
    hint = f"Give a YAML file or one of: {', '.join(packaged_names(kind))}."
    return parse_settings(model, read_yaml(path, UsageError, hint=hint), f"{kind.removesuffix('s')} {path.name}")


def parse_settings(model: type[Model], values: Any, where: str) -> Model:
    """Check settings.

    Raises:
        UsageError: names the wrong keys.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'it'}: "
            + ("unknown key" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, "))
            for one in error.errors(include_url=False, include_input=False)
        ]
        more = f" and {len(problems) - _PROBLEMS} more" if len(problems) > _PROBLEMS else ""
        raise UsageError(
            f"{where}: {'; '.join(problems[:_PROBLEMS])}{more}.", hint="See docs/concepts/gates.md."
        ) from error
