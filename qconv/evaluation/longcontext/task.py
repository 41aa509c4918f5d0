"""The task ``longcontext``: every token of long windows, build beside reference, in bounded memory.

Both models pass all windows of a part layer by layer, activations on disk, and then give their logits side by side, a
few hundred tokens at a time: nothing in memory grows with the windows' length but what one layer's attention needs for
one of them. No distributions are kept, so the reference is computed with every build.

The reference is read with the rope that the build's recipe asked for (``quantize --rope``): what is measured is what
rounding and packaging did, and a YaRN factor that was lost, or that nobody asked for, is a difference.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.artifacts.reported import with_reported_rope
from qconv.checkpoint.config import Config, language_part
from qconv.checkpoint.reader import read_json
from qconv.errors import ArtifactError, IncapableEngineError
from qconv.evaluation.cache import Entry
from qconv.evaluation.divergence import Reference, TokenScores, negative_log_likelihood, token_scores
from qconv.evaluation.encoding import Integers
from qconv.evaluation.engines.base import Engine, Logits, LogitWindows, WindowEngine
from qconv.evaluation.kept_files import store_arrays
from qconv.evaluation.longcontext import positions
from qconv.evaluation.longcontext.settings import LongContextSettings
from qconv.evaluation.metrics import Scores, by_confidence, text_items, text_metrics
from qconv.evaluation.packaging import rope_differences
from qconv.evaluation.record import Task
from qconv.evaluation.tasks import Bench
from qconv.evaluation.text import calibrated_on, windowed_text
from qconv.evaluation.windows import Window, WindowedText

SETTINGS = LongContextSettings
AT_ONCE = 1 << 26
"""Bytes of one model's logits that are compared at once."""
PART_TOKENS = 1 << 20
"""Of the windows that pass the layers together; also what is lost when a run is killed."""


