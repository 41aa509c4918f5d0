"""The task ``text``: perplexity of a build, and beside a reference its divergence, token by token."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.checkpoint.config import Config, language_part
from qconv.checkpoint.reader import read_json
from qconv.errors import ArtifactError
from qconv.evaluation.cache import Entry
from qconv.evaluation.divergence import Floats32, Reference, TokenScores, negative_log_likelihood, token_scores
from qconv.evaluation.engines.base import Engine, LikelihoodEngine
from qconv.evaluation.kept_files import store_arrays
from qconv.evaluation.metrics import Scores, by_confidence, text_items, text_metrics
from qconv.evaluation.record import Metric, Task
from qconv.evaluation.reference import Kept, ReferenceText, part_ranges, scored_logits
from qconv.evaluation.suites import NoiseSettings, TextSettings
from qconv.evaluation.tasks import Bench, Subject
from qconv.evaluation.text import calibrated_on, windowed_text
from qconv.evaluation.windows import Window, WindowedText
from qconv.runtime.engine_rounding import rounds_inputs
from qconv.runtime.files import open_files

SETTINGS = TextSettings
ROUNDED_INPUTS = ("ppl", "ppl.ratio", "kld.mean", "top1.flips", "top1.agreement")
"""What is said once more of a build whose inputs engines round, too."""


def require_text(settings: TextSettings, bench: Bench) -> None:
    """Check that the text can be made, before anything else is done.

    Raises:
        UsageError: the corpus cannot be read or is too short.
        IncapableEngineError: there is no tokenizer here.
    """
    overlap = calibrated_on(bench.build.path, settings.corpus, bench.tokenizer_folder())
    windowed_text(settings, bench.tokenizer_folder(), bench.seed, exclude=overlap)


def measure(settings: TextSettings, bench: Bench) -> Task:
    """Score the text with the build; what was scored before an interruption is read from ``bench.work``.

    Raises:
        UsageError: the corpus cannot be read or is too short.
        IncapableEngineError: the build's engine scores no text.
        EngineError: an engine failed.
    """
    start = time.monotonic()
    overlap = calibrated_on(bench.build.path, settings.corpus, bench.tokenizer_folder())
    text = windowed_text(settings, bench.tokenizer_folder(), bench.seed, exclude=overlap)
    bench.log(f"{settings.name}: {text.scored:,} tokens of {len(text.units)} {text.unit}s, {text.source}")
    noise: dict[str, Metric] = {}
    if bench.reference is None or isinstance(bench.build.engine, LikelihoodEngine):
        scores = _alone(bench, text)
    else:
        reference = open_reference(bench, bench.reference, text)
        reference.fill(bench.progress)
        if bench.noise is not None:
            noise = _noise(bench, bench.reference, bench.noise, text)
        bench.reference.close()  # one model at a time in memory
        scores = _beside(bench, reference)
    items = text_items(text, scores)
    rounded = _with_rounded_inputs(bench, text, None if scores.beside is None else reference)
    return Task(
        name=settings.name,
        kind=settings.kind,
        inputs_sha256=text.digest(),
        source=text.source,
        unit=text.unit,
        settings=_plain(settings),
        metrics={**text_metrics(items, scores), **rounded, **noise},
        items=items,
        files={"tokens": store_arrays(bench.folder, _arrays(text, scores))},
        details={"by_confidence": by_confidence(scores), "excluded_documents": [*sorted(overlap)]},
        engine=dict(bench.build.engine.identity),
        seconds=round(time.monotonic() - start, 3),
    )


def keep_reference(settings: TextSettings, bench: Bench) -> Kept:
    """Compute what a run will need of ``bench.reference``, and tell what is kept where."""
    assert bench.reference is not None
    text = windowed_text(settings, bench.model_dir, bench.seed)
    bench.log(f"{settings.name}: {text.scored:,} tokens of {len(text.units)} {text.unit}s, {text.source}")
    reference = open_reference(bench, bench.reference, text)
    reference.fill(bench.progress)
    if bench.noise is not None:
        _noise(bench, bench.reference, bench.noise, text)
    return Kept(
        task=settings.name,
        tokens=text.scored,
        kept="whole distributions" if reference.top is None else f"the {reference.top} most probable tokens",
        path=str(reference.entry.path),
        nbytes=sum(file.stat().st_size for file in reference.entry.path.iterdir()),
    )


def open_reference(bench: Bench, subject: Subject, text: WindowedText) -> ReferenceText:
    """The reference's cached distributions over the text."""
    vocabulary = Config(language_part(read_json(subject.path / "config.json"))).integer("vocab_size")
    return ReferenceText.open(bench.cache, subject, text, vocabulary)


def _with_rounded_inputs(bench: Bench, text: WindowedText, reference: ReferenceText | None) -> dict[str, Metric]:
    """The same of the build with inputs rounded as engines do that compute in FP8; empty where none are."""
    build, open_rounded = bench.build, bench.build.open_rounded
    if open_rounded is None or not rounds_inputs(open_files(build.path)):
        return {}
    build.close()  # one model at a time in memory
    bench.log("once more with inputs rounded to FP8, as the engines do that compute in it")
    opened = replace(bench, build=Subject(build.path, build.artifact, lambda *_: open_rounded()))
    kind = "rounded-"
    scores = _alone(opened, text, kind) if reference is None else _beside(opened, reference, kind)
    opened.build.close()
    found = text_metrics(text_items(text, scores), scores)
    return {f"rounded_inputs.{name}": found[name] for name in ROUNDED_INPUTS if name in found}


