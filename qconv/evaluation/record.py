"""The record of a run: what was evaluated, with what, what came out, and the verdict. ``run.json`` in the run's folder.

Per-token arrays and completions lie beside it (:mod:`qconv.evaluation.kept_files`). Nothing else that reads runs
(gates, comparison, history, report) knows engines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qconv.boundary.reading import parse_json, read_json
from qconv.errors import ArtifactError
from qconv.folders.ownership import WORK_FOLDER, write_own

RUN_NAME = "run.json"
AGAIN = "Run the evaluation again, into another folder."

Model = TypeVar("Model", bound=BaseModel)
Sha256: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
"""A whole number as qconv writes it. A string of 400 digits would be one of pydantic's, and larger than any float."""
Status: TypeAlias = Literal["pass", "fail", "inconclusive", "not measured"]
Outcome: TypeAlias = Literal["pass", "regression", "inconclusive", "corrupt", "not gated"]

EXIT_CODES: Mapping[Outcome, int] = {"pass": 0, "not gated": 0, "regression": 3, "inconclusive": 4, "corrupt": 5}


class _Values(BaseModel):
    # Infinity and NaN have no place in JSON: they are written as null and read back as NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Artifact(_Values):
    """What was evaluated, or what it was compared with."""

    name: str
    path: Annotated[str, Field(pattern="^[^\\x00]*$")]
    kind: Literal["model", "build", "gguf", "endpoint"]
    sha256: Sha256
    """Of what decides its numbers: weights and config.json; of an endpoint of its address and model name."""
    tokenizer_sha256: Sha256 | None = None
    format: str | None = None
    method: str | None = None
    recipe_sha256: Sha256 | None = None
    bits_per_weight: float | None = None
    """Over all weights."""
    quantized_bits_per_weight: float | None = None
    """Over the quantized ones."""
    size: Count | None = None
    """Bytes of the weights' files."""
    report: dict[str, JsonValue] = {}
    """From the build's own report: coverage of the experts, modules left to plain rounding."""


class Metric(_Values):
    """One number with its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None
    """Ends of the interval of ``confidence``; null where there is none."""
    confidence: float = 0.95
    unit: str = ""
    better: Literal["lower", "higher", "neither"] = "neither"
    units: Count | None = None
    """Documents, windows or problems that it is taken over."""
    note: str | None = None


def _number(value: object) -> object:
    """What JSON holds no number for is written as null."""
    return math.nan if value is None else value


class Item(_Values):
    """What is drawn in resampling, and paired between runs: a document, a window of text, or a problem."""

    name: str
    values: dict[str, Annotated[float, BeforeValidator(_number)]]
    """Sums over the item: ``tokens``, ``bytes``, ``nll``, ``kl`` ... or ``samples`` and ``passed``."""


class FileRef(_Values):
    """A file of the run, under ``files/``; its name is its sha256 and a suffix."""

    name: str
    sha256: Sha256
    size: Count

    @model_validator(mode="after")
    def _named_by_content(self) -> Self:
        if self.name.removeprefix(self.sha256) not in ("", ".json", ".safetensors"):
            raise ValueError(f"{self.name} is not named by its sha256")
        return self


COLUMNS: Mapping[str, str] = {"ppl.ratio": "reference_nll", "kld.mean": "kl", "top1.flips": "flips"}
"""Of metrics that gates are set on, what items must hold of each token besides the build's own likelihood."""


class Task(_Values):
    """One task of the suite, measured."""

    name: str
    kind: str
    """``text`` or ``humaneval``."""
    inputs_sha256: Sha256
    """Of the exact inputs: token ids and windows, or prompts as rendered."""
    source: str
    """The inputs, for people."""
    unit: Literal["document", "window", "problem"]
    settings: dict[str, JsonValue]
    metrics: dict[str, Metric]
    items: tuple[Item, ...]
    reference_items: tuple[Item, ...] = ()
    """The same of the reference, where it is measured apart from the build (problems, not documents)."""
    files: dict[str, FileRef] = {}
    details: dict[str, JsonValue] = {}
    engine: dict[str, str] = {}
    seconds: float = 0.0

    @model_validator(mode="after")
    def _items_have_what_is_judged(self) -> Self:
        for items in (self.items, self.reference_items):
            for item in items:
                self._require(item, items[0])
        columns = {COLUMNS[metric] for metric in self.metrics.keys() & COLUMNS.keys()}
        if self.items and not columns <= self.items[0].values.keys():
            raise ValueError(f"its {self.unit}s lack {', '.join(sorted(columns - self.items[0].values.keys()))}")
        return self

    def _require(self, item: Item, first: Item) -> None:
        """Check that an item has the columns of its kind, as all have, and a number of parts that can be divided by."""
        parts, least = ("samples", {"samples", "passed"}) if self.unit == "problem" else ("tokens", {"tokens", "nll"})
        lacking = sorted((least | first.values.keys()) - item.values.keys())
        if lacking:
            raise ValueError(f"{self.unit} {item.name!r} has no {', '.join(lacking)}")
        if not 0.0 < item.values[parts] < math.inf:
            raise ValueError(f"{self.unit} {item.name!r} has {item.values[parts]} {parts}")


