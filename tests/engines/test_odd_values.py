"""Rules about builds whose config says anything at all: each comes to a verdict, none raises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qconv.engines.subject import Deployment, Stored, Subject
from qconv.engines.table import judgements
from tests.engines import builds
from tests.engines.builds import Draft

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**99, 0.5, 1e308, float("nan"), "", "x", "re:(", "re:[", "\x00", [], {}),
    *([[[]]], ["x", 1, None], [1, None], [0, 0], [-1, 10**99], [{}], {"x": 1}, {"x": {"targets": 7}}, {"": None}),
)
"""Of every type of JSON, and in the shapes that rules look for."""
RANKS = Deployment(tp=3, ep=1)


def changed(value: Any) -> Iterator[Any]:
    """Copies of a JSON value, in each of which one value is an odd one."""
    places = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in places:
        for other in (*ODD, *changed(inner)):
            copied = copy.copy(value)
            copied[key] = other
            yield copied


def mixed() -> Draft:
    """Two config groups, each with targets of its own."""
    draft = builds.w4a16()
    assert draft.section is not None
    first = draft.section["config_groups"]["group_0"]
    draft.section["config_groups"]["group_1"] = copy.deepcopy(first) | {"targets": ["re:.*experts.*"]}
    return draft


@pytest.mark.parametrize("part", ["section", "config", "generation", "quantization_file"])
@pytest.mark.parametrize("make", [builds.awq, builds.gptq, builds.fp8, mixed], ids=["awq", "gptq", "fp8", "mixed"])
def test_every_engine_judges_odd_configs(make: Callable[[], Draft], part: str) -> None:
    draft = make()
    draft.quantization_file = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    for other in changed(getattr(draft, part)):
        one = copy.copy(draft)
        setattr(one, part, other)
        assert len(judgements(one.subject(), (), RANKS)) == 6, other


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 0), (1, 0), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("make", [builds.awq, builds.gptq, builds.fp8, builds.w4a16, builds.nvfp4, builds.modelopt])
def test_every_engine_judges_odd_shapes(make: Callable[[], Draft], shape: tuple[int, ...]) -> None:
    for name in [name for name in make().tensors if ".layers.0." in name]:
        draft = make()
        draft.reshape(name, *shape)
        draft.values[name] = torch.ones(shape)[:1] if shape else torch.ones(())
        assert len(judgements(draft.subject(), (), RANKS)) == 6, name


@pytest.mark.parametrize("shape", [(), (0,), (7,)], ids=str)
def test_every_engine_judges_odd_gguf(shape: tuple[int, ...]) -> None:
    keys = {
        "general.architecture": "qwen3moe",
        "qwen3moe.embedding_length": 64,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.expert_count": 4,
        "qwen3moe.rope.scaling.type": "yarn",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.model": "gpt2",
    }
    tensors = {name: Stored("Q8_0", shape) for name in ("token_embd.weight", "blk.0.attn_q.weight")}
    for other in changed(keys):
        assert len(judgements(Subject({}, None, tensors, keys=other), (), RANKS)) == 6, other
