"""The expert that all clients of ``speed.py`` quantize, and the record of how they fared.

Three linears of Qwen3-Coder-480B's shapes with random weights, random inputs, the same on every machine and in every
environment with the same torch. Channels of the inputs differ in size and share a few directions, as those of a model
do: with independent inputs, GPTQ could not gain anything on plain rounding.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

HIDDEN, WIDTH = 6144, 2560
TOKENS = 13_000
WINDOW = 2048
BITS, GROUP_SIZE, BLOCK_SIZE, DAMP_PERCENT = 4, 128, 128, 0.01
_SHARED_DIRECTIONS = 256
_PROBE = 512


@dataclass(frozen=True, slots=True)
class Expert:
    """Weights float32 [out_features, in_features], inputs float32 [tokens, in_features]."""

    gate: Tensor
    up: Tensor
    down: Tensor
    inputs: Tensor
    inner: Tensor


@dataclass(frozen=True, slots=True)
class Record:
    """One run.

    Attributes:
        seconds: Wall time of one expert.
        cpu_seconds: The same of all its threads together, which a busy machine changes less.
        phases: Parts of it by name, where the client measures them.
        peak_memory: Maximum resident set in bytes, inputs and interpreter included.
        error: Of each linear, the output's squared error relative to the output's square.
    """

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    peak_memory: int
    error: dict[str, float]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))


def make(seed: int = 0) -> Expert:
    """An expert with its inputs."""
    generator = torch.Generator().manual_seed(seed)
    return Expert(
        gate=_weight(WIDTH, HIDDEN, generator),
        up=_weight(WIDTH, HIDDEN, generator),
        down=_weight(HIDDEN, WIDTH, generator),
        inputs=_inputs(HIDDEN, generator),
        inner=_inputs(WIDTH, generator),
    )


def windows(inputs: Tensor) -> Iterator[Tensor]:
    """Tokens :data:`WINDOW` at a time, as they come over the batches of a calibration."""
    for start in range(0, len(inputs), WINDOW):
        yield inputs[start : start + WINDOW]


def peak_memory() -> int:
    """This process's maximum resident set in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes


def errors(expert: Expert, quantized: dict[str, Tensor]) -> dict[str, float]:
    """Each linear's squared error on some tokens, relative to its output's square.

    Args:
        expert: The expert.
        quantized: ``gate``, ``up`` and ``down``, dequantized float32 [out_features, in_features].
    """
    originals = {"gate": expert.gate, "up": expert.up, "down": expert.down}
    found = {}
    for name, weight in originals.items():
        inputs = (expert.inner if name == "down" else expert.inputs)[:_PROBE]
        change = inputs @ (quantized[name] - weight).t()
        found[name] = float(change.square().sum() / (inputs @ weight.t()).square().sum())
    return found


def _weight(out_features: int, in_features: int, generator: torch.Generator) -> Tensor:
    return torch.randn(out_features, in_features, generator=generator).mul_(0.02)


def _inputs(width: int, generator: torch.Generator) -> Tensor:
    """float32 [tokens, width]."""
    directions = torch.randn(_SHARED_DIRECTIONS, width, generator=generator).div_(_SHARED_DIRECTIONS**0.5)
    inputs = torch.randn(TOKENS, width, generator=generator)
    inputs.addmm_(torch.randn(TOKENS, _SHARED_DIRECTIONS, generator=generator), directions)
    return inputs.mul_(torch.randn(width, generator=generator).mul_(0.5).exp_())
