"""Variants of one model, each with a few modules of a build: all of them pass one layer before the next is read.

A variant is the reference up to the first layer where it has a module of the build; there it leaves the reference, with
the reference's activations, and from there on it is computed by itself. So the files are read once or twice however
many variants there are, and a variant of the last layer costs one layer.

What is in memory at once
    A window of activations, the dense attention weights of one layer, one expert, a window of logits. The reference's
    activations before every layer and those of all variants lie in files.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from qconv.calibration.activations import ActivationFile
from qconv.calibration.forward import RunningLayer
from qconv.core.architecture import Layer, Moe
from qconv.evaluation.mixing import DTYPE, Mixed
from qconv.models.calls import Calls
from qconv.models.folding import Folds
from qconv.runtime.backends import get_backend
from qconv.runtime.dequantized import Dequantized
from qconv.runtime.files import ModelFiles
from qconv.runtime.modules import PackedExperts
from qconv.runtime.skeleton import Installer, empty_model, place_rotary
from qconv.runtime.stream import HEAD_ROWS, LOGIT_BYTES, StreamedExperts

WINDOW_VALUES = 2**25
"""Activations that pass the experts together: 5,461 tokens of hidden size 6144."""
SCRATCH_BYTES = 2**33
"""Of the activations of variants that are scored together: 170 of 2,048 tokens of hidden size 6144."""

Progress = Callable[[int, int], None]
"""Told how many steps are done, and of how many."""

Span: TypeAlias = tuple[int, int]
"""The first row, and the one after the last."""
Sums: TypeAlias = NDArray[np.float64]
"""A variant's KL divergence from the reference, [sequences]: nats, summed over each sequence."""


