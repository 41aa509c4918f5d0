"""Sensitivity as a run: its numbers, resumption to the same bytes, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconv.artifacts.source import Source
from qconv.building.sensitivity_pipeline import measure_sensitivity
from qconv.calibration.corpus import build_tokens
from qconv.core.architecture import Moe
from qconv.core.settings import TextSettings
from qconv.errors import Interrupted, StaleJournalError, VerificationError
from qconv.folders.journal import WORK_FOLDER
from qconv.sensitivity.allocating import SENSITIVITY_NAME
from qconv.sensitivity.sweep import INPUTS, OUTPUTS, SEEN, SHARE
from tests.conftest import folder_bytes

TEXT = TextSettings(tokens=256, sequence_length=32)


def measure(model: Path, out: Path, text: TextSettings = TEXT, **options: Any) -> bool:
    values: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    return measure_sensitivity(model, out, text, **values).already_complete


@pytest.fixture(scope="module")
def measured(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model; do not write to it."""
    out = tmp_path_factory.mktemp("sensitivity") / "out"
    assert not measure(moe, out)
    return out


def test_every_linear_has_its_statistics(measured: Path, moe: Path) -> None:
    found, model = load_file(measured / SENSITIVITY_NAME), Source.open(moe).architecture
    assert model.lm_head is not None
    counted = 0
    for layer in model.layers:
        for linear in layer.linears():
            squares, inputs = found[f"{linear.name}.{OUTPUTS}"], found[f"{linear.name}.{INPUTS}"]
            assert squares.shape == (linear.out_features,)
            assert inputs.shape == (linear.in_features,)
            seen = int(found[f"{linear.name}.{SEEN}"])
            assert 0 <= seen <= TEXT.tokens
            assert bool((squares > 0).any()) == (seen > 0)
            counted += seen if linear.name.endswith("gate_proj") and ".experts." in linear.name else 0
    assert counted == sum(layer.mlp.top_k * TEXT.tokens for layer in model.layers if isinstance(layer.mlp, Moe))
    # Gradients with regard to logits are p minus an indicator: at most 2 a token in squares, summed over the rows.
    assert 0.0 < float(found[f"lm_head.{OUTPUTS}"].sum()) < 2.0
    ids = build_tokens(TEXT, moe).ids.flatten().long()
    counts = found[f"{model.embedding.name}.{SEEN}"]
    torch.testing.assert_close(counts, torch.bincount(ids, minlength=model.embedding.out_features))
    assert found[f"{model.embedding.name}.{OUTPUTS}"].shape == (model.hidden_size,)


def test_another_seed_draws_other_labels(measured: Path, moe: Path, tmp_path: Path) -> None:
    """Of the same size on the same kind of text."""
    measure(moe, tmp_path / "out", TEXT.model_copy(update={"seed": 1}))
    one, other = load_file(measured / SENSITIVITY_NAME), load_file(tmp_path / "out" / SENSITIVITY_NAME)
    name = f"model.layers.0.self_attn.o_proj.{OUTPUTS}"
    assert not torch.equal(one[name], other[name])
    assert 0.3 < float(one[name].sum() / other[name].sum()) < 3.0


def test_without_gradients_it_goes_forward_only(measured: Path, moe: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    measure(moe, tmp_path / "out", gradients=False, progress=lambda what, done, total: seen.append(what))
    assert not any("back" in what for what in seen)
    found, whole = (load_file(folder / SENSITIVITY_NAME) for folder in (tmp_path / "out", measured))
    assert found.keys() == {name for name in whole if not name.endswith(OUTPUTS)}
    for name, one in found.items():
        torch.testing.assert_close(one, whole[name], rtol=1e-5, atol=0.0)
    # The first attention adds to embeddings, which are smaller than what it adds; later ones to a larger stream.
    assert 0.0 < float(found[f"model.layers.1.self_attn.q_proj.{SHARE}"]) < 1.5
    with pytest.raises(StaleJournalError, match="recipe"):
        measure(moe, tmp_path / "out")


def test_without_gradients_it_resumes_to_the_same_bytes(moe: Path, tmp_path: Path) -> None:
    measure(moe, tmp_path / "whole", gradients=False)
    stopped = set[str]()

    def progress(what: str, done: int, total: int) -> None:
        # At most two layers' inputs lie on disk: a layer's and the next one's.
        assert len(list((tmp_path / "out" / WORK_FOLDER).glob("inputs-*.bin"))) <= 2
        if what not in stopped:
            stopped.add(what)
            raise Interrupted(2)

    for _ in range(20):
        try:
            measure(moe, tmp_path / "out", gradients=False, progress=progress)
        except Interrupted:
            continue
        break
    assert "forward through layer 1" in stopped
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_do_not_depend_on_threads(threads: int, measured: Path, moe: Path, tmp_path: Path) -> None:
    measure(moe, tmp_path / "out", threads=threads)
    assert folder_bytes(tmp_path / "out") == folder_bytes(measured)


def test_interrupted_at_every_step_it_ends_with_the_same_bytes(measured: Path, moe: Path, tmp_path: Path) -> None:
    out, stopped = tmp_path / "out", set[str]()

    def progress(what: str, done: int, total: int) -> None:
        if what not in stopped:
            stopped.add(what)
            raise Interrupted(2)

    for _ in range(20):
        try:
            measure(moe, out, progress=progress)
        except Interrupted:
            continue
        break
    assert {"forward through layer 1", "labels", "back through layer 1", "back through layer 0"} <= stopped
    assert folder_bytes(out) == folder_bytes(measured)
    assert measure(moe, out)


def test_what_it_kept_is_checked(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("back through layer 0"):
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        measure(moe, tmp_path / "out", progress=stop)
    (gradient,) = (tmp_path / "out" / WORK_FOLDER).glob("gradient-*.bin")
    gradient.write_bytes(bytes(gradient.stat().st_size))
    with pytest.raises(VerificationError, match="gradient"):
        measure(moe, tmp_path / "out")
    with pytest.raises(StaleJournalError):
        measure(moe, tmp_path / "out", TextSettings(tokens=128, sequence_length=32))
    assert not measure(moe, tmp_path / "out", restart=True)
    assert SENSITIVITY_NAME in folder_bytes(tmp_path / "out")
