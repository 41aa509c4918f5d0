"""One attention block shared by threads: each call gets its own projection input back."""

from __future__ import annotations

from pathlib import Path

import torch

from qconv.artifacts.source import Source
from qconv.calibration.forward import Decoder
from qconv.executors.threads import Threads

MODEL = Path(__file__).parents[2] / "evals/models/tiny-coder-moe"


def test_calls_in_several_threads_do_not_see_each_others_inputs() -> None:
    source = Source.open(MODEL)
    decoder = Decoder(MODEL, source.architecture)
    layer = source.architecture.layers[0]
    names = [name for name, _ in layer.tensors() if ".self_attn." in name]
    tensors = {name: source.read(name) for name in names}
    block = decoder.attention(layer, tensors)
    generator = torch.Generator().manual_seed(0)
    # Enough calls of a few milliseconds that four threads overlap in nearly all of them.
    inputs = [torch.randn(2, 64, 256, generator=generator) for _ in range(64)]
    with torch.no_grad(), Threads(1) as alone:
        expected = list(alone.map(block.with_inputs, inputs))
    with Threads(4) as together:
        found = list(together.map(block.with_inputs, inputs))
    for (output, read), (same_output, same_read) in zip(expected, found, strict=True):
        assert torch.equal(output, same_output)
        assert len(read) == 2
        assert all(map(torch.equal, read, same_read))
