"""The streaming engine beside the local one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.errors import UsageError
from qconv.evaluation.engines import open_engine
from qconv.evaluation.engines.base import Prompt, Sampling


def test_logits_are_the_local_engines(rtn_build: Path) -> None:
    local, streamed = (
        open_engine(name, rtn_build, dtype="float32", device="cpu", rows=2) for name in ("local", "stream")
    )
    sequences = [list(range(30)), list(range(100, 117)), [5]]
    for one, other in zip(local.logits(sequences), streamed.logits(sequences), strict=True):
        # The order of float32 sums alone.
        np.testing.assert_allclose(other, one, atol=2e-4)
    assert streamed.identity["engine"] == "stream"
    assert streamed.rows == 2


def test_it_does_not_generate(rtn_build: Path) -> None:
    streamed = open_engine("stream", rtn_build, dtype="float32", device="cpu", rows=2)
    with pytest.raises(UsageError, match="--stream"):
        streamed.complete([Prompt("x")], Sampling(max_tokens=1))