class Variants:
    """A reference, a build of it, and the text on which variants of them are scored."""

    def __init__(
        self,
        reference: ModelFiles,
        build: ModelFiles,
        folds: Callable[[Layer], Folds],
        sequences: Sequence[Tensor],
        scratch: Path,
        device: str = "cpu",
    ) -> None:
        """Nothing is computed yet.

        Args:
            reference: The unquantized model.
            build: The build.
            folds: What the build folded into a layer.
            sequences: Token ids, int64 [length] each.
            scratch: A folder for activations, the caller's to remove.
            device: A torch device.
        """
        self.reference = Dequantized(reference, DTYPE)
        self.build = Dequantized(build, DTYPE)
        self.folds = folds
        self.sequences = sequences
        self.scratch = scratch
        self.backend = get_backend("reference", device)
        self.architecture = reference.architecture
        self.model = empty_model(reference, DTYPE)
        place_rotary(self.model.model, self.backend.device)
        self.calls = Calls(self.model.model, self.architecture.hidden_size)
        ends = np.cumsum([0, *map(len, sequences)]).tolist()
        self.tokens: int = ends[-1]
        self.spans: list[Span] = list(pairwise(ends))

    @torch.inference_mode()
    def run_reference(self, progress: Progress) -> None:
        """Compute and keep what the reference's layers are given; once, before :meth:`divergences`."""
        layers = self.architecture.layers
        self._embed(self._known(0).create(), 0, self.reference)
        for layer in layers:
            progress(layer.index, len(layers))
            after = self._known(layer.index + 1).create()
            self._leave(layer.index, after, 0)
            self._pass(layer, self.reference, after, self.spans)
        progress(len(layers), len(layers))

    def batches(self, count: int) -> Iterator[range]:
        """Indices of so many variants, in groups that are scored together."""
        size = max(1, SCRATCH_BYTES // (self.tokens * self.architecture.hidden_size * DTYPE.itemsize))
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    @torch.inference_mode()
    def divergences(self, chosen: Sequence[Collection[str]], progress: Progress) -> list[Sums]:
        """Score variants.

        Args:
            chosen: For each variant, the names of the modules that are the build's.
            progress: Told about layers and heads done.

        Raises:
            CheckpointError: reference and build are not the same model, or damaged.
            OutputError: the scratch folder is full.
        """
        found: list[Sums] = []
        layers = self.architecture.layers
        batches = list(self.batches(len(chosen)))
        total = len(batches) * (len(layers) + 1)
        for number, batch in enumerate(batches):
            variants = [frozenset(chosen[index]) for index in batch]
            hidden = self._file("variants", len(variants)).create()
            away: set[int] = set()
            for index, names in enumerate(variants):
                if self.architecture.embedding.name in names:
                    self._embed(hidden, index * self.tokens, self.build)
                    away.add(index)
            for layer in layers:
                progress(number * (len(layers) + 1) + layer.index, total)
                self._step(layer, variants, hidden, away)
            progress(number * (len(layers) + 1) + len(layers), total)
            found += self._divergences(hidden, variants, away)
            hidden.path.unlink()
        progress(total, total)
        return found

    def _step(self, layer: Layer, variants: Sequence[frozenset[str]], hidden: ActivationFile, away: set[int]) -> None:
        """One layer for all variants; those that leave the reference here join those ``away``."""
        own = {module.name for module in layer.modules()}
        groups: dict[frozenset[str], list[int]] = {}
        exchanged: dict[int, list[int]] = {}
        for index, names in enumerate(variants):
            here = names & own
            expert = _only_expert(layer, here)
            if expert is not None and index not in away:
                exchanged.setdefault(expert, []).append(index)
            elif here and index not in away:
                self._leave(layer.index, hidden, index * self.tokens)
                away.add(index)
            if index in away:
                groups.setdefault(here, []).append(index)
        if exchanged:
            self._exchange(layer, exchanged, hidden)
            away.update(index for members in exchanged.values() for index in members)
        for names, members in groups.items():
            files: ModelFiles = self.reference
            if names:
                files = Mixed.of(self.reference, self.build, layer, names, self.folds(layer))
            spans = [
                (start + index * self.tokens, stop + index * self.tokens)
                for index in members
                for start, stop in self.spans
            ]
            self._pass(layer, files, hidden, spans)

    def _pass(self, layer: Layer, files: ModelFiles, hidden: ActivationFile, spans: Sequence[Span]) -> None:
        """One layer in place: attention sequence by sequence, then the MLP by windows of any tokens."""
        with self._installed(layer, files) as module:
            self._attend(module, hidden, spans)
            for pieces in _windows(spans, self._window):
                before = torch.cat([self._read(hidden, start, stop) for start, stop in pieces], dim=1)
                after: Tensor = (before + module.fed(before))[0]
                for (start, _), rows in zip(
                    pieces, torch.split(after, [stop - start for start, stop in pieces]), strict=True
                ):
                    hidden.write(start, rows)

    def _exchange(self, layer: Layer, exchanged: Mapping[int, Sequence[int]], hidden: ActivationFile) -> None:
        """One layer for variants that leave the reference here, each with one routed expert of the build.

        Attention, router and what all other experts answer is the same for all of them, and computed once.

        Args:
            layer: A layer with experts.
            exchanged: By expert, the variants that have it from the build.
            hidden: Where the variants' activations go.
        """
        common = self._file("common").create()
        self._leave(layer.index, common, 0)
        files = Mixed.of(self.reference, self.build, layer, (), self.folds(layer))
        with self._installed(layer, files) as module:
            assert isinstance(layer.mlp, Moe)
            placed: Any = module.experts
            streamed = placed.operator
            experts = _Exchanged(streamed, replace(streamed, files=self.build), exchanged)
            placed.operator = experts
            self._attend(module, common, self.spans)
            for start, stop in common.windows(self._window):
                before = self._read(common, start, stop)
                after = (before + module.fed(before))[0]
                for expert, members in exchanged.items():
                    rows = after.index_add(0, *experts.changes[expert]) if expert in experts.changes else after
                    for index in members:
                        hidden.write(index * self.tokens + start, rows)
        common.path.unlink()

    def _attend(self, module: RunningLayer, hidden: ActivationFile, spans: Sequence[Span]) -> None:
        for start, stop in spans:
            before = self._read(hidden, start, stop)
            hidden.write(start, (before + module.mixed(before))[0])

    @property
    def _window(self) -> int:
        """Tokens that pass the experts together."""
        return max(1, WINDOW_VALUES // self.architecture.hidden_size)

    @contextlib.contextmanager
    def _installed(self, layer: Layer, files: ModelFiles) -> Iterator[RunningLayer]:
        """The layer with its weights, which are dropped again."""
        pristine = self.model.model.layers[layer.index]
        self.model.model.layers[layer.index] = copy.deepcopy(pristine)  # on the meta device: it costs nothing
        installer = Installer(self.model, files, self.backend, DTYPE)
        installer.around_experts(layer)
        if isinstance(layer.mlp, Moe):
            name = layer.mlp.experts_name
            experts = StreamedExperts(files, layer.mlp, self.backend, installer.gating(name), installer.rounding)
            installer.replace(name, PackedExperts(experts, len(layer.mlp.experts)))
        yield RunningLayer.of(self.model.model.layers[layer.index], self.calls, layer, self.architecture)
        self.model.model.layers[layer.index] = pristine

    def _divergences(self, hidden: ActivationFile, variants: Sequence[frozenset[str]], away: set[int]) -> list[Sums]:
        """Of every variant from the reference, by their logits; the reference's are computed once for all."""
        known = self._known(len(self.architecture.layers))
        head = self.architecture.lm_head or self.architecture.embedding
        size = max(1, LOGIT_BYTES // (DTYPE.itemsize * head.out_features))
        sums = [np.zeros(len(self.spans)) for _ in variants]
        for number, (first, last) in enumerate(self.spans):
            for start in range(first, last, size):
                stop = min(start + size, last)
                expected = self._log_probabilities(self._read(known, start, stop), frozenset())
                for index, names in enumerate(variants):
                    states, shift = (hidden, index * self.tokens) if index in away else (known, 0)
                    found = self._log_probabilities(self._read(states, start + shift, stop + shift), names)
                    kl = functional.kl_div(found, expected, reduction="none", log_target=True)
                    sums[index][number] += float(kl.sum(dtype=torch.float64))
        return sums

    def _log_probabilities(self, states: Tensor, names: frozenset[str]) -> Tensor:
        """float32 [tokens, vocabulary] of activations [1, tokens, hidden], by final norm and head."""
        norm, head = self.architecture.final_norm, self.architecture.lm_head or self.architecture.embedding
        files = {name: self.build if name in names else self.reference for name in (norm.name, head.name)}
        Installer(self.model, files[norm.name], self.backend, DTYPE).norm(norm)
        states = self.model.get_submodule(self.architecture.held_name(norm.name))(states)[0]
        logits = torch.empty(len(states), head.out_features, device=self.backend.device)
        for row in range(0, head.out_features, HEAD_ROWS):
            rows = slice(row, min(row + HEAD_ROWS, head.out_features))
            weight = files[head.name].rows(head, rows.start, rows.stop).dequantize(DTYPE)
            logits[:, rows] = functional.linear(states, weight.to(self.backend.device))
        return functional.log_softmax(logits, dim=-1)

    def _leave(self, layer: int, hidden: ActivationFile, shift: int) -> None:
        """Copy what the reference's layer is given."""
        known = self._known(layer)
        for start, stop in known.windows():
            hidden.write(start + shift, known.read(start, stop))

    def _embed(self, hidden: ActivationFile, shift: int, files: ModelFiles) -> None:
        for (start, _), sequence in zip(self.spans, self.sequences, strict=True):
            hidden.write(start + shift, files.gather(self.architecture.embedding, sequence).to(DTYPE))

    def _known(self, layer: int) -> ActivationFile:
        """What the reference's layer is given; of the number after the last, what the final norm is given."""
        return self._file(f"reference-{layer}")

    def _file(self, name: str, times: int = 1) -> ActivationFile:
        return ActivationFile(self.scratch / name, times * self.tokens, self.architecture.hidden_size, DTYPE)

    def _read(self, hidden: ActivationFile, start: int, stop: int) -> Tensor:
        """[1, tokens, hidden] on the device."""
        return hidden.read(start, stop).unsqueeze(0).to(self.backend.device)


class _Exchanged:
    """The reference's experts, and beside their answer what some of them would change as the build has them."""

    def __init__(self, reference: StreamedExperts, build: StreamedExperts, wanted: Collection[int]) -> None:
        self.reference = reference
        self.build = build
        self.wanted = wanted
        self.changes: dict[int, tuple[Tensor, Tensor]] = {}
        """Of the last call, by expert: tokens, int64 [n], and what is to be added to their sums, [n, hidden]."""

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self.changes = {}
        for expert in self.wanted:
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                asked = inputs[tokens], torch.full_like(tokens, expert)[:, None], weights[tokens, slots][:, None]
                self.changes[expert] = tokens, self.build(*asked) - self.reference(*asked)
        return self.reference(inputs, chosen, weights)

    def tensors(self) -> Iterator[Tensor]:
        """None: nothing stays in memory."""
        yield from ()


def _only_expert(layer: Layer, names: frozenset[str]) -> int | None:
    """The routed expert that all of the modules belong to; None if there are none, or others among them."""
    if not names or not isinstance(layer.mlp, Moe) or layer.mlp.scales_inputs:
        return None
    linears = ({linear.name for linear in mlp.linears()} for mlp in layer.mlp.experts)
    return next((number for number, own in enumerate(linears) if names <= own), None)


def _windows(spans: Sequence[Span], size: int) -> Iterator[list[Span]]:
    """Spans in groups of at most ``size`` rows together; longer ones are cut."""
    group: list[Span] = []
    room = size
    for start, stop in spans:
        while start < stop:
            end = min(stop, start + room)
            group.append((start, end))
            room -= end - start
            start = end
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group
