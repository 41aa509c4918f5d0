"""gpt-oss's layout to compressed-tensors and GGUF and back: every byte of the published tensors, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import Checkpoint
from qconv.errors import RecipeError, UsageError
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, small_recipe
from tests.conversion.test_pipeline import converted
from tests.gpt_oss import dense, published, stored


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("published") / "model")


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = stored(one), stored(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("through", ["compressed-tensors", "mxfp4", "gpt-oss"])
def test_the_published_tensors_come_back_to_the_byte(through: str, source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "there", through)
    assert verify(tmp_path / "there", source).problems == []
    assert Build.open(tmp_path / "there").format.name == ("gpt_oss" if through == "gpt-oss" else "mxfp4")
    outcome = converted(tmp_path / "there", tmp_path / "back", "gpt-oss")
    assert outcome.report["converted"]["rounded_again"] == {}
    assert_same_tensors(source, tmp_path / "back")
    before, after = (Checkpoint.open(one).config["quantization_config"] for one in (source, tmp_path / "back"))
    assert before == after
    assert verify(tmp_path / "back", source).problems == []


def test_through_gguf_every_code_is_kept(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "gguf", "gguf")
    converted(tmp_path / "gguf", tmp_path / "back", "gpt-oss", like=source)
    before, after = Source.open(source), Source.open(tmp_path / "back")
    for name in before.checkpoint.entries:
        assert torch.equal(before.read(name).float(), after.read(name).float()), name
    stored_before, stored_after = stored(source), stored(tmp_path / "back")
    for name in (one for one in stored_before if one.endswith(("_blocks", "_scales"))):
        assert torch.equal(stored_before[name], stored_after[name]), name


def test_attention_that_has_codes_becomes_plain_with_the_same_numbers(tmp_path: Path) -> None:
    build(dense(tmp_path / "model"), tmp_path / "build", small_recipe("rtn", "mxfp4"))
    logged: list[str] = []
    converted(tmp_path / "build", tmp_path / "out", "gpt-oss", log=logged.append)
    assert any(line.startswith("8 weights, of which gpt_oss holds no codes, become plain") for line in logged)
    before, after = Build.open(tmp_path / "build"), Source.open(tmp_path / "out")
    for layer in before.architecture.layers:
        for linear in layer.linears():
            assert torch.equal(before.qtensor(linear).dequantize(), after.read(linear.weight).float()), linear.name
    assert after.checkpoint.entry("model.layers.0.self_attn.q_proj.weight").dtype is torch.bfloat16


def test_interrupted_it_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "whole", "gpt-oss")

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if name == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        converted(source, tmp_path / "out", "gpt-oss", progress=stop)
    converted(source, tmp_path / "out", "gpt-oss")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_what_it_does_not_hold_is_named_and_nothing_is_written(rtn_build: Path, moe: Path, tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    build(model, tmp_path / "int4", small_recipe("rtn", "w4a16"))
    with pytest.raises(UsageError, match="format gpt_oss holds E2M1 floats"):
        converted(tmp_path / "int4", tmp_path / "out", "gpt-oss")
    build(moe, tmp_path / "other", small_recipe("rtn", "mxfp4"))
    with pytest.raises(RecipeError, match="how its readers would store a qwen3_moe"):
        converted(tmp_path / "other", tmp_path / "out", "gpt-oss")
    build(model, tmp_path / "part", small_recipe("rtn", "mxfp4", skip=["*.layers.1.mlp.*"]))
    with pytest.raises(RecipeError, match="is not to be quantized"):
        converted(tmp_path / "part", tmp_path / "out", "gpt-oss")
    assert not (tmp_path / "out").exists()
