"""A gradient taken back layer by layer against torch.autograd on the whole model, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evals.model_types import save_random
from qconv.artifacts.source import Source
from qconv.calibration.activations import ActivationFile
from qconv.calibration.forward import Decoder
from qconv.executors.threads import Threads
from qconv.sensitivity.files import LayerFiles
from qconv.sensitivity.head import Head
from qconv.sensitivity.layer import LayerBackward, Seen, _Mlps, _Tokens, limited
from tests.conftest import BUNDLED, VOCABULARY, random_model, save_model

DTYPE = torch.float64
SEQUENCES, LENGTH = 3, 24


class Tapped(nn.Module):
    """transformers' fused experts, one by one, each linear's output remembered with its gradient."""

    def __init__(self, experts: Any, taps: dict[str, list[Tensor]], name: str) -> None:
        super().__init__()
        self.experts, self.taps, self.name = experts, taps, name

    def forward(self, hidden: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        count = len(self.experts.down_proj)
        if chosen is None or weights is None:  # Llama 4's: all experts' inputs behind each other
            parts = list(hidden.view(count, -1, hidden.shape[-1]).unbind())
            for expert, part in enumerate(parts):
                asked = part.any(-1).nonzero().squeeze(-1)  # the others are told nothing, and are not the expert's
                parts[expert] = torch.zeros_like(part).index_copy(0, asked, self._expert(expert, part[asked]))
            return torch.cat(parts)
        total = torch.zeros_like(hidden)
        for expert in range(count):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            out = self._expert(expert, hidden[tokens])
            total = total.index_add(0, tokens, out * weights[tokens, place].unsqueeze(-1))
        return total

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        own, hidden = self.experts, inputs.shape[-1]
        joined, down = own.gate_up_proj[expert], own.down_proj[expert]
        turned = joined.shape[0] == hidden != joined.shape[1]
        by_turns = not getattr(own, "is_concatenated", True)
        bias, after = (getattr(own, f"{leaf}_bias", None) for leaf in ("gate_up_proj", "down_proj"))
        pair = inputs @ (joined if turned else joined.t()) + (0.0 if bias is None else bias[expert])
        halves = (pair[:, ::2], pair[:, 1::2]) if by_turns else pair.chunk(2, dim=-1)
        gate, up = (
            self._tap(one.clone(), f"{expert}.{kind}_proj") for one, kind in zip(halves, ("gate", "up"), strict=True)
        )
        inner = own._apply_gate(torch.stack([gate, up], -1).flatten(-2)) if by_turns else own.act_fn(gate) * up
        out = inner @ (down if turned else down.t()) + (0.0 if after is None else after[expert])
        return self._tap(out, f"{expert}.down_proj")

    def _tap(self, output: Tensor, name: str) -> Tensor:
        if output.requires_grad:
            output.retain_grad()
        self.taps.setdefault(f"{self.name}.{name}", []).append(output)
        return output


class Whole:
    """A model as a whole, and what torch.autograd says of each linear's outputs."""

    def __init__(self, model: Any) -> None:
        self.model, self.taps, self.inputs = model.eval(), dict[str, list[Tensor]](), dict[int, Tensor]()
        for parameter in model.parameters():  # and not the rotary frequencies, which are computed in float32
            parameter.data = parameter.data.to(DTYPE)
        for name, module in self.model.named_modules():
            if name.endswith(".experts"):
                self.model.set_submodule(name, Tapped(module, self.taps, name))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                module.register_forward_hook(self._tapping(name))
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(lambda _, args, index=index: self.inputs.__setitem__(index, args[0]))

    def _tapping(self, name: str) -> Callable[..., None]:
        def tap(module: nn.Module, arguments: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return  # a router's
            if output.requires_grad:
                output.retain_grad()
            self.taps.setdefault(name, []).append(output)

        return tap

    def squares(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=ids, use_cache=False).logits
        logits.retain_grad()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        torch.autograd.backward(loss)
        self.head_squares = logits.grad.flatten(0, 1).square().sum(0)
        return {
            name: sum(one.grad.flatten(0, -2).square().sum(0) for one in outputs if one.grad is not None)  # type: ignore[misc]
            for name, outputs in self.taps.items()
        }


def backward(
    source: Source, whole: Whole, ids: Tensor, folder: Path, limit: float = math.inf
) -> tuple[Seen, Tensor, Tensor]:
    """Layer by layer from the inputs that the whole model has; also the head's squares and the labels."""
    model, decoder = source.architecture, Decoder(source.checkpoint.path, source.architecture, DTYPE)
    tokens, hidden = ids.numel(), model.hidden_size
    final: dict[str, Tensor] = {}
    hook = whole.model.model.norm.register_forward_pre_hook(lambda _, args: final.update(states=args[0].detach()))
    chance = torch.rand(tokens, dtype=DTYPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = whole.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    hook.remove()
    head = Head(
        source, decoder.final_norm(source.read(model.final_norm.weight)), model.lm_head or model.embedding, DTYPE
    )
    slope, squares, _ = head.gradient(final["states"].view(tokens, hidden), chance)
    cumulated = logits.softmax(-1).cumsum(-1)
    labels = (cumulated < chance.unsqueeze(-1)).sum(-1)
    found: Seen = {}
    gradient = ActivationFile(folder / "gradient.bin", tokens, hidden, DTYPE, computed=DTYPE).create()
    gradient.write(0, slope)
    with Threads(2) as workers:
        for layer in reversed(model.layers):
            inputs = ActivationFile(
                folder / f"inputs-{layer.index}.bin", tokens, hidden, DTYPE, computed=DTYPE
            ).create()
            inputs.write(0, whole.inputs[layer.index].detach().view(tokens, hidden))
            files = LayerFiles.at(folder, inputs, gradient, LENGTH)
            files.middle.create()
            found |= LayerBackward(source, decoder, layer, files, workers, limit).run()
    return found, squares, labels


def disagreement(found: Seen, expected: dict[str, Tensor]) -> float:
    """The largest error of any linear's squares, relative to the linear's largest."""
    assert found.keys() <= expected.keys()
    return max(
        float((one.sums - expected[name]).abs().max() / expected[name].max().clamp(min=1e-300))
        for name, one in found.items()
    )


def both(folder: Path, tmp_path: Path) -> tuple[Seen, dict[str, Tensor], Tensor, Tensor]:
    """Layer by layer, and the whole model; of the head, too."""
    from transformers import AutoModelForCausalLM

    source = Source.open(folder)
    how = {} if source.architecture.family == "gpt_oss" else {"attn_implementation": "sdpa"}
    whole = Whole(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how))
    ids = torch.randint(3, 60, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    (tmp_path / "work").mkdir()
    found, head, labels = backward(source, whole, ids, tmp_path / "work")
    expected = {_in_checkpoint(name, source): one for name, one in whole.squares(ids, labels).items()}
    assert found.keys() == {linear.name for layer in source.architecture.layers for linear in layer.linears()}
    return found, expected, head, whole.head_squares


def _in_checkpoint(name: str, source: Source) -> str:
    """Mixtral's checkpoints have other names for what transformers calls as all others."""
    if source.architecture.family != "mixtral":
        return name
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(
            f"mlp.experts.{name.split('.')[5] if 'experts' in name else ''}.{ours}",
            f"block_sparse_moe.experts.{name.split('.')[5] if 'experts' in name else ''}.{theirs}",
        )
    return name.replace(".mlp.gate", ".block_sparse_moe.gate")


@pytest.mark.parametrize("kind", ["bundled", "qwen2_moe", "mixtral", "qwen3", "llama"])
def test_it_is_the_gradient_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = BUNDLED if kind == "bundled" else save_model(random_model(kind), tmp_path / "model")
    found, expected, head, whole_head = both(folder, tmp_path)
    assert disagreement(found, expected) < 1e-6
    torch.testing.assert_close(head, whole_head, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text"])
def test_of_discovered_types_too(kind: str, tmp_path: Path) -> None:
    folder = save_random(kind, tmp_path / "model", torch.bfloat16, VOCABULARY)
    found, expected, head, whole_head = both(folder, tmp_path)
    # Their own modules compute parts of it in float32.
    assert disagreement(found, expected) < 1e-4
    torch.testing.assert_close(head, whole_head, rtol=1e-9, atol=0.0)


def _no_router(self: _Mlps, normed: Tensor, start: int, stop: int) -> Tensor:
    return torch.zeros_like(normed)


def _no_factor(self: _Tokens) -> Any:
    return iter([_Tokens(self.tokens, None, self.pairs)])


@pytest.mark.parametrize(
    ("kind", "name", "bug"), [(_Mlps, "_through_routers", _no_router), (_Tokens, "windows", _no_factor)]
)
def test_a_gradient_without_the_router_is_found(
    kind: type, name: str, bug: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, bug)
    found, expected, _, _ = both(save_model(random_model("qwen3_moe"), tmp_path / "model"), tmp_path)
    assert disagreement(found, expected) > 1e-3


def test_a_gradient_through_another_layer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = LayerBackward.staged

    def other(self: LayerBackward, name: str) -> Tensor:
        return staged(self, name.replace("layers.0.", "layers.1."))

    monkeypatch.setattr(LayerBackward, "staged", other)
    found, expected, _, _ = both(save_model(random_model("qwen3_moe"), tmp_path / "model"), tmp_path)
    assert disagreement(found, expected) > 1e-3


def test_a_token_that_explodes_is_held_at_the_limit() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0], [3e9, 4e9], [0.6, 0.8]])
    found = limited(gradient, 100.0)
    torch.testing.assert_close(found[[0, 1, 2, 4]], gradient[[0, 1, 2, 4]])
    torch.testing.assert_close(found[3], torch.tensor([30.0, 40.0]))
    assert limited(gradient, math.inf) is gradient
    assert not limited(torch.zeros(3, 2), 100.0).any()