def _beside(bench: Bench, reference: ReferenceText, kind: str = "") -> Scores:
    work = Entry(bench.work)
    text, parts = reference.text, []
    for index, windows in enumerate(reference.parts):
        bench.progress("build", windows.start, len(text.windows))

        def make(index: int = index, windows: range = windows) -> dict[str, NDArray[Any]]:
            known = reference.part(index)
            chosen = [text.windows[one] for one in windows]
            found, offset = [], 0
            for window, logits in zip(chosen, scored_logits(bench.build.engine, chosen), strict=True):
                one = known.rows(offset, offset + window.scored)
                _require_same_vocabulary(bench, one.vocabulary, logits.shape[1])
                found.append(token_scores(one, logits, window.targets))
                offset += window.scored
            return TokenScores.joined(found).arrays()

        parts.append(TokenScores.from_arrays(work.arrays(kind + _work_name(reference.entry.path.name, index), make)))
    bench.progress("build", len(text.windows), len(text.windows))
    joined = TokenScores.joined(parts)
    return Scores(joined.nll, joined)


def _alone(bench: Bench, text: WindowedText, kind: str = "") -> Scores:
    work = Entry(bench.work)
    parts = []
    for index, windows in enumerate(part_ranges(text.windows, bench.build.engine.rows, 1 << 12)):
        bench.progress("build", windows.start, len(text.windows))

        def make(windows: range = windows) -> dict[str, NDArray[Any]]:
            chosen = [text.windows[one] for one in windows]
            return {"nll": np.concatenate(list(_likelihoods(bench.build.engine, chosen)))}

        parts.append(work.arrays(kind + _work_name("alone", index), make)["nll"])
    return Scores(np.concatenate(parts), None)


def _likelihoods(engine: Engine, windows: list[Window]) -> Iterator[Floats32]:
    """Negative log-likelihood of each window's scored tokens, float32 [scored]."""
    if isinstance(engine, LikelihoodEngine):
        answers = engine.likelihoods([window.ids.tolist() for window in windows])
        yield from (-found[window.first - 1 :] for window, found in zip(windows, answers, strict=True))
        return
    for window, logits in zip(windows, scored_logits(engine, windows), strict=True):
        yield negative_log_likelihood(logits, window.targets)


def _require_same_vocabulary(bench: Bench, expected: int | None, found: int) -> None:
    if expected is not None and found != expected:
        raise ArtifactError(
            f"{bench.build.path}: gives {found:,} logits a token and the reference {expected:,}.",
            hint="Build and reference are of different models, or one has a padded vocabulary.",
        )


def _noise(bench: Bench, subject: Subject, settings: NoiseSettings, text: WindowedText) -> dict[str, Metric]:
    """The reference against itself with another batch shape: below this no divergence means anything."""
    count, windows = 0, []
    for window in text.windows:
        if count >= settings.tokens:
            break
        windows.append(window)
        count += window.scored
    part = WindowedText(tuple(windows), text.units, text.unit, text.source)
    first, second = subject.open(settings.dtype, None), subject.open(settings.dtype, settings.rows)
    key: dict[str, JsonValue] = {
        "artifact": subject.artifact.sha256,
        "windows": part.digest(),
        "engine": dict(first.identity),
        "other": dict(second.identity),
    }

    def make() -> JsonValue:
        bench.log(f"noise floor: the reference in {settings.dtype}, {first.rows} and {settings.rows} rows a batch")
        return _self_divergence(first, second, part)

    entry = bench.cache.entry("noise", key)
    found = entry.json("noise.json", make)
    first.close()
    second.close()
    if not isinstance(found, dict):
        raise ArtifactError(f"{entry.path}: holds no noise floor.", hint="Remove that folder: it is measured again.")
    note = f"{settings.dtype}, {first.rows} against {settings.rows} rows a batch, {count:,} tokens"
    values = {name: value for name, value in found.items() if isinstance(value, float)}
    return {f"noise.{name}": Metric(value=value, unit="nats", note=note) for name, value in values.items()}


def _self_divergence(first: Engine, second: Engine, text: WindowedText) -> dict[str, JsonValue]:
    kl, flips, squares = 0.0, 0, 0.0
    windows = list(text.windows)
    for window, one, other in zip(windows, scored_logits(first, windows), scored_logits(second, windows), strict=True):
        scores = token_scores(Reference.of(one, window.targets, None), other, window.targets)
        kl += float(scores.kl.sum(dtype=np.float64))
        flips += int((~scores.agree).sum())
        squares += float(np.square(scores.delta_p).sum())
    count = text.scored
    return {"kld.mean": kl / count, "top1.flips": flips / count, "delta_p.rms": (squares / count) ** 0.5}


def _arrays(text: WindowedText, scores: Scores) -> dict[str, NDArray[Any]]:
    """Per scored token, for reports: its id, its unit, and every score."""
    arrays: dict[str, NDArray[Any]] = {
        "token": np.concatenate([window.targets for window in text.windows]),
        "unit": np.concatenate([window.units for window in text.windows]),
        "nll": scores.nll,
    }
    return arrays if scores.beside is None else {**arrays, **scores.beside.arrays()}


def _plain(settings: TextSettings) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = json.loads(settings.model_dump_json())
    return values


def _work_name(key: str, index: int) -> str:
    return f"{key[:16]}-{index:05d}.safetensors"
