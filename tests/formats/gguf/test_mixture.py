"""The choice of types, against what the real program wrote for Qwen3-Coder-480B's shapes."""

from __future__ import annotations

from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from hypothesis import given
from hypothesis import strategies as st

from qconv.building.bench import SliceShape
from qconv.core.architecture import Architecture
from qconv.errors import UsageError
from qconv.formats.gguf.container import TensorInfo
from qconv.formats.gguf.llama_cpp_mixtures import MIXTURES
from qconv.formats.gguf.mixture import FILE_TYPES, file_type_id, fitted, fitting, needs_importance, tensor_types
from qconv.formats.gguf.names import GgufTensor, gguf_tensors
from qconv.models import architecture
from tests.conftest import EXPERTS, FAMILIES, SIZES

T = GGMLQuantizationType
MODEL_480B = architecture(SliceShape().config(62, 160))
TENSORS_480B = gguf_tensors(MODEL_480B)
SENSITIVE = [n for n in range(62) if n < 7 or n >= 54 or (n - 7) % 3 == 2]

# Measured with llama.cpp's own program: GiB, bits per weight, and every tensor that does not have the base type, as
# layers by name (None: all of them).
MEASURED: dict[str, tuple[float, float, T, dict[tuple[str, T], list[int] | None]]] = {
    "Q4_K_M": (270.1, 4.83, T.Q4_K, {("attn_v", T.Q6_K): SENSITIVE, ("ffn_down_exps", T.Q6_K): SENSITIVE}),
    "Q4_K_S": (
        254.0,
        4.54,
        T.Q4_K,
        {("attn_v", T.Q5_K): list(range(4)), ("ffn_down_exps", T.Q5_K): list(range(7))},
    ),
    "Q5_K_M": (317.1, 5.67, T.Q5_K, {("attn_v", T.Q6_K): SENSITIVE, ("ffn_down_exps", T.Q6_K): SENSITIVE}),
    "Q3_K_M": (
        213.5,
        3.82,
        T.Q3_K,
        {
            ("ffn_down_exps", T.Q5_K): [0, 1, 2],
            ("ffn_down_exps", T.Q4_K): list(range(3, 62)),
            ("attn_v", T.Q5_K): [0, 1],
            ("attn_v", T.Q4_K): list(range(2, 62)),
            ("attn_output", T.Q4_K): None,
        },
    ),
    "Q2_K": (
        162.7,
        2.91,
        T.Q2_K,
        {("ffn_down_exps", T.Q3_K): None, ("attn_output", T.Q3_K): None, ("attn_v", T.Q4_K): None},
    ),
    "IQ4_XS": (240.6, 4.30, T.IQ4_XS, {("attn_v", T.Q5_K): None, ("ffn_down_exps", T.Q5_K): list(range(7))}),
    "IQ3_M": (
        195.5,
        3.50,
        T.IQ3_S,
        {("attn_v", T.Q4_K): None, ("attn_output", T.Q4_K): None, ("ffn_down_exps", T.Q4_K): list(range(7))},
    ),
    "IQ2_M": (
        146.2,
        2.62,
        T.IQ2_S,
        {("attn_v", T.Q4_K): None, ("attn_output", T.IQ3_S): None, ("ffn_down_exps", T.IQ3_S): list(range(7))},
    ),
    "MXFP4_MOE": (
        243.7,
        4.36,
        T.Q8_0,
        {(f"ffn_{role}_exps", T.MXFP4): None for role in ("gate", "up", "down")},
    ),
    "Q6_K": (367.0, 6.57, T.Q6_K, {}),
    "Q8_0": (475.3, 8.50, T.Q8_0, {}),
}
OUTPUT = {"IQ2_M": T.Q5_K, "MXFP4_MOE": T.Q8_0, "Q8_0": T.Q8_0}  # all others Q6_K
EMBEDDING = {"IQ2_M": T.IQ3_S}  # all others the base type


def types_480b(file_type: str, importance: bool = False) -> dict[str, T]:
    return fitted(tensor_types(file_type, MODEL_480B, TENSORS_480B, importance=importance), TENSORS_480B)


def size(types: dict[str, T]) -> int:
    return sum(TensorInfo(tensor.name, types[tensor.name], tensor.shape).nbytes for tensor in TENSORS_480B)


@pytest.mark.parametrize("file_type", MEASURED)
def test_the_480b_has_the_measured_size(file_type: str) -> None:
    gib, bits, _, _ = MEASURED[file_type]
    nbytes = size(types_480b(file_type))
    assert round(nbytes / 2**30, 1) == gib
    assert round(8 * nbytes / sum(tensor.numel for tensor in TENSORS_480B), 2) == bits


