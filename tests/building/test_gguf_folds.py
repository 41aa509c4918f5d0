"""GGUF builds with AWQ's scales folded in: the same function, resumed at any layer, compared only beside the scales."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv.boundary.content import FOLDED_SCALES, is_gguf
from qconv.errors import CheckpointError, RecipeError, UsageError
from qconv.folders.state import REPORT_NAME
from qconv.formats.gguf.metadata import FOLDED
from qconv.formats.gguf.reader import GgufModel
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.runtime.loading import load
from qconv.verification.gguf import verify_gguf
from tests.building.test_gguf_pipeline import Stop, convert
from tests.conftest import folder_bytes, random_model, save_model

TEXT = {"tokens": 128, "sequence_length": 32}
BOTH: dict[str, Any] = {"method": "awq+gptq", "calibration": {**TEXT, "propagate": True}}
ALONE: dict[str, Any] = {"method": "awq", "calibration": TEXT}
SPLIT = 100_000


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express, some channels of whose norms are large."""
    model = random_model("qwen3_moe", norm_topk_prob=True)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::7] *= 12.0
    return save_model(model, tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module", params=[BOTH, ALONE], ids=["awq+gptq", "awq"])
def keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of a recipe."""
    found: dict[str, Any] = request.param
    return found


@pytest.fixture(scope="module")
def made(sparse: Path, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in several files, so that layers begin and end within them."""
    return convert(sparse, tmp_path_factory.mktemp("folded") / "out", "Q4_0", keys=keys, split=SPLIT).out


def test_it_stands_for_the_source_beside_its_scales(sparse: Path, made: Path, keys: dict[str, Any]) -> None:
    assert is_gguf(made)
    assert verify_gguf(made, sparse).problems == []
    assert len(list(made.glob("*-of-*.gguf"))) >= 3
    report = json.loads((made / REPORT_NAME).read_text())
    assert report["method"] == keys["method"]
    searched = [search for layer in report["layers"] for search in layer["searches"].values()]
    assert sum(not one["kept_rtn"] for one in searched) >= 2
    scales = load_file(made / FOLDED_SCALES)
    assert {name.split(".")[2] for name in scales} == {"0", "1"}
    assert any("layernorm" in name for name in scales)
    made_of = GgufModel.open(next(iter(sorted(made.glob("*-of-*.gguf")))))
    assert made_of.metadata[FOLDED] is True


def test_folding_alone_leaves_the_outputs_as_they_are(sparse: Path, made: Path, tmp_path: Path) -> None:
    """What its scales make of the source, unrounded, computes what the source computes; so its norms are folded."""
    from qconv.artifacts.folded import FoldedSource, read_folded_scales
    from qconv.artifacts.source import Source

    source = Source.open(sparse)
    folded = FoldedSource.of(source, read_folded_scales(made, source.architecture))
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sparse / name, tmp_path / "model" / name)
    tensors = {name: folded.read(name).float() for name, _ in source.architecture.tensors()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, source.read(name).float())]
    assert len(changed) > 20
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = (load(path, dtype="float32")(input_ids=ids).logits for path in (sparse, tmp_path / "model"))
    assert float((got - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_build_computes_what_the_source_does(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """To Q8_0, where rounding is small: a fold that a norm or a linear missed would be far off."""
    model = random_model(family)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::7] *= 4.0
    sound = save_model(model, tmp_path / "model")
    plain = convert(sound, tmp_path / "plain", "Q8_0", keys={"method": "rtn"}).out
    out = convert(sound, tmp_path / "out", "Q8_0", keys=keys, split=SPLIT).out
    assert load_file(out / FOLDED_SCALES)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, *found = (load(path, dtype="float32")(input_ids=ids).logits for path in (sound, plain, out))
    own, folded = (float(torch.linalg.vector_norm(one - expected)) for one in found)
    assert folded < 2.0 * own < 0.5 * float(torch.linalg.vector_norm(expected))


def test_moved_away_from_its_scales_it_is_not_comparable(sparse: Path, made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in made.glob("*-of-*.gguf"):
        shutil.copy(file, moved / file.name)
    assert verify_gguf(moved).problems == []
    with pytest.raises(UsageError, match="not comparable") as caught:
        verify_gguf(moved, sparse)
    assert caught.value.exit_code == 2
    assert FOLDED_SCALES in (caught.value.hint or "")
    shutil.copy(made / FOLDED_SCALES, moved / FOLDED_SCALES)
    assert verify_gguf(moved, sparse).problems == []
    scales = load_file(moved / FOLDED_SCALES)
    name = next(name for name in scales if "layernorm" in name)
    save_file({**scales, name: scales[name][:8].clone()}, moved / FOLDED_SCALES)
    with pytest.raises(CheckpointError, match="a scale is of the output channels"):
        verify_gguf(moved, sparse)
    save_file({**scales, name: scales[name].flip(0)}, moved / FOLDED_SCALES)
    assert verify_gguf(moved, sparse).problems


def test_stopped_at_every_step_and_resumed_the_bytes_are_the_same(
    sparse: Path, made: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    steps: list[str] = []
    options: dict[str, Any] = {"keys": keys, "split": SPLIT}
    convert(sparse, tmp_path / "whole", "Q4_0", **options, progress=lambda key, *_: steps.append(key))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(made)
    calls = [number for number, _ in enumerate(steps)][:: max(1, len(steps) // 12)]
    out, stops = tmp_path / "out", 0
    for most in itertools.chain(calls[1:3], calls[3::3]):

        def stop(key: str, *_: int, left: Iterator[int] = iter(range(most))) -> None:  # noqa: B008 - one for each
            if next(left, None) is None:
                raise Stop(key)

        try:
            convert(sparse, out, "Q4_0", **options, progress=stop)
        except Stop:
            stops += 1
    assert stops >= 3
    convert(sparse, out, "Q4_0", **options)
    assert folder_bytes(out) == folder_bytes(made)
    assert convert(sparse, out, "Q4_0", **options).already_complete


def test_recipes_say_what_goes_with_scales() -> None:
    assert parse_gguf_recipe({"format": "gguf", "type": "Q4_0"}).digest() == GgufRecipe(type="Q4_0").digest()
    assert not GgufRecipe(type="Q4_0").searches_scales
    alone = parse_gguf_recipe({"format": "gguf", "type": "Q4_0", "method": "awq"})
    assert alone.calibrated().calibration.propagate is True
    assert alone.calibrated().refine.sweeps == 0
    both = parse_gguf_recipe({"format": "gguf", "type": "Q4_0", "method": ["awq", "gptq"], "calibration": TEXT})
    assert both.is_matched
    assert both.digest() != both.model_copy(update={"method": ("gptq",)}).digest()
    for wrong in ({"method": "awq", "refine": {"sweeps": 1}}, {"method": "gptq+awq"}):
        with pytest.raises(RecipeError):
            parse_gguf_recipe({"format": "gguf", "type": "Q4_0", **wrong})
