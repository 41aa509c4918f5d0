"""The kernels around the products."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.emulator import SCHEDULES, Schedule
from tests.kernels.helpers import run_gather, run_sum

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sum_of_slices(dtype: torch.dtype, schedule: Schedule) -> None:
    """More and fewer elements than a block has threads for; rounded once, as torch rounds."""
    for slices, elements in ((1, 4), (3, 1000), (5, 4096 + 32)):
        result = run_sum(slices, elements, dtype, schedule=schedule)
        assert result.report.errors == ()
        assert result.relative_error < {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_gather(schedule: Schedule) -> None:
    """Exact copies, for one linear and for experts of which one has no rows."""
    for experts in (None, torch.tensor([2, 0, 2, 3, 2])):
        for depth in (96, 4096):
            result = run_gather(experts, depth, schedule=schedule)
            assert result.report.errors == ()
            assert torch.equal(result.output.double(), result.reference)
