"""Scales of a cache of keys and values: their names, dtypes, and what rounding to their dtype may not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.checkpoint.fp8 import is_cache_scale
from qconv.checkpoint.header import TensorSpec
from qconv.formats import formats, get_format
from qconv.formats.cache import COMPRESSED_TENSORS, MODELOPT, NAMINGS, scale_of

ATTENTION = "model.layers.3.self_attn"


def test_the_names_are_those_that_readers_know() -> None:
    assert COMPRESSED_TENSORS.specs(ATTENTION, torch.bfloat16) == (
        TensorSpec(f"{ATTENTION}.k_scale", torch.bfloat16, (1,)),
        TensorSpec(f"{ATTENTION}.v_scale", torch.bfloat16, (1,)),
    )
    assert MODELOPT.specs(ATTENTION, torch.bfloat16) == (
        TensorSpec(f"{ATTENTION}.k_proj.k_scale", torch.float32, ()),
        TensorSpec(f"{ATTENTION}.v_proj.v_scale", torch.float32, ()),
    )
    for naming in NAMINGS:
        assert all(is_cache_scale(spec.name) for spec in naming.specs(ATTENTION, torch.bfloat16))
        tensors = dict(naming.tensors(ATTENTION, torch.bfloat16, 448.0, 2 * 448.0))
        assert [(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()] == [
            (spec.name, spec.dtype, spec.shape) for spec in naming.specs(ATTENTION, torch.bfloat16)
        ]
        assert [float(one) for one in tensors.values()] == [1.0, 2.0]


@given(st.floats(1e-6, 1e6), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_nothing_that_was_seen_exceeds_the_range(largest: float, dtype: torch.dtype) -> None:
    scale = scale_of(largest, dtype)
    assert scale.dtype == dtype
    wanted = largest / 448.0
    assert float(scale) >= wanted
    step = torch.finfo(dtype).eps * float(scale) + torch.finfo(dtype).smallest_normal
    assert float(scale) - wanted <= step  # the next smaller one would not do


def test_a_cache_of_zeros_has_a_scale() -> None:
    assert float(scale_of(0.0, torch.bfloat16)) == 1.0


@pytest.mark.parametrize("name", formats())
def test_a_format_that_holds_them_says_so_in_config_json(name: str) -> None:
    naming = get_format(name).cache
    assert naming is None or naming.section["kv_cache_scheme"]["num_bits"] == 8
