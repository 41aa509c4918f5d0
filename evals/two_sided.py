"""Whether rows that hand their errors on gain anything: two-sided compensation, tried on weights in memory.

GPTQ hands the error of a column on to the columns after it, in the metric of the inputs' second moments H. To second
order the KL divergence is ``1/2 tr(F d H d^T)`` of a linear's error d, F being the second moments of its outputs'
gradients for labels drawn from the model itself (the Fisher information's Kronecker factors, Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671). So rows can hand on theirs as well, in the metric F: blocks of rows are rounded by
GPTQ one after the other, the most important first, each from what the rows before have left it.

Both builds are GPTQ with one pass of refinement on all linears of the layers, the same types and sizes; H and F are
those of the unquantized model. A few tokens have gradients a thousand times the others'; those count at most ten times
the median, without which nothing is gained. What is measured is the mean KL divergence on text that calibration has not
seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from evals.options import model_option, work_option
from evals.quality import Measured, compare, difference, held_out_text, load, log_probabilities
from qconv.artifacts.gguf_tensors import encoder
from qconv.artifacts.source import Source
from qconv.calibration.corpus import build_tokens
from qconv.core.settings import CalibrationSettings, GptqSettings, RefineSettings
from qconv.grids.blocks import BlockGrid
from qconv.methods.compensated.problem import Problem

LIMIT = 10.0
"""How many times the median norm a token's gradient counts at most."""
Moments = dict[str, Tensor]


@click.command(help=__doc__)
@model_option
@click.option(
    "--type", "types", multiple=True, default=("Q4_K", "Q2_K"), show_default=True, help="Of ggml; repeatable."
)
@click.option("--calibration", type=click.IntRange(min=512), default=16384, show_default=True, help="Tokens.")
@click.option("--tokens", type=click.IntRange(min=512), default=16384, show_default=True, help="Held-out tokens.")
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rounded together.")
@click.option("--damping", type=float, default=0.1, show_default=True, help="Of F, as a part of its mean diagonal.")
@work_option("build/two-sided")
def main(
    model: Path, types: tuple[str, ...], calibration: int, tokens: int, rows: int, damping: float, work: Path
) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    inputs, gradients = collect(model, calibration)
    source = Source.open(model)
    weights = {name: source.read(name).float() for name, _ in source.architecture.tensors()}
    linears = [linear for layer in source.architecture.layers for linear in layer.linears()]
    held_out = held_out_text(model, tokens)
    reference = log_probabilities(load(model), held_out)

    def judged(changed: dict[str, Tensor]) -> Measured:
        out = work / "dense"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        save_file(weights | changed, out / "model.safetensors", {"format": "pt"})
        found = compare(reference, log_probabilities(load(out), held_out), held_out)
        shutil.rmtree(out)
        return found

    for name in types:
        grid = BlockGrid(encoder(GGMLQuantizationType[name]))
        builds: dict[str, dict[str, Tensor]] = {"one-sided": {}, "two-sided": {}}
        for linear in linears:
            weight, moments, fisher = weights[linear.weight], inputs[linear.name], gradients[linear.name]
            problem = Problem(moments, GptqSettings(), RefineSettings(sweeps=1, refits=1), {})
            one = problem.quantize(weight, grid).weight.dequantize()
            other = two_sided(weight, problem, grid, fisher, rows, damping)
            gains = cost(weight - other, moments, fisher) < cost(weight - one, moments, fisher)
            builds["one-sided"][linear.weight] = one
            builds["two-sided"][linear.weight] = other if gains else one
        measured = {method: judged(made) for method, made in builds.items()}
        gap = difference(("two-sided", "one-sided"), measured)
        for method, one_build in measured.items():
            kl, error = one_build.mean(one_build.kl), one_build.standard_error(one_build.kl)
            click.echo(f"{name} {method}: mean KL x 1000 {1e3 * kl:.3f} ± {1e3 * error:.3f}")
        click.echo(f"{name} difference: {1e3 * gap.kl:+.3f} ({1e3 * gap.low:+.3f} to {1e3 * gap.high:+.3f})")


