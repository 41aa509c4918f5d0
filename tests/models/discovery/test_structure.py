"""Discovered structures against declared families, against what transformers saves, and against real inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from evals.model_types import TYPES, config_of, model_of
from qconv.core.architecture import Layer, Moe
from qconv.errors import CheckpointError
from qconv.models import architecture
from qconv.models.discovery import Discovery, LayerStructure, ReadTensor, discover
from tests.models.test_families import BASE, FAMILIES, VARIATIONS, saved


def declared(layer: Layer) -> Iterator[ReadTensor]:
    """The groups of a layer whose family is declared."""
    yield ReadTensor(tuple(sorted(one.name for one in layer.attention.linears()[:3])), layer.input_norm.name)
    yield ReadTensor((layer.heads.o.name,), None)
    readers = [router.name for router in layer.routers()]
    for mlp in layer.mlps():
        if isinstance(layer.mlp, Moe) and mlp is not layer.mlp.shared_expert:
            continue
        readers += [mlp.gate.name, mlp.up.name]
        yield ReadTensor((mlp.down.name,), None)
    if isinstance(layer.mlp, Moe):
        readers.append(f"{layer.mlp.router.name.rpartition('.')[0]}.experts")
    yield ReadTensor(tuple(sorted(readers)), layer.post_attention_norm.name)


@pytest.mark.parametrize(("model_type", "changes"), VARIATIONS)
def test_declared_families_are_discovered(model_type: str, changes: dict[str, Any]) -> None:
    values = AutoConfig.for_model(model_type, **BASE | FAMILIES[model_type] | changes).to_dict()
    expected, found = architecture(values), discover(values)
    assert found.tensors() == dict(expected.tensors())
    assert found.model_type == model_type
    for layer, structure in zip(expected.layers, found.layers, strict=True):
        assert structure.index == layer.index
        assert sorted(structure.groups, key=_readers) == sorted(declared(layer), key=_readers)
        assert structure.groups[0].producer == layer.input_norm.name
        assert structure.tensors == dict(layer.tensors())
        sparse = isinstance(layer.mlp, Moe)
        assert len(structure.experts) == sparse
        beside = [one for one in layer.linears() if ".experts." not in one.name]
        gates = [one for one in layer.routers() if one.name in structure.linears]  # Qwen2's shared gate is a linear
        assert structure.linears == {one.name: (one.out_features, one.in_features) for one in [*beside, *gates]}
        if isinstance(layer.mlp, Moe):
            _check_experts(structure, layer.mlp)


def _readers(group: ReadTensor) -> tuple[str, ...]:
    return group.readers


def _check_experts(structure: LayerStructure, moe: Moe) -> None:
    (experts,) = structure.experts
    assert experts.shapes["down_proj"] == (
        len(moe.experts),
        moe.experts[0].down.out_features,
        moe.experts[0].down.in_features,
    )
    assert experts.stored["down_proj"] == tuple(mlp.down.weight for mlp in moe.experts)
    gates, ups = ([getattr(mlp, leaf).weight for mlp in moe.experts] for leaf in ("gate", "up"))
    assert experts.stored["gate_up_proj"] == (*gates, *ups)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_tensor_and_every_shared_input(model_type: str, tmp_path: Path) -> None:
    config = config_of(model_type)
    model = model_of(config)
    found = discover(config.to_dict())
    assert found.tensors() == saved(model, tmp_path)
    _check_inputs(model, found)


def _check_inputs(model: Any, found: Discovery) -> None:
    """Run real tokens: readers of a group get one tensor, those of different groups do not."""
    seen, made = _values(model)
    for layer in found.layers:
        inputs = {}
        for group in layer.groups:
            first, *others = (seen[name] for name in group.readers)
            for other in others:
                assert torch.equal(first, other), group
            inputs[group] = first
            if group.producer is not None:
                assert torch.equal(first, made[group.producer]), group
        values = list(inputs.values())
        for at, one in enumerate(values):
            assert not any(one.shape == other.shape and torch.equal(one, other) for other in values[at + 1 :])


def _values(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of linears, routers and experts, and outputs of norms, [tokens, features], by name in the checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    untyped: Any = model
    names = {}
    for name, module in model.named_modules():
        leaf = next((leaf for leaf, _ in module.named_parameters(recurse=False)), None)
        if leaf is not None:
            first = next(iter(revert_weight_conversion(untyped, {f"{name}.{leaf}": state[f"{name}.{leaf}"]})))
            names[name] = first.partition(".experts")[0] + ".experts" if ".experts" in name else first[: -len(leaf) - 1]
    seen: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, called in names.items():
        module = model.get_submodule(name)

        def before(_: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], called: str = called) -> None:
            value = next((one for one in (*arguments, *named.values()) if isinstance(one, Tensor)), None)
            if value is not None and value.is_floating_point():
                seen[called] = value.flatten(0, -2).float()

        def after(_: Any, arguments: Any, output: Any, called: str = called) -> None:
            if isinstance(output, Tensor):
                made[called] = output.flatten(0, -2).float()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    with torch.no_grad(), warnings.catch_warnings():
        model(input_ids=torch.arange(3, 15).unsqueeze(0), use_cache=False)
    return seen, made


def test_a_true_size_costs_no_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = discover({"model_type": "deepseek_v3", "num_hidden_layers": 5})
    assert found.layers[4].experts[0].shapes["gate_up_proj"] == (256, 4096, 7168)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kibibytes; a layer has 22 GB


def test_another_name_and_a_nested_text_part() -> None:
    text = {"num_hidden_layers": 4, "hidden_size": 64, "n_routed_experts": 32, "moe_intermediate_size": 32}
    plain = discover({"model_type": "deepseek_v3", **text})
    assert discover({"model_type": "kimi_k2", **text}) == plain
    nested = {"model_type": "kimi_k25", "vision_config": {}, "text_config": {"model_type": "kimi_k2", **text}}
    assert discover(nested) == plain


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({}, "no model_type"),
    "unknown": ({"model_type": "martian"}, "model_type 'martian', which transformers lacks"),
    "not for text": ({"model_type": "vit"}, "model_type 'vit', which transformers lacks"),
    "a wrong kind": ({"model_type": "llama", "hidden_size": "many"}, "config.json: "),
    "no head fits": ({"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 2}, "config.json: "),
    "layers": ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    "experts": ({"model_type": "qwen3_moe", "num_experts": 10**6, "num_hidden_layers": 9}, "num_experts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_named(name: str) -> None:
    values, said = BROKEN[name]
    with pytest.raises(CheckpointError) as caught:
        discover(values)
    assert said in caught.value.message


def test_a_type_that_transformers_lacks_names_the_file_to_write() -> None:
    with pytest.raises(CheckpointError) as caught:
        discover({"model_type": "martian", "auto_map": {"AutoModelForCausalLM": "modeling_martian.Martian"}})
    assert "qconv/models/martian.py" in str(caught.value.hint)