class Unmeasured(_Values):
    """A task of the suite that could not be measured where the run took place; it is neither passed nor failed."""

    name: str
    kind: str
    reason: str
    remedy: str | None = None

    @property
    def sentence(self) -> str:
        """Reason and remedy."""
        return f"{self.reason} {self.remedy}" if self.remedy else self.reason


class Gate(_Values):
    """One gate's outcome."""

    name: str
    against: Literal["limit", "reference", "baseline", "integrity"]
    task: str | None
    metric: str
    status: Status
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    baseline: float | None = None
    noise: float | None = None
    units: Count | None = None
    exceeded: bool = False
    """Whether the estimate is beyond the limit, by chance or not."""
    p_value: float | None = None
    adjusted_p_value: float | None = None
    """By Holm's method over all statistical gates of the run."""
    detectable: float | None = None
    """The least true change beyond the limit that this gate would probably have caught."""
    sentence: str
    reruns: Count = 0


class Verdict(_Values):
    """What the gates come to."""

    outcome: Outcome
    sentence: str

    @property
    def exit_code(self) -> int:
        """Of the process, as documented."""
        return EXIT_CODES[self.outcome]


class Run(_Values):
    """Everything that is known of one evaluation."""

    schema_version: Literal[1] = 1
    qconv: str
    started: str
    """UTC, ISO 8601."""
    seconds: float
    command: tuple[str, ...]
    """What reproduces the run."""
    build: Artifact
    reference: Artifact | None
    build_report: FileRef | None = None
    """The build's own report, where it has one."""
    suite: str
    suite_sha256: Sha256
    engine: dict[str, str]
    reference_engine: dict[str, str] = {}
    versions: dict[str, str]
    device: dict[str, str]
    seed: int
    tasks: tuple[Task, ...]
    unmeasured: tuple[Unmeasured, ...] = ()
    gates: tuple[Gate, ...] = ()
    gates_name: str | None = None
    gates_sha256: Sha256 | None = None
    """Of the gates that judged; null in records of versions before it was kept."""
    build_class: str | None = None
    baseline: str | None = None
    """The baseline's :attr:`digest`."""
    verdict: Verdict

    @property
    def digest(self) -> str:
        """sha256 of what was measured, without time, duration, gates and verdict: equal for equal results."""
        told = {"started", "seconds", "command", "unmeasured"}
        told |= {"gates", "gates_name", "gates_sha256", "build_class", "baseline", "verdict"}
        values = json.loads(self.model_dump_json(exclude=told))  # as it is read again: without infinity and NaN
        for task in values["tasks"]:
            del task["seconds"]
        for artifact in (values["build"], values["reference"]):
            if artifact is not None:
                del artifact["path"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> Self:
        names = [*(task.name for task in self.tasks), *(one.name for one in self.unmeasured)]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have one name")
        return self

    def task(self, name: str) -> Task | None:
        """A task by name."""
        return next((task for task in self.tasks if task.name == name), None)


def write_run(folder: Path, run: Run) -> None:
    """Write ``run.json``, atomically.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_own(folder / RUN_NAME, (run.model_dump_json(indent=1) + "\n").encode())


def folder_of(run: Path) -> Path:
    """A run's folder, given itself or the path of its ``run.json``."""
    return run.parent if run.name == RUN_NAME else run


def read_run(folder: Path) -> Run:
    """A run from its folder (or from the path of its ``run.json``).

    Raises:
        ArtifactError: no run there, not finished, or a record that qconv did not write.
    """
    path = folder_of(folder) / RUN_NAME
    if not path.exists():
        unfinished = (path.parent / WORK_FOLDER).exists()
        hint = "The run is not finished: run its command again." if unfinished else "Give the folder of a run."
        raise ArtifactError(f"{path}: there is none.", hint=hint)
    return _run(read_json(path, ArtifactError, hint=AGAIN), str(path), AGAIN)


def parse_run(text: str, where: str, hint: str) -> Run:
    """A run from its record.

    Raises:
        ArtifactError: it is none that qconv wrote.
    """
    return _run(parse_json(text, where, ArtifactError, hint=hint), where, hint)


def parse_task(text: bytes, where: str, hint: str) -> Task:
    """A task from its part of a record.

    Raises:
        ArtifactError: it is none that qconv wrote.
    """
    return parse_as(Task, parse_json(text, where, ArtifactError, hint=hint), f"{where}: is no task", hint)


def _run(values: object, where: str, hint: str) -> Run:
    return parse_as(Run, values, f"{where}: is no run of this version of qconv", hint)


def parse_as(model: type[Model], values: object, what: str, hint: str) -> Model:
    """Values that qconv wrote, checked.

    Raises:
        ArtifactError: they are others; says ``what`` and names the first wrong key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        raise ArtifactError(f"{what}: {key}: {problem}.", hint=hint) from error
