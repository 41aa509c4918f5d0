"""Which modules of a model read one tensor, and which module made it: seen while a few tokens run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_KEEPS_ROWS = frozenset(
    {
        _ATEN.view.default,
        _ATEN._unsafe_view.default,
        _ATEN.unsqueeze.default,
        _ATEN.squeeze.dim,
        _ATEN.expand.default,
        _ATEN.clone.default,
        _ATEN.detach.default,
        _ATEN.alias.default,
        _ATEN._to_copy.default,
    }
)
"""Operations after which every row holds the numbers it held, where the last dimension is still the same."""
_TOKENS = 8
"""More than one, so that no dimension is taken for another."""


@dataclass(slots=True)
class Trace:
    """What was seen.

    Attributes:
        reads: By module, in the order in which they ran, a number that stands for the tensor that it read.
        makes: By such a number, the norm that made the tensor.
    """

    reads: dict[str, int] = field(default_factory=dict)
    makes: dict[int, str] = field(default_factory=dict)


def trace(model: nn.Module, experts: Mapping[str, nn.Module]) -> Trace:
    """Run a few tokens through a model on the meta device.

    Args:
        model: For causal language modelling; it keeps its modules, but not what ``experts`` compute.
        experts: Modules, by name, that a stand-in replaces: it gives zeros of its input's shape.
    """
    found = Trace()
    following = _Following()

    def reads(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            for value in (*arguments, *named.values()):
                if isinstance(value, Tensor):
                    found.reads.setdefault(name, following.number(value))
                    return

        return hook

    def makes(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.makes.setdefault(following.number(output), name)

        return hook

    for module in experts.values():
        module.forward = _zeros_like_input
    handles = []
    for name, module in model.named_modules():
        if name in experts or is_reader(module):
            handles.append(module.register_forward_pre_hook(reads(name), with_kwargs=True))
        elif is_norm(module):
            handles.append(module.register_forward_hook(makes(name)))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), following:
            try:
                # With a cache transformers does not look into the positions for the ends of packed sequences.
                model(input_ids=ids, use_cache=True)
            except ValueError:
                # A cache of states alone does not know how long it is.
                found.reads.clear()
                found.makes.clear()
                with _one_sequence():
                    model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _one_sequence() -> Iterator[None]:
    """transformers takes the tokens for one sequence, and does not look for the ends of several."""
    from transformers import masking_utils

    untyped: Any = masking_utils
    looks = untyped.find_packed_sequence_indices
    untyped.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        untyped.find_packed_sequence_indices = looks


def settings_of(module: nn.Module) -> str:
    """The numbers, texts and flags that a module and those within it hold, but for which layer they are of."""
    plain = (bool, int, float, str, type(None))
    return "; ".join(
        f"{name}.{key}={value!r}"
        for name, one in module.named_modules()
        for key, value in sorted(vars(one).items())
        if isinstance(value, plain) and key not in ("layer_idx", "layer_index")
    )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters that no child of it holds."""
    yield from module.named_parameters(recurse=False)


def is_reader(module: nn.Module) -> bool:
    """Whether it multiplies its input by a weight: a linear, or a router that is no linear."""
    return _dimensions(module) == 2 and not isinstance(module, nn.Embedding)


def is_norm(module: nn.Module) -> bool:
    """Whether it scales its input by a weight for each feature."""
    return _dimensions(module) == 1


def _dimensions(module: nn.Module) -> int | None:
    """Of its own weight, if it has one."""
    weight = dict(own_tensors(module)).get("weight")
    return None if weight is None else weight.dim()


def is_fused_experts(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts as tensors of three dimensions."""
    if isinstance(module, nn.Conv1d):
        return False
    return any(tensor.dim() == 3 for _, tensor in own_tensors(module))


def _zeros_like_input(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden)


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type its class
    """Gives one number to a tensor and to those that come of it by operations that keep its rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def number(self, tensor: Tensor) -> int:
        """The tensor's number; a new one for a tensor that was not seen yet."""
        if id(tensor) not in self._numbers:
            self._give(tensor, len(self._kept))
        return self._numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _KEEPS_ROWS and made.dim() and args[0].dim() and made.shape[-1] == args[0].shape[-1]:
            self._give(made, self.number(args[0]))
        return made

    def _give(self, tensor: Tensor, number: int) -> None:
        # A tensor that is kept alive keeps its id to itself.
        self._kept.append(tensor)
        self._numbers[id(tensor)] = number
