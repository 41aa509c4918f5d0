"""Which bytes of a shard stand for all of them in a fingerprint: its header, and pages that are spread evenly."""

from __future__ import annotations

SAMPLE_BYTES = 4096
"""Of each page."""
_SAMPLES_PER_SHARD = 64


def sampled_offsets(start: int, end: int) -> range:
    """Where the pages begin.

    Args:
        start: Where a shard's tensors begin.
        end: Where they end.
    """
    return range(start, end, max((end - start) // _SAMPLES_PER_SHARD, SAMPLE_BYTES))
