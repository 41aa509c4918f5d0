"""Compensation of columns in their own order, whatever the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.hessian import Factor, factorize
from qconv.core.settings import GptqSettings
from qconv.methods.compensated.columns import compensate_


def in_order(
    weight: Tensor, fit: Fit[Any], hessian: Tensor, factor: Callable[[int], Factor], settings: GptqSettings
) -> Tensor:
    """See :class:`qconv.core.method.Rounding`."""
    own = factorize(hessian, settings.model_copy(update={"ordering": "none"}), fit.width)
    return compensate_(weight, fit, own, settings.block_size)


ROUNDING = in_order
