"""gpt-oss's layout: names, bytes, words, and what has no place in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qconv.core.qtensor import QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import Place
from qconv.formats.float4 import MXFP4
from qconv.formats.gpt_oss import FORMAT
from tests.gpt_oss import SECTION

EXPERTS = "model.layers.7.mlp.experts"


@given(rows=st.integers(1, 6), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_bytes_are_what_transformers_decodes_and_come_back(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 32 * groups), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (rows, groups), generator=generator, dtype=torch.uint8)
    weight = QTensor(MXFP4, codes, scales.view(torch.float8_e8m0fnu), None)
    stored = dict(FORMAT.pack("x", weight))
    specs = FORMAT.specs("x", rows, 32 * groups, MXFP4)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        one.name: (one.dtype, one.shape) for one in specs
    }
    theirs = convert_moe_packed_tensors(stored["x.weight_blocks"][None], stored["x.weight_scales"][None])
    assert torch.equal(theirs[0].t().float(), weight.dequantize())
    again = FORMAT.unpack("x", weight.shape, stored.__getitem__, MXFP4)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales.view(torch.uint8), scales)


def test_places() -> None:
    assert FORMAT.place(f"{EXPERTS}.5.gate_proj.weight_blocks") == Place(f"{EXPERTS}.gate_up_proj_blocks", 5, 0, 2)
    assert FORMAT.place(f"{EXPERTS}.5.up_proj.weight_scales") == Place(f"{EXPERTS}.gate_up_proj_scales", 5, 1, 2)
    assert FORMAT.place(f"{EXPERTS}.12.down_proj.bias") == Place(f"{EXPERTS}.down_proj_bias", 12)
    assert FORMAT.place("model.layers.7.mlp.router.bias") is None
    assert FORMAT.place("model.layers.7.self_attn.q_proj.bias") is None


def test_words_are_the_published_ones() -> None:
    experts = [f"{EXPERTS}.{number}.{role}_proj" for number in range(2) for role in ("gate", "up", "down")]
    section = FORMAT.config({MXFP4: experts}, ["model.layers.7.self_attn.q_proj", "lm_head"])
    assert section == SECTION
    assert FORMAT.recognizes(section)
    described = FORMAT.read_config(section, torch.bfloat16)
    assert described.grids([*experts, "lm_head", "model.layers.7.self_attn.q_proj"]) == dict.fromkeys(experts, MXFP4)
    assert not FORMAT.is_skipped(experts[0], described.skipped)
    assert FORMAT.is_skipped("model.layers.7.mlp.router", ())
    with pytest.raises(CheckpointError, match="modules_to_not_convert is not a list"):
        FORMAT.read_config(section | {"modules_to_not_convert": "lm_head"}, torch.bfloat16)


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(RecipeError, match="q_proj is to be quantized"):
        FORMAT.config({MXFP4: ["model.layers.7.self_attn.q_proj"]}, ())
    with pytest.raises(RecipeError, match=r"experts\.0\.up_proj is not to be quantized"):
        FORMAT.config({MXFP4: [f"{EXPERTS}.0.gate_proj"]}, [f"{EXPERTS}.0.up_proj"])
    with pytest.raises(RecipeError):
        FORMAT.grid(GridSettings(bits=4, group_size=16), torch.bfloat16)
    with pytest.raises(RecipeError, match=r"grid\.number"):
        FORMAT.grid(GridSettings(bits=4, group_size=32), torch.bfloat16, "int")
    assert FORMAT.check(8, 48, MXFP4) == "groups of 32 do not divide its 48 input features"