@pytest.mark.parametrize("file_type", MEASURED)
def test_the_480b_has_the_measured_types(file_type: str) -> None:
    _, _, base, exceptions = MEASURED[file_type]
    expected = {tensor.name: base if tensor.quantizable else T.F32 for tensor in TENSORS_480B}
    for (name, type), layers in exceptions.items():
        expected |= {f"blk.{layer}.{name}.weight": type for layer in (range(62) if layers is None else layers)}
    expected["output.weight"] = OUTPUT.get(file_type, T.Q6_K)
    expected["token_embd.weight"] = EMBEDDING.get(file_type, base)
    assert types_480b(file_type) == expected


def test_thirty_layers_are_sensitive() -> None:
    raised = [name for name, type in types_480b("Q4_K_M").items() if type == T.Q6_K and "ffn_down" in name]
    assert len(raised) == 30


def test_bf16_has_the_measured_size() -> None:
    assert round(size(types_480b("BF16")) / 2**30, 1) == 894.5


def test_an_imatrix_spares_iq4_the_first_downs() -> None:
    assert types_480b("IQ4_XS", importance=True)["blk.0.ffn_down_exps.weight"] == T.IQ4_XS


@pytest.mark.parametrize(("file_type", "better"), [("Q4_0", T.Q4_1), ("Q5_0", T.Q5_1)])
def test_an_imatrix_gives_old_types_better_first_downs(file_type: str, better: T) -> None:
    types = types_480b(file_type, importance=True)
    assert [types[f"blk.{n}.ffn_down_exps.weight"] for n in (0, 6, 7)] == [
        better,
        better,
        GGMLQuantizationType[file_type],
    ]
    assert types_480b(file_type)["blk.0.ffn_down_exps.weight"] == GGMLQuantizationType[file_type]


def test_iq3_xs_economizes_in_the_middle() -> None:
    types = types_480b("IQ3_XS")
    for role in ("gate", "up"):
        of_layers = [types[f"blk.{n}.ffn_{role}_exps.weight"] for n in (6, 7, 53, 54)]
        assert of_layers == [T.IQ3_S, T.IQ3_XXS, T.IQ3_XXS, T.IQ3_S]


def small(family: str, **changes: Any) -> Architecture:
    return architecture(SIZES | FAMILIES[family] | {"model_type": family, "hidden_size": 256, **changes})


def types_of(model: Architecture, file_type: str, **options: Any) -> dict[str, T]:
    tensors = gguf_tensors(model)
    return fitted(tensor_types(file_type, model, tensors, **{"importance": False, **options}), tensors)


def test_eight_experts_get_better_attention() -> None:
    shapes = {"num_local_experts": 8, "head_dim": 64, "intermediate_size": 512}
    types = types_of(small("mixtral", **shapes), "Q4_K_S")
    found = [types[f"blk.1.attn_{role}.weight"] for role in ("q", "k", "v", "output")]
    assert found == [T.Q4_K, T.Q8_0, T.Q8_0, T.Q5_K]
    types = types_of(small("mixtral", **shapes), "IQ2_XS")
    found = [types[f"blk.1.attn_{role}.weight"] for role in ("q", "k", "v", "output")]
    assert found == [T.IQ2_XS, T.Q4_K, T.Q4_K, T.Q5_K]


def test_a_tied_embedding_is_treated_as_the_head() -> None:
    assert types_of(small("qwen3", tie_word_embeddings=True), "Q4_K_M")["token_embd.weight"] == T.Q6_K
    assert types_of(small("qwen3"), "Q4_K_M")["token_embd.weight"] == T.Q4_K


def test_shared_experts_count_among_the_first_downs() -> None:
    # 16 layers: an eighth are the first 2 downs, which are both of layer 0 where it has a shared expert.
    model = small("qwen2_moe", num_hidden_layers=16, moe_intermediate_size=256, shared_expert_intermediate_size=256)
    types = types_of(model, "IQ2_M", importance=True)
    raised = [name for name, type in types.items() if "ffn_down" in name and type == T.IQ3_S]
    assert raised == ["blk.0.ffn_down_exps.weight", "blk.0.ffn_down_shexp.weight"]


def test_llama_70b_gets_a_better_v() -> None:
    shapes = {"num_hidden_layers": 80, "head_dim": 64, "intermediate_size": 512}
    assert types_of(small("llama", **shapes), "Q4_K_M")["blk.11.attn_v.weight"] == T.Q5_K
    assert types_of(small("qwen3", **shapes), "Q4_K_M")["blk.11.attn_v.weight"] == T.Q4_K


