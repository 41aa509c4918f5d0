"""A model on disk as a working transformers model that computes from the packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qconv.artifacts.dtypes import WEIGHT_DTYPES, weight_dtype
from qconv.boundary.printable import one_line
from qconv.checkpoint.generation_config import GENERATION_CONFIG, read_generation_config
from qconv.checkpoint.maps import SharedMaps
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.sampling import generation_of
from qconv.runtime.backends import get_backend
from qconv.runtime.files import ModelFiles, open_files
from qconv.runtime.gguf_files import GgufFiles
from qconv.runtime.modules import PackedEmbedding, PackedExperts, PackedLinear
from qconv.runtime.skeleton import Installer, empty_model


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    round_inputs: bool = False,
) -> Any:
    """Load a model.

    Weights stay packed, mapped from the file where the backend takes them as they are; so do not overwrite the files
    while the model is in use.

    Args:
        path: A build, an unquantized checkpoint, a GGUF file, or a folder that holds one.
        backend: ``cpu``, ``cuda``, ``reference``, or ``auto`` for what suits the device.
        dtype: The dtype of activations and of what is not packed; by default config.json's.
        device: By default a GPU where there is one.
        round_inputs: Round the inputs of linears as engines do that compute in FP8 or int8, where config.json says so,
            and keys and values for which scales are stored.

    Returns:
        transformers' model of the architecture for causal language modelling, in evaluation mode.

    Raises:
        CheckpointError: the files are damaged, incomplete or of a kind that qconv does not run.
        UsageError: no such backend, device or dtype.
    """
    files = open_files(Path(path), SharedMaps())
    placed = get_backend(backend, device)
    chosen = chosen_dtype(files, dtype)
    model = empty_model(files, chosen)
    Installer(model, files, placed, chosen, round_inputs).everything()
    left = [name for name, tensor in _named_tensors(model) if tensor.is_meta]
    if left:
        raise UsageError(f"{path}: nothing was loaded for {left[0]!r} and {len(left) - 1} others.")
    stated = read_generation_config(files.path)
    if stated:
        model.generation_config = _generation_config(files.path, stated)
    elif isinstance(files, GgufFiles):
        for name, value in generation_of(files.model.metadata).items():
            setattr(model.generation_config, name, value)
    model.config.name_or_path = str(path)
    return model


def _generation_config(folder: Path, values: dict[str, Any]) -> Any:
    """transformers' object of the file's values.

    Raises:
        CheckpointError: transformers refuses them.
    """
    from transformers import GenerationConfig

    untyped: Any = GenerationConfig
    try:
        return untyped.from_dict(values)
    # Its checks raise whatever comparing and counting values of other types raises.
    except Exception as error:
        raise CheckpointError(
            f"{folder / GENERATION_CONFIG}: transformers refuses it: {type(error).__name__}: {one_line(error)}.",
            hint="Take the original model's file, or leave it away.",
        ) from error


def memory(model: nn.Module) -> int:
    """Bytes of memory that a loaded model's tensors take, mapped ones included; shared ones count once."""
    tensors = [tensor for _, tensor in _named_tensors(model)]
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedExperts)):
            tensors.extend(module.operator.tensors())
        elif isinstance(module, PackedEmbedding):
            tensors.extend(module.packed.tensors())
    # By address: tensors of one shard are views of one mapping, and tied ones are the same.
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def chosen_dtype(files: ModelFiles, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype asked for, or config.json's.

    Raises:
        UsageError: it is no weight's.
    """
    if dtype is None or dtype == "auto":
        return weight_dtype(files.path, files.config)
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in WEIGHT_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
        raise UsageError(f"dtype: {dtype!r} is none of {names}.", hint="Leave it out to take config.json's.")
    assert isinstance(chosen, torch.dtype)
    return chosen
