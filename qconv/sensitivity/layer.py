"""A gradient taken back through one layer, with what it says of each linear's outputs.

The layer is computed again from its inputs with its real weights, experts one by one, each for the tokens that the
router sent it. An expert's factor is a function of the router's logits: what the outputs say of it goes back through
the router, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qconv.artifacts.source import Source
from qconv.calibration.activations import SetAside
from qconv.calibration.forward import Decoder, RouterBlock
from qconv.calibration.placement import at_home
from qconv.core.architecture import Layer, Linear, Mlp, Moe
from qconv.core.devices import CPU
from qconv.core.once import MadeOnce
from qconv.core.workers import Workers
from qconv.sensitivity.files import LayerFiles

WINDOW_TOKENS = 2048


@dataclass(slots=True)
class OutputSquares:
    """Squared gradients with regard to a linear's outputs.

    Attributes:
        sums: Over the tokens that it saw, float64 [out_features] on the host.
        tokens: How many.
    """

    sums: Tensor
    tokens: int

    @classmethod
    def of(cls, gradient: Tensor, limit: float) -> OutputSquares:
        """Of a gradient, [tokens, out_features], :func:`limited`."""
        return cls(limited(gradient, limit).square().sum(0, dtype=torch.float64).cpu(), len(gradient))

    def __add__(self, other: OutputSquares) -> OutputSquares:
        return OutputSquares(self.sums + other.sums, self.tokens + other.tokens)


Seen = dict[str, OutputSquares]
"""By a linear's name."""
LIMIT = 100.0
"""How many times the usual square of a token's gradient the largest may be."""


def limited(gradient: Tensor, limit: float) -> Tensor:
    """A gradient, [tokens, features], no token of which has more than ``limit`` times the median square of all.

    Where a token's hidden state is all but zero (an embedding that was never trained), norms multiply what comes back
    through them by a thousand each: a slope that holds for no error of any size, and would count more than all others.
    Such a token keeps its direction. Tokens without any gradient do not count for the median.
    """
    squares = gradient.double().square().sum(1)
    some = squares[squares > 0.0]
    if not len(some):
        return gradient
    most = limit * some.median()
    scale = (most / squares.clamp(min=1e-300)).sqrt_().clamp_(max=1.0)
    return gradient * scale.to(gradient.dtype).unsqueeze(1) if bool((scale < 1.0).any()) else gradient


@dataclass(frozen=True, slots=True)
class LayerBackward:
    """One layer, and where its activations are.

    Attributes:
        source: The model.
        decoder: transformers' modules of it, in the dtype in which is computed.
        layer: The layer.
        files: Its inputs, and the gradient with regard to its outputs, which becomes that of its inputs.
        workers: Threads; each holds one expert, on the device that it borrows.
        limit: See :func:`limited`; infinite for the exact gradient.
    """

    source: Source
    decoder: Decoder
    layer: Layer
    files: LayerFiles
    workers: Workers
    limit: float = LIMIT

    def run(self) -> Seen:
        """Take the gradient back; what it says of every linear of the layer but routers.

        Raises:
            CheckpointError: a weight cannot be read or is not finite.
            OutputError: the disk is full.
        """
        with torch.no_grad():
            attention = _Attention(self)
            attention.forward()
            seen = _Mlps(self).backward()
            return seen | attention.backward()

    @property
    def home(self) -> torch.device:
        """Where attention and routing are."""
        return self.workers.lending.home

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype in which is computed, where attention is."""
        return self.source.read(name).to(self.home).to(self.decoder.dtype)

    def staged(self, name: str) -> Tensor:
        """A tensor on the host, ready for its way to a device."""
        tensor = self.source.read(name)
        return tensor if self.home == CPU else tensor.pin_memory()


class _Attention:
    def __init__(self, work: LayerBackward) -> None:
        layer, attention = work.layer, work.layer.attention
        self.work, self.files = work, work.files
        names = [name for module in attention.modules() for name, _ in module.tensors()]
        tensors = {name: work.source.read(name).to(work.home) for name in names}
        self.block = work.decoder.attention(layer, tensors)
        self.norm = work.decoder.norm(layer, layer.input_norm, work.source.read(layer.input_norm.weight).to(work.home))
        self.kept = threading.local()
        *self.inner, self.last = attention.linears()
        for linear in self.inner:
            leaf = linear.name.removeprefix(f"{attention.name}.")
            self.block.module.get_submodule(leaf).register_forward_hook(self._keeps(linear.name))

    def _keeps(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.kept.__dict__[name] = output

        return keep

    def forward(self) -> None:
        """Write the middle of the layer."""

        def attend(window: tuple[int, int]) -> None:
            hidden = self.files.inputs.read(*window, self.work.home)
            hidden.add_(self._attended(hidden).view_as(hidden))
            self.files.middle.write(window[0], hidden)

        for _ in self.work.workers.map(at_home(self.work, attend), self.files.sequence_windows(WINDOW_TOKENS)):
            pass

    def _attended(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden)
        return self.block(normed.view(-1, self.files.sequence_length, normed.shape[-1]))

    def backward(self) -> Seen:
        """From the gradient of the middle to that of the inputs."""
        inner = [linear.name for linear in self.inner]

        def pull(window: tuple[int, int]) -> Seen:
            above = self.files.gradient.read(*window, self.work.home)
            with torch.enable_grad():
                leaf = self.files.inputs.read(*window, self.work.home).requires_grad_(True)
                output = self._attended(leaf)
            outputs = [self.kept.__dict__.pop(name) for name in inner]
            *slopes, below = torch.autograd.grad(output, (*outputs, leaf), above.view_as(output))
            limit = self.work.limit
            self.files.gradient.write(window[0], limited(below.add_(above), limit))
            found = {name: OutputSquares.of(one.flatten(0, -2), limit) for name, one in zip(inner, slopes, strict=True)}
            return found | {self.last.name: OutputSquares.of(above, limit)}

        seen: Seen = {}
        for part in self.work.workers.map(at_home(self.work, pull), self.files.sequence_windows(WINDOW_TOKENS)):
            _add(seen, part)
        return seen


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What an MLP sees.

    Attributes:
        tokens: int64 [n], ascending, as all of it on the host.
        factors: On its output for each, [n]; None for 1.
        pairs: Where its factors stand among those of all tokens and choices, int64 [n]; None for the shared expert's.
    """

    tokens: Tensor
    factors: Tensor | None
    pairs: Tensor | None

    def windows(self) -> Iterator[_Tokens]:
        """The same, some tokens at a time."""
        for start in range(0, len(self.tokens), WINDOW_TOKENS):
            part = slice(start, start + WINDOW_TOKENS)
            factors = None if self.factors is None else self.factors[part]
            yield _Tokens(self.tokens[part], factors, None if self.pairs is None else self.pairs[part])


