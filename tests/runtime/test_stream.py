"""Scoring layer by layer gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.errors import UsageError
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime import stream
from qconv.runtime.stream import stream_logits, stream_windows
from tests.conftest import FAMILIES, build, random_model, save_model, small_recipe

SEQUENCES = [torch.arange(3, 40), torch.tensor([7]), torch.arange(100, 121)]


def whole(path: Path, **options: Any) -> list[Tensor]:
    """Logits of the loaded model, sequence by sequence."""
    model = qconv.load(path, dtype=torch.float32)
    with torch.no_grad():
        return [model(sequence.unsqueeze(0)).logits[0] for sequence in SEQUENCES]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal but for the order of sums in float32."""
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(random_model(family), tmp_path / "model")
    out = build(source, tmp_path / "build", small_recipe()).out
    # Small windows, so that every loop goes round more than once.
    monkeypatch.setattr(stream, "WINDOW_TOKENS", 10)
    monkeypatch.setattr(stream, "LOGIT_BYTES", 4 * 2048 * 8)
    monkeypatch.setattr(stream, "HEAD_ROWS", 700)
    told: list[tuple[int, int]] = []
    got = list(stream_logits(out, SEQUENCES, dtype="float32", progress=lambda *done: told.append(done)))
    assert_same(got, whole(out))
    assert told == [(1, 2), (2, 2)]


def test_a_sliding_window_is_kept_to(tmp_path: Path) -> None:
    model = save_model(random_model("mixtral", sliding_window=8), tmp_path / "model")
    assert_same(list(stream_logits(model, SEQUENCES, dtype="float32")), whole(model))
    full = save_model(random_model("mixtral", sliding_window=None), tmp_path / "full")
    assert not torch.allclose(whole(full)[0], whole(model)[0], rtol=0.01)


def test_gguf_with_a_tied_and_packed_head(tmp_path: Path) -> None:
    source = save_model(random_model("qwen3", tie_word_embeddings=True), tmp_path / "model")
    options: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None, "threads": 1}
    out = quantize_gguf(source, tmp_path / "out", GgufRecipe(type="Q8_0"), **options).out
    assert_same(list(stream_logits(out, SEQUENCES, dtype="float32")), whole(out))


def test_windows_say_where_they_belong(rtn_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOGIT_BYTES", 4 * 2048 * 20)
    places = [(w.sequence, w.start, len(w.logits)) for w in stream_windows(rtn_build, SEQUENCES)]
    assert places == [(0, 0, 20), (0, 20, 17), (1, 0, 1), (2, 0, 20), (2, 20, 1)]


def test_no_layer_outlives_its_turn(rtn_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def installed(scorer: Any, layer: Any) -> Any:
        parameters = [p for p in scorer.model.model.layers.parameters() if not p.is_meta]
        seen.append(len(parameters))
        return real(scorer, layer)

    real = stream._Scorer._installed
    monkeypatch.setattr(stream._Scorer, "_installed", installed)
    list(stream_windows(rtn_build, SEQUENCES))
    assert seen == [0, 0]


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        (torch.tensor([], dtype=torch.int64), "sequence 1"),
        (torch.tensor([2048]), "token 2048"),
        (torch.ones(3), "int64"),
    ],
)
def test_sequences_that_cannot_be_scored(rtn_build: Path, sequence: Tensor, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        next(stream_windows(rtn_build, [SEQUENCES[0], sequence]))
