"""Mixtral 8x7B and 8x22B: every layer sparse, experts named w1 (gate), w3 (up), w2 (down)."""

from qconv.models.base import Family

FAMILY = Family(
    sparse=lambda config, layer: True,
    sparse_block="block_sparse_moe",
    expert_linears=("w1", "w3", "w2"),
    expert_width=("intermediate_size",),
)
