"""A share of a build's units: what one of several machines makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.artifacts.source import Source
from qconv.checkpoint.window import HubFolder
from qconv.checkpoint.writer import write_atomically
from qconv.errors import UsageError
from qconv.folders.ownership import claim, own_folder
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe

PART = "part"
"""Among fingerprints which share of a build a folder holds."""
REQUEST_NAME = "request.json"
"""In the work folder of a share: what was asked for."""


@dataclass(frozen=True, slots=True)
class Share:
    """The ``number``-th of ``count`` shares, counted from 1.

    Attributes:
        number, count: Which, of how many.
        keys: Of the units, as the journal has them.
        request: Model and recipe, as :func:`request_of` gives them.
    """

    number: int
    count: int
    keys: frozenset[str]
    request: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return share_name(self.number, self.count)

    def record(self, work: Path) -> None:
        """Write down what was asked for.

        Raises:
            OutputError: it cannot be written.
        """
        data = (json.dumps(self.request, indent=2, ensure_ascii=False) + "\n").encode()
        path = claim(own_folder(work) / REQUEST_NAME)
        write_atomically(path, data, claim(path.with_suffix(".tmp")))


def share_name(number: int, count: int) -> str:
    """Of the folder of a share."""
    return f"{number}-of-{count}"


def shares_folder(out: Path) -> Path:
    """Where the shares of a build lie until they are collected: beside its folder."""
    out = out if out.name else out.absolute()
    return out.with_name(f"{out.name}.parts")


def request_of(source: Source, recipe: Recipe | GgufRecipe) -> dict[str, Any]:
    """What a build is made of, for whoever collects it; a model that came through a window has no folder to name."""
    path = source.checkpoint.path
    model = None if isinstance(path, HubFolder) else str(path.absolute())
    return {"model": model, "gguf": isinstance(recipe, GgufRecipe), "recipe": recipe.model_dump(mode="json")}


def keys_of_share(sizes: Mapping[str, int], number: int, count: int) -> frozenset[str]:
    """The units of a share: a run of neighbours, of about the same size in all shares.

    Args:
        sizes: Each unit's size by its key, in the order of the source.
        number, count: Which share, counted from 1, of how many.

    Raises:
        UsageError: there are fewer units than shares.
    """
    if count > len(sizes):
        raise UsageError(
            f"--part {number}/{count}: the build has {len(sizes)} parts of its own, layers or files: too few.",
            hint="Choose fewer parts, or, for GGUF, smaller files: --max-shard-size.",
        )
    total, before, share = sum(sizes.values()), 0, 1
    found: dict[int, list[str]] = {one: [] for one in range(1, count + 1)}
    for at, (key, size) in enumerate(sizes.items()):
        left = len(sizes) - at
        full = (before + size / 2) * count >= share * total
        if share < count and found[share] and (full or left <= count - share):
            share += 1
        found[share].append(key)
        before += size
    return frozenset(found[number])


def named_share(share: Share | None) -> dict[str, str]:
    """What its share adds to the fingerprints of a build."""
    return {} if share is None else {PART: share.name}
