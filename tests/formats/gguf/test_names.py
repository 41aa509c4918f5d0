"""Names, shapes and sources of a GGUF file's tensors, and the row order of llama's q and k."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSORS

from qconv.building.bench import SliceShape
from qconv.errors import UsageError
from qconv.formats.gguf.forms import form
from qconv.formats.gguf.names import GgufTensor, architecture_name, gguf_tensors, permute_heads
from qconv.models import architecture
from tests.conftest import FAMILIES, SIZES

# What a real converter writes for Qwen3-Coder-480B, per layer, in the file's own (reversed) order.
LAYER_480B = {
    "attn_q": (6144, 12288),
    "attn_k": (6144, 1024),
    "attn_v": (6144, 1024),
    "attn_output": (12288, 6144),
    "attn_q_norm": (128,),
    "attn_k_norm": (128,),
    "attn_norm": (6144,),
    "ffn_norm": (6144,),
    "ffn_gate_inp": (6144, 160),
    "ffn_gate_exps": (6144, 2560, 160),
    "ffn_up_exps": (6144, 2560, 160),
    "ffn_down_exps": (2560, 6144, 160),
}


def tensors_of(family: str, **changes: Any) -> list[GgufTensor]:
    config = SIZES | FAMILIES[family] | {"model_type": family} | changes
    return gguf_tensors(architecture(config))


def test_the_480b_has_the_names_and_shapes_that_llama_cpp_expects() -> None:
    tensors = gguf_tensors(architecture(SliceShape().config(62, 160)))
    found = {tensor.name: tensor.shape[::-1] for tensor in tensors}
    expected = {f"blk.{n}.{name}.weight": shape for n in range(62) for name, shape in LAYER_480B.items()}
    expected |= {"token_embd.weight": (6144, 151936), "output.weight": (6144, 151936), "output_norm.weight": (6144,)}
    assert found == expected
    assert len(tensors) == 747


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_goes_to_one_place(family: str) -> None:
    config = SIZES | FAMILIES[family] | {"model_type": family}
    model = architecture(config)
    sources = [source for tensor in gguf_tensors(model) for source in tensor.sources]
    assert sorted(sources) == sorted(name for name, _ in model.tensors())
    sizes = dict.fromkeys(sources, 0)
    for name, shape in model.tensors():
        sizes[name] = int(torch.Size(shape).numel())
    for tensor in gguf_tensors(model):
        assert tensor.numel == sum(sizes[source] for source in tensor.sources), tensor.name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_architecture_knows_is_named(family: str) -> None:
    kinds = {tensor.kind for tensor in tensors_of(family)}
    assert kinds <= set(MODEL_TENSORS[form(family).table])


def test_experts_lie_behind_each_other_by_number() -> None:
    (gate,) = [one for one in tensors_of("mixtral", num_local_experts=12) if one.name == "blk.1.ffn_gate_exps.weight"]
    # By number and not by text, where 10 would come before 2; w1 is the gate.
    assert gate.sources == tuple(f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(12))
    assert gate.shape == (12, 96, 64)


def test_vectors_and_the_router_are_not_quantizable() -> None:
    fixed = {tensor.name for tensor in tensors_of("qwen2_moe", num_hidden_layers=1) if not tensor.quantizable}
    assert fixed == {
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_k.bias",
        "blk.0.attn_v.bias",
        "blk.0.ffn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "output_norm.weight",
    }


def test_the_shared_experts_gate_is_the_vector_that_llama_cpp_reads() -> None:
    (gate,) = [tensor for tensor in tensors_of("qwen2_moe") if tensor.name == "blk.0.ffn_gate_inp_shexp.weight"]
    assert gate.shape == (64,)  # [1, 64] in the checkpoint


def test_a_tied_head_is_left_out() -> None:
    assert "output.weight" not in {tensor.name for tensor in tensors_of("qwen3", tie_word_embeddings=True)}


def test_rope_factors_are_a_tensor_of_their_own() -> None:
    config = SIZES | {"model_type": "llama"}
    (factors,) = [one for one in gguf_tensors(architecture(config), (1.0, 8.0)) if not one.sources]
    assert (factors.name, factors.shape, factors.constant) == ("rope_freqs.weight", (2,), (1.0, 8.0))
    assert not factors.quantizable


@pytest.mark.parametrize("family", FAMILIES)
def test_only_llama_permutes_and_only_q_and_k(family: str) -> None:
    permuted = {tensor.name.split(".")[2]: tensor.heads for tensor in tensors_of(family) if tensor.heads}
    expected = {"attn_q": 4, "attn_k": 2} if form(family).table is MODEL_ARCH.LLAMA else {}
    assert permuted == expected


def test_permuted_rows_rotate_as_transformers_rotates() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, head_dim, position = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, head_dim, generator=generator)
    k = torch.randn(1, heads, 1, head_dim, generator=generator)
    angles = position * 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    both = torch.cat([angles, angles])[None, None]
    q_rotated, k_rotated = apply_rotary_pos_emb(q, k, both.cos(), both.sin())

    def rotate_pairs(vector: torch.Tensor) -> torch.Tensor:
        """ggml's normal mode: 2i turns with 2i + 1."""
        pairs = torch.view_as_complex(vector.reshape(heads, head_dim // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(heads, head_dim)

    ours_q = rotate_pairs(permute_heads(q.reshape(-1, 1), heads))
    ours_k = rotate_pairs(permute_heads(k.reshape(-1, 1), heads))
    # The two rotated vectors themselves: permuting what transformers rotated gives what ggml rotates.
    torch.testing.assert_close(ours_q.reshape(-1, 1), permute_heads(q_rotated.reshape(-1, 1), heads))
    torch.testing.assert_close((ours_q * ours_k).sum(-1), (q_rotated * k_rotated).sum(-1).reshape(heads))


def test_permuting_keeps_biases_with_their_rows() -> None:
    rows = torch.arange(24.0)
    assert torch.equal(permute_heads(rows, 2), permute_heads(rows[:, None].expand(24, 5), 2)[:, 0])
    assert permute_heads(rows, 2)[:4].tolist() == [0.0, 6.0, 1.0, 7.0]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="family gpt5 has no GGUF form"):
        architecture_name("gpt5")
