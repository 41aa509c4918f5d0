"""What engines do with the builds that qconv writes, as one table: which read a format, and what they refuse of it.

Every entry says in which version, and how it is known: ``run`` on a build, or ``read`` in the code. ``plan`` and
``quantize`` tell what concerns a build; the table of README.md says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qconv.core.qtensor import CHANNEL, Grid, Number

VLLM, SGLANG, TRANSFORMERS = "vLLM 0.32.0", "SGLang 0.5.23", "transformers 5.23.0"
AUTOAWQ, AUTOGPTQ, GPTQMODEL = "AutoAWQ 0.2.9", "AutoGPTQ 0.7.1", "GPTQModel 7.7.0"
Known = Literal["run", "read"]

READERS: dict[str, dict[str, Known]] = {
    "awq": {VLLM: "run", AUTOAWQ: "run", SGLANG: "read"},
    "w4a16": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "gptq": {VLLM: "run", GPTQMODEL: "run", AUTOGPTQ: "run", SGLANG: "read"},
    "fp8": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "fp8_dynamic": {VLLM: "run", TRANSFORMERS: "run", SGLANG: "read"},
    "fp8_static": {TRANSFORMERS: "run", VLLM: "read", SGLANG: "read"},
    "w8a8": {VLLM: "read", SGLANG: "read"},
    "w4a8": {TRANSFORMERS: "run", VLLM: "read", SGLANG: "read"},
}
"""Who loads a format, by its name."""

KERNEL_GROUPS = (32, 64, 128, CHANNEL)
"""The group sizes for which vLLM and SGLang have kernels of compressed-tensors' integers."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that an engine does not do.

    Attributes:
        engine: Its name and version.
        known: How it is known.
        format: The format that it concerns.
        concerns: Whether a build is concerned, from its grid and whether it has quantized experts.
        what: What the engine does then.
        instead: What to take instead.
    """

    engine: str
    known: Known
    format: str
    concerns: Callable[[Grid, bool], bool]
    what: str
    instead: str

    def __str__(self) -> str:
        return f"{self.engine} {self.what} ({self.known}): {self.instead}"


def _odd_groups(grid: Grid, experts: bool) -> bool:
    return grid.group_size not in KERNEL_GROUPS


def _zero_points(grid: Grid, experts: bool) -> bool:
    return not grid.symmetric


def _few_bits(grid: Grid, experts: bool) -> bool:
    return grid.bits not in (4, 8)


LIMITS = (
    Limit(
        VLLM,
        "run",
        "gptq",
        lambda grid, experts: grid.act_order and grid.group_size != CHANNEL,
        "refuses desc_act",
        "gptq.ordering static needs none and is about as good",
    ),
    Limit(VLLM, "run", "gptq", _zero_points, "refuses GPTQ with zero points", "take symmetric, or format awq"),
    Limit(VLLM, "run", "gptq", _few_bits, "refuses GPTQ of 2 and 3 bits", "take 4 or 8"),
    Limit(
        SGLANG,
        "read",
        "gptq",
        lambda grid, experts: experts and (_few_bits(grid, experts) or _zero_points(grid, experts)),
        "has experts in GPTQ of 4 and 8 bits without zero points alone",
        "take those, or format awq",
    ),
    Limit(VLLM, "read", "w4a16", _odd_groups, "has no kernel for such groups", "take 32, 64, 128 or -1"),
    Limit(SGLANG, "read", "w4a16", _odd_groups, "has no kernel for such groups", "take 32, 64, 128 or -1"),
    Limit(
        VLLM,
        "read",
        "w4a16",
        lambda grid, experts: experts and grid.bits == 8 and not grid.symmetric,
        "has no kernel for experts of 8 bits with zero points",
        "take symmetric",
    ),
    Limit(TRANSFORMERS, "run", "w4a16", _zero_points, "fails on zero points in this format", "take symmetric"),
    Limit(
        TRANSFORMERS,
        "run",
        "fp8_dynamic",
        lambda grid, experts: grid.group_size != CHANNEL,
        "fails on blocks in this format",
        "--fmt fp8 has the same blocks",
    ),
    Limit(
        TRANSFORMERS,
        "run",
        "fp8_static",
        lambda grid, experts: experts,
        "computes experts without the stored scales of their inputs",
        "vLLM and SGLang use them",
    ),
)


_MIXED: dict[Number, str] = {"int": "w4a16", "e4m3": "fp8_dynamic", "e2m1": "nvfp4"}
"""The formats that hold each other's grids, by what codes are in them."""


def limits(format: str, grid: Grid, *, experts: bool) -> Iterator[Limit]:
    """What engines do not do with a build.

    Args:
        format: Its format's name.
        grid: Its grid.
        experts: Whether experts are among its quantized linears.
    """
    if format in _MIXED.values():
        format = _MIXED[grid.number]
    return (limit for limit in LIMITS if limit.format == format and limit.concerns(grid, experts))
