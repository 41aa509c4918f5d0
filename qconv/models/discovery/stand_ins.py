"""What stands in a model's parts in the place of everything large, and how parts with such stand-ins are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qconv.boundary.printable import one_line
from qconv.models.calls import with_children

_TOLERANCE = 1e-4
"""Relative to the largest number: these are a few operations in float32."""
Made = TypeVar("Made")


class Unproved(Exception):
    """A part of a model that is not of the kind that is looked for; says which."""


class StandIn(nn.Module):
    """Gives the same numbers whatever it gets, and keeps what it got."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = given
        self.seen: list[Any] = []
        self.weight = torch.zeros(0)  # who asks for it asks for its dtype

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.seen.append((*arguments, *named.values())[0])
        self.arguments = arguments
        # Copies, since what comes of them may be added to in place.
        given = tuple(one.clone() for one in self.given)
        return given[0] if len(given) == 1 else given


class Nothing(nn.Module):
    """In the place of what a stand-in replaces after a copy was made."""


@contextmanager
def running(what: str) -> Iterator[None]:
    """Without gradients; whatever transformers' modules raise says that they are of another kind.

    Raises:
        Unproved: they raised something.
    """
    try:
        with torch.no_grad():
            yield
    except Unproved:
        raise
    # Modules of another kind raise whatever they raise when they are called as this kind is.
    except Exception as error:
        raise Unproved(f"{what} does not run by itself: {one_line(error)}") from error


def first_that_runs(attempts: Iterable[Callable[[], Made]]) -> Made:
    """What the first attempt gives that is no :class:`Unproved`.

    Raises:
        Unproved: as the first attempt.
    """
    failed: list[Unproved] = []
    for attempt in attempts:
        try:
            return attempt()
        except Unproved as error:
            failed.append(error)
    raise failed[0]


def with_submodules(module: nn.Module, changed: Mapping[str, nn.Module]) -> Any:
    """The same module with some other submodules, by names with dots; the rest is shared."""
    direct = {name: one for name, one in changed.items() if "." not in name}
    for child in {name.partition(".")[0] for name in changed if "." in name}:
        below = {name.partition(".")[2]: one for name, one in changed.items() if name.startswith(f"{child}.")}
        direct[child] = with_submodules(module.get_submodule(child), below)
    return with_children(module, direct)


def require_equal(found: Tensor, expected: Tensor, otherwise: str) -> None:
    """Check that numbers are as expected.

    Raises:
        Unproved: they are not; ``otherwise`` says what that means.
    """
    if not is_equal(found, expected):
        raise Unproved(otherwise)


def is_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers are as expected, to the tolerance."""
    bound = _TOLERANCE * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= bound
