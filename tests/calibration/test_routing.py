"""Which tokens an expert sees, against the router's own arithmetic on transformers' activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.calibration import layer as layer_module
from qconv.calibration.attention import calibrate_attention
from qconv.calibration.corpus import build_tokens
from qconv.calibration.layer import LayerBuild
from qconv.calibration.routing import Routing
from qconv.calibration.run import Calibration
from qconv.calibration.schemes import scheme_of
from qconv.executors.threads import Threads
from qconv.folders.journal import Journal
from qconv.planning.plan import make_plan
from tests.calibration.test_forward import Float32File
from tests.conftest import random_model, save_model, small_recipe

RECIPE = small_recipe("awq", "w4a16", calibration={"propagate": False})
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"num_experts_per_tok": 3}),
    ("mixtral", {}),
]


def routing_of(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Routing:
    """The routing of layer 0, on exact activations."""
    monkeypatch.setattr(layer_module, "ActivationFile", Float32File)
    source = Source.open(model)
    plan = make_plan(source.architecture, RECIPE, lambda name: torch.bfloat16)
    work.mkdir()
    with Threads(1) as workers:
        tokens = build_tokens(RECIPE.calibration, model)
        journal = Journal.create(work / "journal.jsonl", {})
        calibration = Calibration(source, RECIPE.calibration, tokens, work, journal, workers)
        unit = plan.units[1]
        assert unit.layer is not None
        names = [linear.name for linear in unit.layer.linears()]
        schemes = {name: scheme_of(plan.schemes[name], RECIPE) for name in names}
        context = calibration.context(unit.layer, [LayerBuild.of(source, unit.layer, RECIPE, names, schemes)])
        with torch.no_grad():
            for _ in calibrate_attention(context):
                pass
            layer, decoder = context.layer, context.decoder
            norm = layer.post_attention_norm
            module = decoder.norm(layer, norm, source.read(norm.weight))
            return Routing(source, decoder, layer, context.work, module, context.home)


def transformers_mlp_input(model: Path) -> Tensor:
    """What transformers' sparse block of layer 0 sees, float32 [tokens, hidden]."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.eval()
    seen: list[Tensor] = []
    loaded.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        loaded(build_tokens(RECIPE.calibration, model).ids.long())
    return seen[0]


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=lambda value: str(value))
def test_assignments_are_the_routers_top_experts(
    model_type: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(random_model(model_type, **changes), tmp_path / "model")
    routing = routing_of(model, tmp_path / "work", monkeypatch)
    source = Source.open(model)
    mlp: Any = source.architecture.layers[0].mlp
    inputs = transformers_mlp_input(model)

    # The definition: softmax over all experts, the best k, renormalized where the config says so (Mixtral always).
    probabilities = (inputs.double() @ source.read(mlp.router.weight).double().t()).softmax(-1)
    best = probabilities.topk(mlp.top_k)
    factors = best.values
    if model_type == "mixtral" or changes.get("norm_topk_prob", False):
        factors = factors / factors.sum(-1, keepdim=True)
    expected = torch.zeros_like(probabilities).scatter_(1, best.indices, factors)

    found = torch.zeros_like(probabilities)
    for index in range(len(mlp.experts)):
        assignment = routing.assignment(index)
        assert len(assignment.tokens) == len(assignment.weights) == int(routing.counts[index])
        assert bool((assignment.tokens.diff() > 0).all()), "ascending, each token once"
        found[assignment.tokens, index] = assignment.weights.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert int(routing.counts.sum()) == len(inputs) * mlp.top_k
    if mlp.shared_expert_gate is not None:
        shared = routing.assignment(len(mlp.experts))
        assert torch.equal(shared.tokens, torch.arange(len(inputs)))
        gate = source.read(mlp.shared_expert_gate.weight).double()
        torch.testing.assert_close(
            shared.weights.double(), torch.sigmoid(inputs.double() @ gate.t()).squeeze(-1), rtol=1e-4, atol=1e-5
        )


def test_a_dense_layer_sends_every_token_with_weight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(random_model("qwen3"), tmp_path / "model")
    assignment = routing_of(model, tmp_path / "work", monkeypatch).assignment(0)
    assert torch.equal(assignment.tokens, torch.arange(RECIPE.calibration.tokens))
    assert bool((assignment.weights == 1.0).all())