@pytest.mark.parametrize(
    ("type", "smaller"),
    [
        *((iq, T.IQ4_NL) for iq in (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS)),
        (T.Q2_K, T.Q4_0),
        (T.Q3_K, T.Q4_0),
        (T.TQ1_0, T.Q4_0),
        (T.TQ2_0, T.Q4_0),
        (T.Q4_K, T.Q5_0),
        (T.Q5_K, T.Q5_1),
        (T.Q6_K, T.Q8_0),
    ],
)
def test_a_block_that_does_not_divide_falls_back(type: T, smaller: T) -> None:
    assert [fitting(type, columns) for columns in (512, 96, 72)] == [type, smaller, T.F16]


@given(st.sampled_from(sorted(FILE_TYPES)), st.integers(1, 20).map(lambda n: 8 * n), st.booleans())
def test_every_row_is_whole_blocks(file_type: str, width: int, importance: bool) -> None:
    model = small("qwen3_moe", moe_intermediate_size=width, hidden_size=8 * width, head_dim=width)
    for tensor in gguf_tensors(model):
        type = types_of(model, file_type, importance=importance)[tensor.name]
        assert tensor.columns % GGML_QUANT_SIZES[type][0] == 0


def test_a_head_that_no_block_divides_is_q8_0() -> None:
    assert types_of(small("qwen3", hidden_size=96), "IQ2_M")["output.weight"] == T.Q8_0  # not Q5_1 for Q5_K


def test_overrides_go_before_the_mixture() -> None:
    def override(tensor: GgufTensor) -> T | None:
        return T.Q8_0 if "ffn_down_exps" in tensor.name else T.Q5_K if "ffn_" in tensor.name else None

    model = small("qwen3_moe", moe_intermediate_size=256)
    types = types_of(model, "Q2_K", override=override)
    assert types["blk.0.ffn_down_exps.weight"] == T.Q8_0
    assert types["blk.0.ffn_up_exps.weight"] == T.Q5_K
    assert types["blk.0.ffn_gate_inp.weight"] == T.F32
    assert types["blk.0.ffn_norm.weight"] == T.F32


def test_overrides_fall_back_too() -> None:
    model = small("qwen3_moe", moe_intermediate_size=96)
    types = types_of(model, "Q8_0", override=lambda tensor: T.Q6_K if "ffn_down" in tensor.name else None)
    assert types["blk.0.ffn_down_exps.weight"] == T.Q8_0


def test_low_bits_need_importance_in_layers() -> None:
    types = types_480b("IQ2_XS")
    lacking = {t.name for t in TENSORS_480B if needs_importance("IQ2_XS", t, types[t.name])}
    assert "blk.9.ffn_up_exps.weight" in lacking
    assert "blk.9.attn_v.weight" not in lacking  # Q4_K
    assert "token_embd.weight" not in lacking
    # Of a dense model the embedding and head of such a type need none either: no imatrix has them.
    assert not any(needs_importance("Q2_K_S", t, T.Q2_K) for t in TENSORS_480B if t.layer is None)


@pytest.mark.parametrize("file_type", MIXTURES)
def test_every_file_type_has_llama_cpps_number(file_type: str) -> None:
    assert file_type_id(file_type).name in (f"MOSTLY_{file_type}", f"ALL_{file_type}")
    assert isinstance(file_type_id(file_type), LlamaFileType)


def test_an_unknown_file_type_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown GGUF file type 'Q4_K_XL'"):
        file_type_id("Q4_K_XL")


