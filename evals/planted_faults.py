"""What a checkpoint or a build may have wrong, planted into one, and whether it is found and named.

A checkpoint: a tensor of an expert that is missing, a tensor that nobody declares, a matrix that lies the other way
round. A build: gate and up of an expert exchanged, and a tensor that is copied, or kept unquantized, with one bit
turned. That gate and up are exchanged in a checkpoint itself nothing can show: it is another model, as sound as the
first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.separation import joined_tensors
from qconv.artifacts.source import Source
from qconv.building.pipeline import quantize
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from qconv.checkpoint.stream import same_bits
from qconv.checkpoint.writer import sha256_of
from qconv.core.architecture import Architecture, Linear, Mlp, Moe
from qconv.errors import CheckpointError
from qconv.folders.state import CHECKSUMS_NAME
from qconv.models.discovery import left_out
from qconv.planning.recipe import parse_recipe
from qconv.verification.build import verify
from qconv.verification.checksums import build_files, render_checksums

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], str]
"""Changes tensors in place; what the error must name."""

_RECIPE = {"format": "w4a16", "method": "rtn", "grid": {"group_size": 32}}


class Missed(Exception):
    """A fault that nobody found, or told in words that do not say where."""


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a checkpoint or build, by name."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def written(folder: Path, tensors: Tensors) -> Path:
    """The folder with other tensors, in one shard, and with checksums that are true where it has some."""
    for file in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        file.unlink(missing_ok=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / SINGLE_NAME, {"format": "pt"})
    if (folder / CHECKSUMS_NAME).is_file():
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SINGLE_NAME)}
        (folder / INDEX_NAME).write_text(json.dumps(index))
        sums = {name: sha256_of(folder / name) for name in build_files(folder)}
        (folder / CHECKSUMS_NAME).write_text(render_checksums(sums))
    return folder


def last_mlp(model: Architecture) -> Mlp:
    """The last expert of the last sparse layer, or the MLP of the last layer."""
    sparse = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)]
    found = sparse[-1].experts[-1] if sparse else model.layers[-1].mlp
    assert isinstance(found, Mlp)
    return found


def holder(model: Architecture, linear: Linear, names: Tensors) -> str:
    """What holds a linear's weight in a checkpoint: its own tensor, or one of all experts.

    Raises:
        Missed: nothing does.
    """
    joined = joined_tensors(model)
    held = {name for name, one in joined.items() if one.leaf == "weight" and linear.weight in {*one.names()}}
    for name in (linear.weight, model.held_name(linear.weight), *sorted(held)):
        if name in names:
            return name
    raise Missed(f"nothing holds {linear.weight}")


def missing_expert(model: Architecture, tensors: Tensors) -> str:
    """What the last expert's second matrix lies in, without it."""
    name = holder(model, last_mlp(model).down, tensors)
    if tensors[name].dim() == 3:
        tensors[name] = tensors[name][:-1]
    else:
        del tensors[name]
    return name.rpartition(".experts.")[0] or name


def unknown_tensor(model: Architecture, tensors: Tensors) -> str:
    """A weight in the last layer that no model of the type has."""
    name = f"{model.layers[-1].name}.surprise.weight"
    tensors[name] = torch.ones(4, 4, dtype=torch.bfloat16)
    return name


def other_orientation(model: Architecture, tensors: Tensors) -> str:
    """What the last expert's second matrix lies in, transposed."""
    name = holder(model, last_mlp(model).down, tensors)
    if tensors[name].shape[-1] == tensors[name].shape[-2]:
        raise Missed(f"{name} is square")
    tensors[name] = tensors[name].transpose(-1, -2)
    return name.rpartition(".experts.")[0] or name


SOURCES = {
    "a missing expert": missing_expert,
    "an unknown tensor": unknown_tensor,
    "another orientation": other_orientation,
}
"""Faults of a checkpoint."""


def exchanged(tensors: Tensors, mlp: Mlp) -> str:
    """gate and up of an expert exchanged in a build."""
    prefix, other = f"{mlp.gate.name}.", f"{mlp.up.name}."
    leaves = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if not leaves:
        raise Missed(f"nothing is called {prefix}")
    for leaf in leaves:
        tensors[prefix + leaf], tensors[other + leaf] = tensors[other + leaf], tensors[prefix + leaf]
    return mlp.gate.name


def turned_bit(tensors: Tensors, name: str) -> str:
    """One bit of a tensor turned."""
    tensors[name] = tensors[name].clone().contiguous()
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    return name.removesuffix(".weight")


def require_accounted(model: Path, build: Path) -> list[str]:
    """Check that every tensor of a source is in its build: quantized, or bit for bit.

    Returns:
        The names of those that are kept as they are.

    Raises:
        Missed: one is not.
    """
    source, found = Source.open(model), tensors_of(build)
    kept = []
    for name in source.checkpoint.entries:
        mine = name if name in found else source.architecture.held_name(name)
        if mine in found:
            if not same_bits(found[mine], source.checkpoint.read(name)):
                raise Missed(f"{name} holds other bits")
            kept.append(mine)
        elif not any(one.startswith(f"{name.removesuffix('.weight')}.") for one in found):
            raise Missed(f"{name} is not in the build")
    return kept


def planted(model: Path, work: Path) -> int:
    """Plant every fault into a checkpoint and its build; how many were found: all.

    Args:
        model: The checkpoint.
        work: An empty folder.

    Raises:
        Missed: a fault was not found, or an error does not name it.
    """
    count, source = 0, Source.open(model)
    architecture = source.architecture
    for what, fault in SOURCES.items():
        tensors = tensors_of(model)
        name = fault(architecture, tensors)
        copy = written(Path(shutil.copytree(model, work / what)), tensors)
        try:
            Source.open(copy)
        except CheckpointError as error:
            if name not in str(error):
                raise Missed(f"{what}: {error}") from error
            count += 1
        else:
            raise Missed(f"{what}: {name}")
    beside = f"model.layers.{len(architecture.layers)}.eh_proj.weight"
    if left_out(source.checkpoint.config, architecture, [beside]):
        tensors = tensors_of(model) | {beside: torch.randn(8, 8).bfloat16()}
        model = written(Path(shutil.copytree(model, work / "beside")), tensors)
    recipe = parse_recipe(_RECIPE)
    build = quantize(model, work / "build", recipe, threads=2, progress=lambda *_: None, log=lambda _: None).out
    kept = require_accounted(model, build)
    if beside in tensors_of(model) and beside not in kept:
        raise Missed(f"{beside} is not copied")
    mlp = last_mlp(architecture)
    edits: list[Edit] = [partial(exchanged, mlp=mlp), *(partial(turned_bit, name=name) for name in kept)]
    for number, edit in enumerate(edits):
        tensors = tensors_of(build)
        name = edit(tensors)
        copy = written(Path(shutil.copytree(build, work / f"build-{number}")), tensors)
        problems = verify(copy, against=model).problems
        if not any(name in problem for problem in problems):
            raise Missed(f"{name}: {problems[:3]}")
        shutil.rmtree(copy)
        count += 1
    return count