@dataclass(frozen=True, slots=True)
class _Pulled:
    """A gradient taken back through an MLP: of its inputs, of the factors on its output, and what was seen."""

    inputs: SetAside
    factors: tuple[tuple[_Tokens, Tensor], ...]
    seen: Seen


class _Mlps:
    def __init__(self, work: LayerBackward) -> None:
        self.work, self.files, layer = work, work.files, work.layer
        norm = layer.post_attention_norm
        weight = work.source.read(norm.weight)
        self.norm = MadeOnce(lambda device: work.decoder.norm(layer, norm, weight.to(device)))
        self.moe = layer.mlp if isinstance(layer.mlp, Moe) else None
        self.scales_inputs = self.moe is not None and self.moe.scales_inputs
        self.router: RouterBlock | None = None
        self.shared_factors: Tensor | None = None
        self.shared_slopes: Tensor | None = None
        self.shared_gate: Tensor | None = None
        if self.moe is not None:
            self.router = work.decoder.router(layer, self.moe, lambda name: work.source.read(name).to(work.home))
            gate = self.moe.shared_expert_gate
            self.shared_gate = None if gate is None else work.read(gate.weight)
            self._route(self.router)

    def _route(self, router: RouterBlock) -> None:
        chosen, factors, shared = [], [], []
        for start, stop in self.files.middle.windows(WINDOW_TOKENS):
            normed = self._normed(start, stop)
            scores, indices = router(normed)
            chosen.append(indices.cpu())
            factors.append(scores.to(normed.dtype).cpu())
            if self.shared_gate is not None:
                shared.append(torch.sigmoid(normed @ self.shared_gate.t()).squeeze(-1).cpu())
        experts = torch.cat(chosen)
        self.choices = experts.shape[1]
        self.factors = torch.cat(factors).flatten()
        self.factor_slopes = torch.zeros_like(self.factors)
        if shared:
            self.shared_factors = torch.cat(shared)
            self.shared_slopes = torch.zeros_like(self.shared_factors)
        flat = experts.flatten()
        self.order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.moe.experts) if self.moe else 0)
        self.ends = counts.cumsum(0)
        self.counts = counts

    def _normed(self, start: int, stop: int) -> Tensor:
        normed: Tensor = self.norm(self.work.home)(self.files.middle.read(start, stop, self.work.home))
        return normed

    def _tokens(self, index: int) -> _Tokens:
        """Of the layer's MLP of that number: experts, the shared one after them, or the dense one."""
        if self.moe is None or index >= len(self.moe.experts):
            return _Tokens(torch.arange(self.files.tokens, device=CPU), self.shared_factors, None)
        end = int(self.ends[index])
        pairs = self.order[end - int(self.counts[index]) : end]
        return _Tokens(pairs // self.choices, self.factors[pairs], pairs)

    def backward(self) -> Seen:
        """From the gradient of the layer's outputs to that of its middle."""
        files, mlps, home = self.files, self.work.layer.mlps(), self.work.home
        files.normed.create()
        seen: Seen = {}
        for pulled in self.work.workers.map(
            lambda index: self._pull(mlps[index], self._tokens(index)), range(len(mlps))
        ):
            # In the order of the experts, so that sums come out the same however the threads ran.
            for tokens, rows in pulled.inputs:
                files.normed.add(tokens, rows)
            for part, slopes in pulled.factors:
                self._keep_slopes(part, slopes)
            seen |= pulled.seen
        for start, stop in files.middle.windows(WINDOW_TOKENS):
            above = files.gradient.read(start, stop, home)
            with torch.enable_grad():
                leaf = files.middle.read(start, stop, home).requires_grad_(True)
                normed: Tensor = self.norm(home)(leaf)
            slope = files.normed.read(start, stop, home).add_(self._through_routers(normed.detach(), start, stop))
            (below,) = torch.autograd.grad(normed, leaf, slope)
            files.gradient.write(start, limited(below.add_(above), self.work.limit))
        return seen

    def _keep_slopes(self, part: _Tokens, slopes: Tensor) -> None:
        if part.pairs is not None:
            self.factor_slopes[part.pairs] = slopes
        elif self.shared_slopes is not None:
            self.shared_slopes[part.tokens] = slopes

    def _through_routers(self, normed: Tensor, start: int, stop: int) -> Tensor:
        """What the factors say of the normed stream, [tokens, hidden]."""
        if self.router is None:
            return torch.zeros_like(normed)
        with torch.enable_grad():
            leaf = normed.requires_grad_(True)
            scores, _ = self.router(leaf)
            slopes = self.factor_slopes.view(-1, self.choices)[start:stop].to(leaf.device)
            total = (scores.to(slopes.dtype) * slopes).sum()
            if self.shared_gate is not None and self.shared_slopes is not None:
                factors = torch.sigmoid(leaf @ self.shared_gate.t()).squeeze(-1)
                total = total + (factors * self.shared_slopes[start:stop].to(leaf.device)).sum()
        (found,) = torch.autograd.grad(total, leaf)
        return found

    def _pull(self, mlp: Mlp, tokens: _Tokens) -> _Pulled:
        staged = {name: self.work.staged(name) for linear in mlp.linears() for name, _ in linear.tensors()}

        def pull(device: torch.device) -> _Pulled:
            dtype = self.work.decoder.dtype
            weights = {name: tensor.to(device, non_blocking=True).to(dtype) for name, tensor in staged.items()}
            return self._pull_on(device, mlp, tokens, weights)

        return self.work.workers.lending.call(pull, mlp.gate.name)

    def _pull_on(self, device: torch.device, mlp: Mlp, tokens: _Tokens, weights: Mapping[str, Tensor]) -> _Pulled:
        seen: Seen = {linear.name: _none(linear) for linear in mlp.linears()}
        factors: list[tuple[_Tokens, Tensor]] = []

        def windows() -> Iterator[tuple[Tensor, Tensor]]:
            for part in tokens.windows():
                inputs, slopes, found = self._pull_window(device, mlp, weights, part)
                _add(seen, found)
                if part.factors is not None:
                    factors.append((part, slopes.cpu()))
                yield part.tokens, inputs

        aside = SetAside(self.files.normed.path.parent, self.files.normed.width, windows(), self.work.decoder.dtype)
        return _Pulled(aside, tuple(factors), seen)

    def _pull_window(
        self, device: torch.device, mlp: Mlp, weights: Mapping[str, Tensor], part: _Tokens
    ) -> tuple[Tensor, Tensor, Seen]:
        above = self.files.gradient.gather(part.tokens, device)
        normed: Tensor = self.norm(device)(self.files.middle.gather(part.tokens, device))

        def linear(which: Linear, inputs: Tensor) -> Tensor:
            return functional.linear(inputs, weights[which.weight], weights.get(f"{which.name}.bias"))

        on_inputs = part.factors is not None and part.pairs is not None and self.scales_inputs
        with torch.enable_grad():
            leaf = normed.requires_grad_(True)
            factors = None
            if part.factors is not None:
                factors = part.factors.to(device).detach().requires_grad_(on_inputs)
            read = leaf * factors.unsqueeze(-1) if on_inputs and factors is not None else leaf
            gate, up = linear(mlp.gate, read), linear(mlp.up, read)
            output = linear(mlp.down, self.work.decoder.gating(self.work.layer, mlp)(gate, up))
        scaled = above if factors is None or on_inputs else above * factors.unsqueeze(-1)
        wanted = (gate, up, leaf, *([factors] if on_inputs and factors is not None else []))
        of_gate, of_up, of_inputs, *of_factors = torch.autograd.grad(output, wanted, scaled)
        slopes = of_factors[0] if of_factors else (above * output.detach()).sum(-1)
        found = {
            mlp.gate.name: OutputSquares.of(of_gate, self.work.limit),
            mlp.up.name: OutputSquares.of(of_up, self.work.limit),
            mlp.down.name: OutputSquares.of(scaled, self.work.limit),
        }
        return of_inputs, slopes, found


def _none(linear: Linear) -> OutputSquares:
    return OutputSquares(torch.zeros(linear.out_features, dtype=torch.float64, device=CPU), 0)


def _add(seen: Seen, part: Seen) -> None:
    for name, squares in part.items():
        seen[name] = seen[name] + squares if name in seen else squares