def test_a_dense_layer_of_a_sparse_model_gets_what_a_model_of_eight_experts_gets() -> None:
    """llama.cpp asks how many experts the model has, not the layer."""
    sizes = {"model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 1}
    model = architecture(SIZES | EXPERTS | sizes | {"rope_theta": 1e4})
    types = tensor_types("Q4_K_M", model, gguf_tensors(model), importance=False)
    for layer in (0, 1):
        assert [types[f"blk.{layer}.attn_{role}.weight"] for role in ("k", "v", "output")] == [T.Q8_0, T.Q8_0, T.Q5_K]
    assert types["blk.1.exp_probs_b.bias"] == T.F32


@pytest.mark.parametrize(("family", "expected"), [("qwen2", T.Q5_K), ("mistral", T.Q5_K), ("qwen3", T.Q4_K)])
def test_llama_cpp_knows_a_70b_by_its_layers(family: str, expected: T) -> None:
    changes = {"model_type": family, "num_hidden_layers": 80, "rope_theta": 1e4, "sliding_window": None, "head_dim": 16}
    model = architecture(SIZES | changes)
    types = tensor_types("Q4_K_M", model, gguf_tensors(model), importance=False)
    assert types["blk.10.attn_v.weight"] == expected  # not one of the sensitive layers


def test_of_v_its_number_counts_where_some_layers_have_none() -> None:
    """Of 16 layers four have a v; llama.cpp's medium mixture gives the third of them more, and not the layers'."""
    delta = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 16, "num_experts": 6}
    sizes = {"model_type": "qwen3_next", "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 32}
    shared = {"shared_expert_intermediate_size": 64, "rope_theta": 1e4}
    model = architecture(SIZES | EXPERTS | delta | sizes | shared)
    types = tensor_types("Q4_K_M", model, gguf_tensors(model), importance=False)
    values = [types[f"blk.{layer}.attn_v.weight"] for layer in (3, 7, 11, 15)]
    # With n = 4, n / 8 is 0 and 7 n / 8 is 3.
    assert values == [T.Q4_K, T.Q4_K, T.Q6_K, T.Q6_K]
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ssm_a"] == types["blk.0.ssm_dt.bias"] == T.F32


def test_joined_queries_keys_and_values_count_as_v() -> None:
    """Of every layer that is one of the two, so here numbers are the layers'."""
    delta = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 16}
    sizes = {"model_type": "qwen3_5_text", "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 32}
    model = architecture(SIZES | delta | sizes | {"rope_theta": 1e4})
    types = tensor_types("Q4_K_M", model, gguf_tensors(model), importance=False)
    names = [f"blk.{layer}.attn_{'v' if layer % 4 == 3 else 'qkv'}.weight" for layer in range(16)]
    sensitive = {layer for layer in range(16) if layer < 2 or layer >= 14 or (layer - 2) % 3 == 2}
    assert {layer for layer, name in enumerate(names) if types[name] == T.Q6_K} == sensitive
    assert types["blk.0.attn_gate.weight"] == T.Q4_K


@pytest.mark.parametrize(("file_type", "expected"), [("IQ2_M", T.Q8_0), ("Q4_K_M", T.Q4_K)])
def test_what_calibration_does_not_look_at_needs_no_importance(file_type: str, expected: T) -> None:
    """llama.cpp's program gives latent keys and values the type of the file, and none has an importance."""
    latent = {"q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 256, "qk_rope_head_dim": 64}
    sizes = {"num_key_value_heads": 4, "head_dim": 64, "v_head_dim": 64, "n_routed_experts": 12, "n_group": 1}
    config = {"model_type": "deepseek_v3", "topk_group": 1, "first_k_dense_replace": 1, "rope_theta": 1e4}
    model = architecture(SIZES | EXPERTS | latent | sizes | config)
    types = tensor_types(file_type, model, gguf_tensors(model), importance=True)
    assert {types[f"blk.1.attn_{half}_b.weight"] for half in ("k", "v")} == {expected}
    assert types["blk.1.attn_q_b.weight"] != T.Q8_0


@pytest.mark.parametrize("file_type", ["TQ1_0", "TQ2_0"])
def test_ternary_files_keep_more_of_what_stands_outside_layers(file_type: str) -> None:
    """llama.cpp's program: the head Q6_K, the embedding Q4_K, all else the base type."""
    types = types_480b(file_type)
    exceptions = {name: type for name, type in types.items() if type not in (GGMLQuantizationType[file_type], T.F32)}
    assert exceptions == {"output.weight": T.Q6_K, "token_embd.weight": T.Q4_K}


@pytest.mark.parametrize("file_type", ["IQ1_S", "IQ1_M"])
def test_one_bit_files_keep_more_of_attention_and_of_the_first_downs(file_type: str) -> None:
    """llama.cpp's program, of whose layers' types only v's Q4_K and the downs' Q2_K need no importance."""
    base, types = GGMLQuantizationType[file_type], types_480b(file_type, importance=True)
    assert types["output.weight"] == T.Q5_K
    assert types["token_embd.weight"] == T.Q2_K
    for layer in (0, 6, 7, 61):
        roles = {"attn_q": base, "attn_k": base, "attn_v": T.Q4_K, "attn_output": T.IQ2_XXS, "ffn_gate_exps": base}
        roles |= {"ffn_up_exps": base, "ffn_down_exps": T.Q2_K if layer < 7 else base}
        assert {role: types[f"blk.{layer}.{role}.weight"] for role in roles} == roles
    lacking = [t.name for t in TENSORS_480B if needs_importance(file_type, t, types[t.name])]
    assert "blk.9.attn_q.weight" in lacking
    assert "blk.9.attn_v.weight" not in lacking
    assert "blk.0.ffn_down_exps.weight" not in lacking
