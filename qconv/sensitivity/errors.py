"""What each type would cost each tensor of a GGUF build, predicted from samples of its rows.

Of a linear with output gradients' squares F and inputs' mean squares h, a weight error d costs about ``1/2 sum_r F_r
sum_c h_c d_rc^2``. Rows are drawn in proportion to F, so that a few dozen say what all of them cost; of a layer's
experts those are drawn that matter. Errors are those of the encoder with importance, times what calibrated rounding was
measured to leave of the divergence at that type: compensation hardly changes the order of types.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.gguf_tensors import encoder
from qconv.artifacts.source import Source
from qconv.core.architecture import HEAD
from qconv.core.workers import Workers
from qconv.errors import CheckpointError
from qconv.formats.gguf.names import GgufTensor
from qconv.grids.ggml import encode
from qconv.planning.allocation import Choice
from qconv.sensitivity.sweep import INPUTS, OUTPUTS, SEEN
from qconv.verification.blocks import decoded

T: TypeAlias = GGMLQuantizationType

TYPES = (T.Q2_K, T.IQ3_S, T.Q3_K, T.IQ4_XS, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0)
"""What is chosen from, where nothing is excluded."""
SMALL_TYPES = (T.IQ4_NL, T.Q4_0, T.Q5_0, T.Q5_1, T.Q8_0)
"""Where blocks of 256 do not divide the rows."""
COMPENSATED = {
    T.Q2_K: 0.30,
    T.IQ3_S: 0.26,
    T.Q3_K: 0.25,
    T.IQ4_XS: 0.30,
    T.IQ4_NL: 0.30,
    T.Q4_K: 0.32,
    T.Q4_0: 0.32,
    T.Q5_K: 0.38,
    T.Q5_0: 0.38,
    T.Q5_1: 0.38,
    T.Q6_K: 0.39,
    T.Q8_0: 0.40,
}
"""What calibrated rounding leaves of the divergence (README, Quality)."""
ROWS = 96
"""Drawn of each linear."""
EXPERTS = 8
"""Drawn of each layer."""
_EXPONENT = 0.5
"""Columns count their inputs' mean square to this power when scales are searched, as in a build."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Predicts what types cost.

    Attributes:
        source: The model.
        statistics: What ``qconv sensitivity`` measured, by name.
        types: What is chosen from.
        calibrated: Whether linears of layers are to be rounded by GPTQ.
    """

    source: Source
    statistics: Mapping[str, Tensor]
    types: Sequence[T]
    calibrated: bool

    def of(self, tensors: Iterable[GgufTensor], workers: Workers) -> dict[str, list[Choice[T]]]:
        """The choices of each tensor that can be quantized, by name.

        Raises:
            CheckpointError: the statistics are another model's; a weight cannot be read.
        """
        wanted = [tensor for tensor in tensors if tensor.quantizable]
        return dict(zip((one.name for one in wanted), workers.map(self._choices, wanted), strict=True))

    def _choices(self, tensor: GgufTensor) -> list[Choice[T]]:
        fitting = [one for one in self.types if tensor.columns % GGML_QUANT_SIZES[one][0] == 0]
        if not fitting:
            fitting = [one for one in SMALL_TYPES if tensor.columns % GGML_QUANT_SIZES[one][0] == 0]
        if not fitting:
            fitting = [T.F16]
        losses = dict.fromkeys(fitting, 0.0)
        for share, rows, importance, scale in self._samples(tensor):
            for type in fitting:
                losses[type] += scale * self._loss(rows, type, importance, share)
        choices = []
        for type in fitting:
            block, nbytes = GGML_QUANT_SIZES[type]
            size = tensor.numel // block * nbytes
            left = COMPENSATED.get(type, 1.0) if self.calibrated and tensor.layer is not None else 1.0
            choices.append(Choice(type, size, left * losses[type]))
        return choices

    @staticmethod
    def _loss(rows: Tensor, type: T, importance: Tensor, share: Tensor) -> float:
        """Half the mean over rows of their squared errors, columns counting ``share``."""
        if type is T.F16:
            errors = rows - rows.half().float()
        else:
            errors = decoded(encode(rows, encoder(type), importance), type).sub_(rows)
        return 0.5 * float((errors.square_() @ share).mean())

    def _samples(self, tensor: GgufTensor) -> Iterable[tuple[Tensor, Tensor, Tensor, float]]:
        """Parts of a tensor: what columns count, rows, the columns' importance, and what the rows' mean stands for."""
        if tensor.kind is MODEL_TENSOR.TOKEN_EMBD:
            yield self._of_embedding(tensor)
            return
        names = [name.removesuffix(".weight") for name in tensor.sources]
        if tensor.kind is MODEL_TENSOR.OUTPUT:
            names = [HEAD]
        parts = {name: (self._stat(name, OUTPUTS), self._stat(name, INPUTS)) for name in names}
        weights = torch.tensor([float(outputs.sum()) * float(inputs.mean()) for outputs, inputs in parts.values()])
        if not float(weights.sum()) > 0.0:
            return
        for part, factor in _drawn(weights.double(), EXPERTS):
            outputs, inputs = parts[names[part]]
            total = float(outputs.sum())
            if total > 0.0:
                chosen = torch.multinomial(outputs, ROWS, replacement=True, generator=_generator(tensor.name, part))
                rows = self._rows(tensor.sources[part], chosen)
                yield inputs, rows, inputs.clamp(min=1e-12).pow(_EXPONENT), factor * total

    def _of_embedding(self, tensor: GgufTensor) -> tuple[Tensor, Tensor, Tensor, float]:
        name = tensor.sources[0].removesuffix(".weight")
        outputs, counts = self._stat(name, OUTPUTS), self._stat(name, SEEN).double()
        chosen = torch.multinomial(counts, 4 * ROWS, replacement=True, generator=_generator(name, 0))
        return outputs, self._rows(tensor.sources[0], chosen), torch.ones(tensor.columns), 1.0

    def _rows(self, name: str, chosen: Tensor) -> Tensor:
        return self.source.checkpoint.gather(name, chosen).float()

    def _stat(self, name: str, leaf: str) -> Tensor:
        key = f"{name}.{leaf}"
        if key not in self.statistics:
            raise CheckpointError(
                f"sensitivity: says nothing of {name}.",
                hint="It is of another model: run qconv sensitivity on this one.",
            )
        return self.statistics[key]


def _drawn(weights: Tensor, most: int) -> list[tuple[int, float]]:
    """Which of several parts stand for all, and what each counts.

    All of them where they are few; else systematically, in proportion to their weights (Madow 1949), so that the sum
    over the drawn of their values times their factors is that over all on average.
    """
    if len(weights) <= most:
        return [(index, 1.0) for index in range(len(weights))]
    passed = weights.cumsum(0)
    step = float(passed[-1]) / most
    found = []
    for number in range(most):
        index = int(torch.searchsorted(passed, (number + 0.5) * step))
        found.append((index, step / float(weights[index])))
    return found


def _generator(name: str, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {part}".encode()))
