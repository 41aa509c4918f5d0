"""Bits by layer and role: experts are one, scales count, what is in no layer is left out."""

from __future__ import annotations

from qconv.artifacts.bits import gguf_bits, module_bits


def test_modules_of_a_checkpoint() -> None:
    found = module_bits(
        [
            ("model.embed_tokens", 200, 100),
            ("model.layers.10.self_attn.q_proj", 100, 100),
            ("model.layers.2.mlp.experts.0.up_proj", 50, 100),
            ("model.layers.2.mlp.experts.17.up_proj", 50, 100),
            ("model.layers.2.mlp.experts.17.up_proj", 8, 0),  # its scales
            ("model.layers.2.mlp.experts.3.down_proj", 8, 0),
        ]
    )
    assert found.rows() == {2: {"mlp.experts.up_proj": 8 * 108 / 200}, 10: {"self_attn.q_proj": 8.0}}
    assert found.values() == [
        {"layer": 2, "roles": {"mlp.experts.up_proj": 4.32}},
        {"layer": 10, "roles": {"self_attn.q_proj": 8.0}},
    ]
    assert found.roles == ["self_attn.q_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"]


def test_tensors_of_gguf() -> None:
    found = gguf_bits(
        {"blk.3.attn_q.weight": (18, 32), "token_embd.weight": (1, 1), "blk.3.ffn_up_exps.weight": (9, 16)}
    )
    assert found.rows() == {3: {"attn_q": 4.5, "ffn_up_exps": 4.5}}
