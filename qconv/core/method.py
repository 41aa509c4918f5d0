"""What a method of rounding must be able to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.hessian import Factor
from qconv.core.settings import GptqSettings


class Rounding(Protocol):
    """Chooses the values of a weight, given its scales and the second moments of its inputs.

    What it gives is packed, compared row by row with the grid's own rounding, which stays where it costs less, and
    refined if the recipe says so: a method need do none of that.
    """

    def __call__(
        self,
        weight: Tensor,
        fit: Fit[Any],
        hessian: Tensor,
        factor: Callable[[int], Factor],
        settings: GptqSettings,
    ) -> Tensor:
        """The values, float32 [in_features, out_features].

        Args:
            weight: float32 [in_features, out_features]; may be overwritten.
            fit: Its scales, fixed.
            hessian: float32 [in_features, in_features], the mean over tokens of ``x x^T``; not changed.
            factor: Gives its factor whose order keeps runs of so many columns together, made when first asked for.
            settings: How columns are worked through.

        Raises:
            QconvError: the second moments are not finite, or not positive semidefinite.
        """
