"""Two-sided compensation lowers what it is meant to lower."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from evals.two_sided import cost, two_sided
from qconv.artifacts.gguf_tensors import encoder
from qconv.core.settings import GptqSettings, RefineSettings
from qconv.grids.blocks import BlockGrid
from qconv.methods.compensated.problem import Problem


def moments(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Second moments of vectors that are far from independent, float32 [size, size]."""
    vectors = torch.randn(4 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    vectors += 0.3 * torch.randn(vectors.shape, generator=generator)
    return vectors.t() @ vectors / len(vectors)


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K"])
def test_rows_that_hand_on_their_errors_cost_less(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    inputs, fisher = moments(256, 64, generator), moments(64, 16, generator)
    grid = BlockGrid(encoder(GGMLQuantizationType[name]))
    problem = Problem(inputs, GptqSettings(), RefineSettings(), {})
    one = problem.quantize(weight, grid).weight.dequantize()
    found = two_sided(weight, problem, grid, fisher, rows=8, damping=0.1)
    assert cost(weight - found, inputs, fisher) < 0.8 * cost(weight - one, inputs, fisher)


def test_rows_without_correlation_are_rounded_as_ever() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(16, 256, generator=generator), moments(256, 64, generator)
    grid = BlockGrid(encoder(GGMLQuantizationType.Q4_K))
    problem = Problem(inputs, GptqSettings(), RefineSettings(), {})
    fisher = torch.rand(16, generator=generator).add_(0.5).diag()
    found = two_sided(weight, problem, grid, fisher, rows=4, damping=0.1)
    assert torch.equal(found, problem.quantize(weight, grid).weight.dequantize())
