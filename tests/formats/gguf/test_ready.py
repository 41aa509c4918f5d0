"""qconv's own mixtures: within llama.cpp's sizes for models of every shape, bits where weights are read most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from hypothesis import given
from hypothesis import strategies as st

from qconv.building.bench import SliceShape
from qconv.core.architecture import Architecture
from qconv.formats.gguf.container import TensorInfo
from qconv.formats.gguf.mixture import file_type_id, fitted, tensor_types
from qconv.formats.gguf.names import GgufTensor, gguf_tensors
from qconv.formats.gguf.ready import LEADS, READY, lead
from qconv.models import architecture
from tests.conftest import FAMILIES, SIZES

T = GGMLQuantizationType
MODEL_480B = architecture(SliceShape().config(62, 160))
TENSORS_480B = gguf_tensors(MODEL_480B)


def shaped(family: str, **changes: Any) -> Architecture:
    return architecture(SIZES | FAMILIES[family] | {"model_type": family} | changes)


def types_of(file_type: str, model: Architecture, tensors: Sequence[GgufTensor], **options: Any) -> dict[str, T]:
    return fitted(tensor_types(file_type, model, tensors, **{"importance": True, **options}), tensors)


def size(types: dict[str, T], tensors: Sequence[GgufTensor]) -> int:
    return sum(TensorInfo(tensor.name, types[tensor.name], tensor.shape).padded for tensor in tensors)


def bits(type: T) -> float:
    elements, nbytes = GGML_QUANT_SIZES[type]
    return 8 * nbytes / elements


@pytest.mark.parametrize("name", READY)
def test_the_480b_fills_the_size_of_its_class(name: str) -> None:
    most = size(types_of(READY[name], MODEL_480B, TENSORS_480B), TENSORS_480B)
    made = size(types_of(name, MODEL_480B, TENSORS_480B), TENSORS_480B)
    assert 0.995 * most <= made <= most  # one layer's gate is 0.5 % of the weights, and its next type a quarter more


@pytest.mark.parametrize("name", READY)
def test_attention_of_the_480b_which_every_token_reads_has_high_types(name: str) -> None:
    types = types_of(name, MODEL_480B, TENSORS_480B)
    for layer in range(62):
        found = {role: bits(types[f"blk.{layer}.{role}.weight"]) for role in ("attn_k", "attn_v", "attn_q")}
        experts = [bits(types[f"blk.{layer}.ffn_{role}_exps.weight"]) for role in ("gate", "up", "down")]
        # By the leads an expert of 160 deserves 2.2 bits less than q and 4 less than v; types are a bit or two apart.
        assert found["attn_q"] >= max(experts) + 1.0
        assert found["attn_k"] >= found["attn_q"]
        assert found["attn_v"] >= found["attn_q"]
        assert experts[2] >= max(experts[:2])


def test_types_of_the_480b_at_four_bits_are_those_of_the_readme() -> None:
    types = types_of("Q4_A", MODEL_480B, TENSORS_480B)
    roles: dict[str, set[T]] = {}
    for tensor in TENSORS_480B:
        if tensor.quantizable and tensor.layer is not None:
            roles.setdefault(tensor.name.split(".")[2], set()).add(types[tensor.name])
    assert all(roles[f"attn_{role}"] == {T.Q8_0} for role in ("q", "k", "v", "output"))
    assert roles["ffn_gate_exps"] == roles["ffn_up_exps"] == {T.IQ4_XS, T.Q5_K}
    assert roles["ffn_down_exps"] == {T.IQ4_XS, T.Q5_K, T.Q6_K}
    assert types["blk.0.ffn_down_exps.weight"] == T.Q6_K
    assert types["token_embd.weight"] == types["output.weight"] == T.Q8_0


@given(
    st.sampled_from(sorted(READY)),
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 24).map(lambda n: 32 * n),
    st.integers(1, 6),
    st.booleans(),
)
def test_no_shape_makes_a_mixture_larger_than_its_class(
    name: str, family: str, width: int, layers: int, tied: bool
) -> None:
    changes = {"moe_intermediate_size": width, "intermediate_size": 2 * width, "tie_word_embeddings": tied}
    model = shaped(family, hidden_size=256, num_hidden_layers=layers, **changes)
    tensors = gguf_tensors(model)
    types = types_of(name, model, tensors)
    assert all(tensor.columns % GGML_QUANT_SIZES[types[tensor.name]][0] == 0 for tensor in tensors)
    # Rows that 256 does not divide have types of 4.5 bits and more, whatever the class.
    least = size(types_of("Q2_K_S", model, tensors), tensors)
    assert size(types, tensors) <= max(size(types_of(READY[name], model, tensors), tensors), least)


def test_a_weight_that_a_quarter_of_the_tokens_reads_deserves_a_bit_less() -> None:
    def experts(number: int) -> float:
        model = shaped("qwen3_moe", num_experts=number, num_experts_per_tok=2)
        (gate,) = (one for one in gguf_tensors(model) if one.name == "blk.1.ffn_gate_exps.weight")
        return lead(gate, model)

    assert experts(2) == 0.0
    assert experts(8) == -1.0
    dense = shaped("qwen3")
    leads = {tensor.name: lead(tensor, dense) for tensor in gguf_tensors(dense)}
    assert leads["blk.1.ffn_gate.weight"] == 0.0
    tensor = next(one for one in gguf_tensors(dense) if one.name == "token_embd.weight")
    assert leads[tensor.name] == LEADS[tensor.kind] - 5.5  # of 2,048 rows


def test_overrides_go_before_and_the_rest_stays() -> None:
    model = shaped("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=4)
    tensors = gguf_tensors(model)
    plain = types_of("Q4_A", model, tensors)
    changed = types_of("Q4_A", model, tensors, override=lambda tensor: T.Q2_K if "ffn_down" in tensor.name else None)
    different = {name for name in plain if plain[name] != changed[name]}
    assert different == {f"blk.{layer}.ffn_down_exps.weight" for layer in range(4)}
    assert changed["blk.0.ffn_down_exps.weight"] == T.Q2_K
    assert changed["blk.0.ffn_gate_inp.weight"] == T.F32


def test_the_file_has_the_number_of_the_type_of_most_weights() -> None:
    numbers = {name: file_type_id(name, TENSORS_480B, types_of(name, MODEL_480B, TENSORS_480B)).name for name in READY}
    assert numbers == {
        "Q2_A": "MOSTLY_Q2_K",
        "Q3_A": "MOSTLY_IQ3_S",
        "Q4_A": "MOSTLY_IQ4_XS",
        "Q5_A": LlamaFileType.MOSTLY_Q5_K_M.name,
    }
