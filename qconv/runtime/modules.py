"""The modules that stand in transformers' models where weights are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qconv.runtime.backends.base import ExpertsOperator, LinearOperator
from qconv.runtime.packed import BlockWeight, dequantized_rows


class PackedLinear(nn.Module):
    """A linear whose weight stays packed; its bias, if any, is an ordinary parameter."""

    bias: nn.Parameter | None

    def __init__(self, operator: LinearOperator, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.operator = operator
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        output = self.operator(inputs)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {type(self.operator).__name__}"


class DenseLinear(nn.Linear):
    """A linear whose weight is not packed.

    torch folds the leading dimensions of inputs that are a view (the last token's, say) only if the weight wants a
    gradient; else it copies the weight, which takes far longer than multiplying with it. Here they are folded always.
    """

    def __init__(self, shape: tuple[int, int], *, bias: bool) -> None:
        """Without weights yet; the shape is (out_features, in_features)."""
        super().__init__(shape[1], shape[0], bias, device="meta")

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        output = functional.linear(inputs.reshape(-1, self.in_features), self.weight, self.bias)
        return output.view(*inputs.shape[:-1], self.out_features)


class PackedExperts(nn.Module):
    """The experts of a sparse block, in place of transformers' fused ones; called as those are."""

    def __init__(self, operator: ExpertsOperator, count: int) -> None:
        """Of an operator of so many experts."""
        super().__init__()
        self.operator = operator
        self.count = count

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """[tokens, hidden], [tokens, top_k], [tokens, top_k] to [tokens, hidden].

        Where nobody says who was chosen, the inputs of all experts lie behind each other, [experts * tokens, hidden],
        with zeros for those that were not: Llama 4's.
        """
        if top_k_index is not None and top_k_weights is not None:
            return self.operator(hidden_states, top_k_index, top_k_weights)
        asked = hidden_states.any(dim=-1).nonzero().squeeze(-1)
        chosen = (asked // (len(hidden_states) // self.count)).unsqueeze(-1)
        answers = self.operator(hidden_states[asked], chosen, torch.ones_like(chosen, dtype=hidden_states.dtype))
        return torch.zeros_like(hidden_states).index_copy_(0, asked, answers)

    def extra_repr(self) -> str:
        return type(self.operator).__name__


class PackedEmbedding(nn.Module):
    """An embedding of ggml's blocks: only the rows asked for are dequantized."""

    def __init__(self, weight: BlockWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """The blocks, uint8 [num_embeddings, bytes]: Llama 4 asks an embedding's weight for its device."""
        return self.packed.rows

    def forward(self, ids: Tensor) -> Tensor:
        """[...] to [..., hidden]."""
        rows = functional.embedding(ids, self.packed.rows)
        values = dequantized_rows(rows.reshape(-1, rows.shape[-1]), self.packed.type, self.packed.scale)
        return values.view(*ids.shape, self.embedding_dim).to(self.dtype)
