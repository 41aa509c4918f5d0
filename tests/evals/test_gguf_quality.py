"""The GGUF quality script's own parts: what is averaged, what counts as a shortfall, how llama.cpp takes a matrix."""

from __future__ import annotations

import numpy as np
import torch
from gguf import MODEL_TENSOR

from evals.gguf_quality import GGML_WITH, PLAIN, WITH, as_llama_cpp, mean, shortfalls
from evals.quality import Difference, Measured
from qconv.formats.gguf.imatrix import Entry, Imatrix
from qconv.formats.gguf.names import GgufTensor


def test_files_of_several_matrices_are_averaged_document_by_document() -> None:
    tokens = np.array([10.0, 30.0])
    one = Measured(tokens, np.array([1.0, 3.0]), np.array([5.0, 6.0]), np.array([9.0, 20.0]))
    other = Measured(tokens, np.array([3.0, 3.0]), np.array([7.0, 6.0]), np.array([7.0, 20.0]))
    found = mean([one, other])
    assert found.kl.tolist() == [2.0, 3.0]
    assert found.nll.tolist() == [6.0, 6.0]
    assert found.agree.tolist() == [8.0, 20.0]
    assert found.mean(found.kl) == 5.0 / 40.0


def test_an_imatrix_that_does_not_help_and_a_better_peer_are_shortfalls() -> None:
    helps = Difference(WITH, PLAIN, -0.2, -0.3, -0.1)
    unclear = Difference(WITH, PLAIN, -0.1, -0.3, 0.1)
    as_good = Difference(WITH, GGML_WITH, 0.1, -0.1, 0.3)
    worse = Difference(WITH, GGML_WITH, 0.2, 0.1, 0.3)
    assert shortfalls("Q4_K_M", [helps, as_good]) == []
    (problem,) = shortfalls("Q4_K_M", [unclear, as_good])
    assert "does not lower" in problem
    (problem,) = shortfalls("Q4_K_M", [helps, worse])
    assert "is worse than ggml, imatrix" in problem


def test_llama_cpp_gives_ones_to_an_expert_without_tokens() -> None:
    name = "blk.0.ffn_up_exps.weight"
    sums = torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    importance = as_llama_cpp(Imatrix({name: Entry(sums, torch.tensor([2.0, 0.0]).double())}, ("text",)))
    tensor = GgufTensor(name, MODEL_TENSOR.FFN_UP_EXP, 0, (2, 3, 2), ("a", "b"))
    found = [importance(tensor, part) for part in range(2)]
    assert [None if one is None else one.tolist() for one in found] == [[1.0, 2.0], [1.0, 1.0]]
    other = GgufTensor("blk.1.attn_q.weight", MODEL_TENSOR.ATTN_Q, 1, (3, 2), ("c",))
    assert importance(other, 0) is None