def measure(settings: LongContextSettings, bench: Bench) -> Task:
    """Score the windows; parts that were scored before an interruption are read from ``bench.work``.

    Raises:
        UsageError: the corpus cannot be read or is too short.
        IncapableEngineError: the build's engine is not qconv's runtime.
        EngineError: an engine failed.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        expected = None
        if bench.reference is not None:
            expected = stack.enter_context(_with_asked_rope(bench.reference.path, bench.build.path))
        context = min(settings.context, _context(expected or bench.model_dir))
        overlap = calibrated_on(bench.build.path, settings.corpus, bench.tokenizer_folder())
        text = windowed_text(settings.text(context), bench.tokenizer_folder(), bench.seed, exclude=overlap)
        bench.log(f"{settings.name}: {len(text.windows)} windows of {context:,} tokens, {text.source}")
        differences = [] if bench.reference is None else rope_differences(bench.build.path, bench.reference.path)
        for one in differences:
            bench.log(f"{settings.name}: {one}")
        scores = _scored(bench, text, expected)
    items = text_items(text, scores)
    found = positions.buckets(text, scores)
    told = text_metrics(items, scores)
    told |= positions.metrics(found, positions.shift(text, scores), "; ".join(differences) or None, len(text.windows))
    details = positions.details(found)
    return Task(
        name=settings.name,
        kind=settings.kind,
        inputs_sha256=text.digest(),
        source=text.source,
        unit=text.unit,
        settings=json.loads(settings.model_dump_json()),
        metrics=told,
        items=items,
        files={"tokens": store_arrays(bench.folder, _arrays(text, scores))},
        details={
            **details,
            "context": context,
            "rope_differences": list[JsonValue](differences),
            "by_confidence": by_confidence(scores),
            "excluded_documents": [*sorted(overlap)],
        },
        engine={**bench.build.engine.identity, "windows": "streamed"},
        seconds=round(time.monotonic() - start, 3),
    )


@contextlib.contextmanager
def _with_asked_rope(reference: Path, build: Path) -> Iterator[Path]:
    """The reference's folder, or one of links to its files beside the config.json that the build's recipe asked for."""
    config = read_json(reference / "config.json")
    expected = with_reported_rope(config, build if build.is_dir() else build.parent)
    if expected == config:
        yield reference
        return
    with tempfile.TemporaryDirectory(prefix="qconv-") as made:
        folder = Path(made)
        for file in reference.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        (folder / "config.json").write_text(json.dumps(expected))
        yield folder


def _context(folder: Path) -> int:
    """The context length that config.json states; any where it states none."""
    path = folder / "config.json"
    if not path.is_file():
        return 1 << 30
    return Config(language_part(read_json(path))).integer("max_position_embeddings", default=1 << 30)


def _scored(bench: Bench, text: WindowedText, reference: Path | None) -> Scores:
    build = _able(bench.build.engine, bench.build.path)
    theirs = None
    if reference is not None and bench.reference is not None:
        theirs = _able(bench.reference.engine, bench.reference.path).at(reference)
    work, parts = Entry(bench.work), []
    count = max(1, PART_TOKENS // max(len(one.ids) for one in text.windows))
    for first in range(0, len(text.windows), count):
        bench.progress("windows", first, len(text.windows))
        chosen = text.windows[first : first + count]

        def make(chosen: tuple[Window, ...] = chosen) -> dict[str, NDArray[Any]]:
            return _part(build, theirs, chosen, bench.build.path)

        parts.append(work.arrays(f"windows-{first:05d}.safetensors", make))
    bench.progress("windows", len(text.windows), len(text.windows))
    if theirs is None:
        return Scores(np.concatenate([one["nll"] for one in parts]), None)
    joined = TokenScores.joined([TokenScores.from_arrays(one) for one in parts])
    return Scores(joined.nll, joined)


def _able(engine: Engine, path: Path) -> WindowEngine:
    if not isinstance(engine, WindowEngine):
        raise IncapableEngineError(
            f"{path}: this engine does not give the logits of long windows piece by piece.",
            hint="Measure long contexts with qconv's own runtime: leave --engine out.",
        )
    return engine


def _part(
    build: WindowEngine, reference: WindowEngine | None, windows: tuple[Window, ...], path: Path
) -> dict[str, NDArray[Any]]:
    """Scores of every scored token of some windows, in their order."""
    ids = [window.ids.tolist() for window in windows]
    ours = build.logit_windows(ids)
    if reference is None:
        likelihoods = [
            negative_log_likelihood(one, targets) for piece in ours for one, targets in _pieces(piece, windows)
        ]
        return {"nll": np.concatenate(likelihoods)}
    found = []
    for theirs, own in zip(reference.logit_windows(ids), ours, strict=True):
        if theirs.logits.shape != own.logits.shape or theirs.start != own.start:
            raise ArtifactError(
                f"{path}: gives {own.logits.shape[1]:,} logits a token and the reference {theirs.logits.shape[1]:,}.",
                hint="Build and reference are of different models, or one has a padded vocabulary.",
            )
        pairs = zip(_pieces(theirs, windows), _pieces(own, windows), strict=True)
        found += [
            token_scores(Reference.of(one, targets, None), other, targets) for (one, targets), (other, _) in pairs
        ]
    return TokenScores.joined(found).arrays()


def _pieces(found: LogitWindows, windows: tuple[Window, ...]) -> Iterator[tuple[Logits, Integers]]:
    """Logits and the tokens that follow, a bounded number at once; the last token of a window has none."""
    ids = windows[found.sequence].ids
    rows = max(1, AT_ONCE // (4 * found.logits.shape[1]))
    last = min(found.start + len(found.logits), len(ids) - 1)
    for start in range(found.start, last, rows):
        stop = min(start + rows, last)
        yield found.logits[start - found.start : stop - found.start], ids[start + 1 : stop + 1]


def _arrays(text: WindowedText, scores: Scores) -> dict[str, NDArray[Any]]:
    """Per scored token, for reports: its id, its window, and every score."""
    arrays: dict[str, NDArray[Any]] = {
        "token": np.concatenate([window.targets for window in text.windows]),
        "unit": np.concatenate([window.units for window in text.windows]),
        "nll": scores.nll,
    }
    return arrays if scores.beside is None else {**arrays, **scores.beside.arrays()}