def two_sided(weight: Tensor, problem: Problem, grid: BlockGrid, fisher: Tensor, rows: int, damping: float) -> Tensor:
    """A weight after two-sided compensation.

    Args:
        weight: float32 [out_features, in_features].
        problem: Its inputs' second moments.
        grid: What it is rounded to.
        fisher: Second moments of its outputs' gradients, float32 [out_features, out_features].
        rows: How many are rounded together.
        damping: What the diagonal of ``fisher`` is raised by, as a part of its mean.
    """
    damped = fisher / fisher.diagonal().mean()
    damped.diagonal().add_(damping)
    order = damped.diagonal().argsort(descending=True)
    last_first = order.flip(0)
    # F = R R^T with R upper triangular in the order of rounding; a row takes R[i, j] / R[j, j] of the error of row i.
    factor = torch.linalg.cholesky(damped[last_first][:, last_first]).flip((0, 1))
    shares = factor / factor.diagonal()
    rounded, errors = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(order), rows):
        block = order[start : start + rows]
        wanted = weight[block] + shares[:start, start : start + rows].t() @ errors[:start]
        rounded[block] = problem.quantize(wanted, grid).weight.dequantize()
        errors[start : start + rows] = weight[block] - rounded[block]
    return rounded


def cost(error: Tensor, moments: Tensor, fisher: Tensor) -> float:
    """``tr(F d H d^T)`` of a weight's error d."""
    return float((fisher @ error @ moments).mul_(error).sum())


def collect(model: Path, tokens: int) -> tuple[Moments, Moments]:
    """Second moments of each linear's inputs, and of its outputs' gradients, by the linear's name.

    The loss is the negative log-likelihood, in nats, of labels that the model itself gives: one for each token.
    """
    inputs, gradients = Moments(), Moments()
    made = load(model).requires_grad_(False)
    made.get_input_embeddings().weight.requires_grad_(True)
    seen = _Seen(inputs, gradients)
    for name, module in [*made.named_modules()]:
        if name.endswith(".experts"):
            made.get_submodule(name.rpartition(".")[0]).register_module("experts", _Experts(module, name, seen))
        elif isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda _, arguments, output, name=name: seen(name, arguments[0], output))
    settings = CalibrationSettings(corpus="python-stdlib", tokens=tokens, sequence_length=512)
    generator = torch.Generator().manual_seed(0)
    for sequence in build_tokens(settings, model).ids:
        logits = made(sequence[None]).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss: Any = functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        made.zero_grad()
    return inputs, gradients


class _Seen:
    def __init__(self, inputs: Moments, gradients: Moments) -> None:
        self.inputs, self.gradients = inputs, gradients

    def __call__(self, name: str, given: Tensor, output: Any) -> None:
        _add(self.inputs, name, given.detach())
        output.register_hook(lambda slope: _add(self.gradients, name, _limited(slope)))


class _Experts(nn.Module):
    """transformers' experts one by one, so that what each linear of each reads and gives is seen."""

    def __init__(self, experts: Any, name: str, seen: _Seen) -> None:
        super().__init__()
        self.experts, self.name, self.seen = experts, name, seen

    def forward(self, hidden: Tensor, indices: Tensor, factors: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for number, (tokens, slots) in self._chosen(indices):
            own = {leaf: f"{self.name}.{number}.{leaf}_proj" for leaf in ("gate", "up", "down")}
            weights = dict(zip(("gate", "up"), self.experts.gate_up_proj[number].chunk(2), strict=True))
            read = hidden[tokens]
            gate, up = (functional.linear(read, weights[leaf]) for leaf in ("gate", "up"))
            inner = self.experts.act_fn(gate) * up
            given = functional.linear(inner, self.experts.down_proj[number])
            for leaf, one, made in (("gate", read, gate), ("up", read, up), ("down", inner, given)):
                self.seen(own[leaf], one, made)
            output = output.index_add(0, tokens, given * factors[tokens, slots, None])
        return output

    def _chosen(self, indices: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for number in range(len(self.experts.down_proj)):
            found = (indices == number).nonzero(as_tuple=True)
            if len(found[0]):
                yield number, found


def _add(moments: Moments, name: str, values: Tensor) -> None:
    flat = values.flatten(0, -2)
    product = flat.t() @ flat
    moments[name] = moments[name] + product if name in moments else product


def _limited(slopes: Tensor) -> Tensor:
    """No token's gradient longer than :data:`LIMIT` times the median."""
    norms = slopes.norm(dim=-1, keepdim=True)
    factors: Tensor = LIMIT * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return slopes * factors.clamp(max=1.0)


if __name__ == "__main__":
    main()
