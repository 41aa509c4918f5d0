"""Long contexts: sound builds pass; a rope scaling lost or added is a regression that is named; classes are right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.building.pipeline import quantize
from qconv.evaluation.cache import Cache
from qconv.evaluation.divergence import TokenScores
from qconv.evaluation.longcontext import positions
from qconv.evaluation.metrics import Scores
from qconv.evaluation.record import Run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.suites import Suite
from qconv.evaluation.windows import Window, WindowedText
from qconv.planning.recipe import load_recipe
from tests.conftest import BUNDLED

SUITE = Suite(
    noise=None,
    tasks=({"kind": "longcontext", "name": "far", "corpus": "python-stdlib", "context": 512, "windows": 12},),
)
QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the bundled model in FP8: as it is, and with YaRN as its recipe asks."""
    out = tmp_path_factory.mktemp("builds")
    for name, rope in (("plain", {}), ("longer", {"rope": "yarn:4"})):
        quantize(BUNDLED, out / name, load_recipe("fp8", rope), **QUIET)
    return out / "plain", out / "longer"


def run(build: Path, tmp_path: Path, log: list[str]) -> Run:
    request = Request(build, BUNDLED, SUITE, "far", tmp_path / "run", Cache(tmp_path / "cache"), gates="default")
    return evaluate(request, progress=lambda *_: None, log=log.append)


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "longer"])
def test_a_sound_build_passes_with_the_rope_that_was_asked_for(
    builds: tuple[Path, Path], which: int, tmp_path: Path
) -> None:
    log: list[str] = []
    found = run(builds[which], tmp_path, log)
    assert found.verdict.exit_code == 0, found.verdict.sentence
    task = found.tasks[0]
    assert task.details["rope_differences"] == []
    assert len(task.items) == 12
    assert {item.values["tokens"] for item in task.items} == {511.0}
    assert {"kld.to_256", "kld.to_512", "kld.shift"} <= task.metrics.keys()


def test_a_factor_that_was_lost_or_added_is_a_regression_and_named(builds: tuple[Path, Path], tmp_path: Path) -> None:
    plain, longer = builds
    for name, build, other in (("lost", longer, plain), ("added", plain, longer)):
        bad = tmp_path / name / "build"
        shutil.copytree(build, bad)
        config = (other / "config.json").read_bytes()
        (bad / "config.json").write_bytes(config)
        (bad / "SHA256SUMS").unlink()  # which would tell before anything is measured
        log: list[str] = []
        found = run(bad, tmp_path / name, log)
        assert found.verdict.exit_code == 3, found.verdict.sentence
        shift = found.tasks[0].metrics["kld.shift"]
        assert shift.note is not None
        assert "rope: factor is" in shift.note
        assert any("rope: factor is" in line for line in log)


def test_classes_of_positions_and_their_shift_are_the_means_of_what_lies_there() -> None:
    generator = np.random.default_rng(0)
    length, count = 1000, 5
    ids = np.zeros(length, dtype=np.int32)
    windows = tuple(
        Window(ids, 1, np.full(length - 1, index, np.int32), np.ones(length - 1, np.int32)) for index in range(count)
    )
    text = WindowedText(windows, tuple(map(str, range(count))), "window", "made")
    kl = generator.random((count, length - 1)).astype(np.float32)
    nll, theirs = kl + 1.0, kl + 0.5
    flat = TokenScores(nll.ravel(), theirs.ravel(), kl.ravel(), None, kl.ravel() > 0, kl.ravel())
    found = positions.buckets(text, Scores(flat.nll, flat))
    assert [(one.start, one.stop) for one in found] == [(0, 256), (256, 512), (512, 1000)]
    for one in found:
        # The first token of a window is not scored: position p is column p - 1.
        inside = kl[:, max(one.start - 1, 0) : one.stop - 1]
        assert one.kld is not None
        assert one.kld.value == pytest.approx(inside.mean(), rel=1e-5)
        assert one.kld.low < one.kld.value < one.kld.high
        assert one.ratio is not None
        assert one.ratio.value == pytest.approx(np.exp(0.5), rel=1e-5)
    moved = positions.shift(text, Scores(flat.nll, flat))
    assert moved is not None
    assert moved.value == pytest.approx(kl[:, 511:].mean() - kl[:, :255].mean(), rel=1e-4)


def test_names_of_classes() -> None:
    assert positions.edges(4096) == [0, 256, 512, 1024, 2048, 4096]
    assert positions.edges(600) == [0, 256, 512, 600]
    assert positions.edges(1 << 18)[-2:] == [1 << 17, 1 << 18]
