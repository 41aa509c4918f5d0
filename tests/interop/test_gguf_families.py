"""A real llama.cpp computes of every family's file what transformers computes, and qconv's own reader does too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.formats.gguf.forms import families
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.gguf import verify_gguf
from tests.conftest import FAMILIES
from tests.gguf_copies import copied
from tests.gguf_families import MODELS, saved, wide, with_joined_split
from tests.interop.conftest import Client
from tests.interop.test_gguf import (
    FLOAT32_BOUND,
    Llama,
    divergence,
    largest_difference,
    sequences,
    transformers_logits,
    write,
)

pytestmark = pytest.mark.interop

QUIET: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq", "calibration": {"tokens": 512, "sequence_length": 64}},
}


@pytest.fixture
def llama(client: Client, tmp_path: Path) -> Llama:
    """Runs llama.cpp."""
    return Llama(client, tmp_path)


def test_every_family_with_a_form_is_shown() -> None:
    # Of Kimi-K2 transformers has no type of its own.
    assert {family for family, _ in MODELS.values()} | FAMILIES.keys() | {"kimi_k2"} == {*families()}


@pytest.mark.parametrize("name", MODELS)
def test_f32_and_bf16_compute_what_transformers_computes(name: str, llama: Llama, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path / "model")
    tokens = sequences(2048)
    expected = transformers_logits(model, tokens)
    assert max(float(one.abs().max()) for one in expected) > 3.0
    (file,) = write(folder, tmp_path / "f32", "F32")
    assert largest_difference(expected, llama(file, tokens).logits) <= FLOAT32_BOUND
    assert largest_difference(expected, transformers_logits(qconv.load(file, dtype="float32"), tokens)) <= FLOAT32_BOUND
    (file,) = write(folder, tmp_path / "bf16", "BF16")
    # llama.cpp rounds what a matrix is multiplied with to bf16, which sends a token near a tie to another expert.
    # Measured at most 0.04; other models of these sizes are 2 away.
    assert divergence(expected, llama(file, tokens).logits) < 0.1
    assert largest_difference(expected, transformers_logits(qconv.load(file, dtype="float32"), tokens)) <= FLOAT32_BOUND


def test_qwen3_next_of_llama_cpps_own_converter_is_read_alike(llama: Llama, tmp_path: Path) -> None:
    model, folder = saved("qwen3_next", tmp_path / "model")
    (file,) = write(folder, tmp_path / "f32", "F32")
    split, tokens = with_joined_split(file, tmp_path / "split.gguf"), sequences(2048)
    expected = transformers_logits(model, tokens)
    assert largest_difference(expected, llama(split, tokens).logits) <= FLOAT32_BOUND
    assert (
        largest_difference(expected, transformers_logits(qconv.load(split, dtype="float32"), tokens)) <= FLOAT32_BOUND
    )
    assert not verify_gguf(split, folder).problems


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_q4_k_m_generates_and_is_read_alike(name: str, method: str, llama: Llama, tmp_path: Path) -> None:
    _, folder = saved(name, tmp_path / "model", **wide(name))
    recipe = parse_gguf_recipe({"type": "Q4_K_M"} | METHODS[method])
    report = quantize_gguf(folder, tmp_path / "out", recipe, **QUIET).report
    assert {one["type"] for one in report["tensors"].values()} == {"F32", "Q4_K", "Q6_K"}
    found = verify_gguf(tmp_path / "out", folder)
    assert not found.problems
    file, tokens = tmp_path / "out" / report["files"][0], sequences(2048)
    assert len(llama(file, tokens, generate=16).generated) == 16
    ours = transformers_logits(qconv.load(file, backend="reference", dtype="float32"), tokens)
    # Of quantized weights llama.cpp rounds the inputs to eight bits; of the numbers that they stand for it does not.
    theirs = llama(dequantized(file, tmp_path / "dequantized.gguf"), tokens).logits
    assert largest_difference(ours, theirs) <= FLOAT32_BOUND


def dequantized(file: Path, target: Path) -> Path:
    """The file with the float32 numbers that its blocks stand for, by the ``gguf`` package."""
    read = gguf.GGUFReader(str(file))
    blocks = [one for one in read.tensors if one.tensor_type != GGMLQuantizationType.F32]
    values = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in blocks}
    return copied(file, target, drop=list(values), tensors=values)
