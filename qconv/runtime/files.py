"""A model on disk, of whatever format, as its architecture's linears and norms: what the loader reads from.

Names are always those of the checkpoint that transformers reads, whatever the files call them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.dtypes import WEIGHT_DTYPES, weight_dtype
from qconv.artifacts.layout import layout_of, strip_quantization
from qconv.artifacts.opening import open_checkpoint
from qconv.boundary.content import is_gguf
from qconv.checkpoint.fp8 import WHOLE, Fp8Scheme
from qconv.checkpoint.fp8 import Dequantized as Fp8Checkpoint
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.maps import MapTensor
from qconv.checkpoint.reader import Checkpoint, in_config, map_rows, map_tensor
from qconv.core.architecture import Architecture, Linear
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.errors import CheckpointError
from qconv.formats import get_format, w4afp8
from qconv.formats.base import read_tensors
from qconv.formats.compressed_tensors import CompressedTensors
from qconv.formats.mlx import with_zero_points
from qconv.formats.packed import WholeNumberGrid
from qconv.grids.nearest import E2M1, E4M3
from qconv.models import architecture
from qconv.runtime.activations import ActivationScheme, InputRounding
from qconv.runtime.grouped_activations import MicroscalingRounding, Nvfp4Rounding
from qconv.runtime.packed import DenseWeight, FloatWeight, IntegerWeight, PackedWeight

_PACKED = "w4a16"
"""The format in whose words whole numbers lie in memory."""
_BY_ROW = ("weight_packed", "weight_scale")


class ModelFiles(Protocol):
    """A model on disk."""

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""

    @property
    def config(self) -> dict[str, Any]:
        """A config.json of the dense model, without ``quantization_config``."""

    @property
    def architecture(self) -> Architecture:
        """Its linears and norms."""

    def weight(self, linear: Linear) -> PackedWeight:
        """A linear's weight as the files hold it.

        Raises:
            CheckpointError: it is absent, misshapen or of a dtype that no weight has.
        """

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm, a router, a bias: a tensor that is never packed.

        Raises:
            CheckpointError: as :meth:`weight`.
        """

    def bias(self, linear: Linear) -> Tensor | None:
        """A linear's bias, [out_features]. Also one that the architecture does not ask for: AutoGPTQ stored them all.

        Raises:
            CheckpointError: the architecture asks for it, and it is absent or misshapen.
        """

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Some rows of the embedding or the head, which are large: only those are read.

        Raises:
            CheckpointError: as :meth:`weight`.
        """

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows of the embedding, [ids, hidden], in a float dtype; only those are read.

        Raises:
            CheckpointError: as :meth:`weight`.
        """

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """How engines round a linear's inputs before they multiply; None where they do not."""

    def inverse_frequency_divisors(self) -> Tensor | None:
        """What rotary frequencies are divided by besides what ``config`` says, float32 [head_dim / 2], or None."""


@dataclass(frozen=True, slots=True)
class DenseFiles:
    """An unquantized safetensors checkpoint, and what every other one has in common with it."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    architecture: Architecture
    mapped: MapTensor

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    def weight(self, linear: Linear) -> PackedWeight:
        """The dense weight."""
        return DenseWeight(linear.name, self.tensor(linear.weight, (linear.out_features, linear.in_features)))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A dense tensor, mapped; what is stored quantized is read."""
        entry = self._entry(name, shape)
        return self.checkpoint.read(name) if self.checkpoint.is_dequantized(name) else self.mapped(entry)

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Dense rows, mapped."""
        entry = self._entry(linear.weight, (linear.out_features, linear.in_features))
        if self.checkpoint.is_dequantized(linear.weight):
            return DenseWeight(linear.name, self.checkpoint.gather(linear.weight, torch.arange(start, stop)))
        return DenseWeight(linear.name, map_rows(entry, start, stop))

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Dense rows, read."""
        self._entry(linear.weight, (linear.out_features, linear.in_features))
        return self.checkpoint.gather(linear.weight, ids)

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.checkpoint.entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing.",
                hint="The checkpoint is incomplete, or config.json belongs to another model.",
            )
        if entry.shape != shape or entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, config.json implies a float "
                f"tensor {list(shape)}.",
                hint="config.json belongs to another model, or the shard is wrong.",
            )
        return entry

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias, wherever there is one."""
        name = f"{linear.name}.bias"
        if linear.bias or name in self.checkpoint.entries:
            return self.tensor(name, (linear.out_features,))
        return None

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """None: weights alone are quantized, or nothing is."""
        return None

    def inverse_frequency_divisors(self) -> Tensor | None:
        """None: config.json says everything."""
        return None


@dataclass(frozen=True, slots=True)
class BuildFiles(DenseFiles):
    """A safetensors build: of integer codes, or of linears on different grids."""

    build: Build

    def weight(self, linear: Linear) -> PackedWeight:
        """The packed weight, or the dense one of a linear that the build leaves alone."""
        if not self.build.is_quantized(linear):
            return DenseFiles.weight(self, linear)
        shape, grid = (linear.out_features, linear.in_features), self.build.grid_of(linear)
        if grid.is_float:
            return FloatWeight(linear.name, self.build.qtensor(linear, self.mapped))
        if isinstance(grid, WholeNumberGrid):
            return self._whole_numbers(linear, grid)
        if self.build.format.name == w4afp8.METHOD:
            return _packed(linear, self.build.qtensor(linear, self.mapped))
        if grid.based:
            found = with_zero_points(self.build.qtensor(linear, self.mapped))
            if found is not None and grid.bits in (4, 8):
                return _packed(linear, found)
        specs = self.build.format.specs(linear.name, *shape, grid)
        read = partial(self.build.part, linear, mapped=self.mapped)
        layout = _PACKED if isinstance(self.build.format, CompressedTensors) else self.build.format.name
        return IntegerWeight(linear.name, shape, layout, grid, read_tensors(specs, linear.name, read))

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """What config.json says of a linear's inputs, with the stored scale where there is one."""
        grid = self.build.grid_of(linear)
        if grid.activations == "none" or not self.build.is_quantized(linear):
            return None
        if grid.activations == "local":
            return Nvfp4Rounding(scale=torch.tensor(self.build.input_scale(linear), dtype=torch.float64))
        if grid.scale_dtype is torch.float8_e8m0fnu:
            return MicroscalingRounding(grid.group_size, floats=E2M1 if grid.number == "e2m1" else E4M3)
        if grid.activations == "static" and not grid.is_float:
            return InputRounding(scale=self._largest_input_scale(linear))
        entry = self.checkpoint.entries.get(f"{linear.name}.input_scale")
        scale = self.mapped(entry) if entry is not None and entry.numel == 1 else None
        # Blocks of floats go with groups of inputs; beside integers each token has one scale.
        group = grid.group_size if grid.is_float and grid.group_size != CHANNEL else None
        scheme = ActivationScheme(group, grid.activations == "static", grid.activation_number)
        return scheme.of(scale, linear.in_features)

    def _largest_input_scale(self, linear: Linear) -> Tensor:
        """Of all experts of a layer, gate and up together, in bfloat16: what W4AFP8's readers divide by."""
        entries, scales = self.checkpoint.entries, [self.build.input_scale(linear)]
        for name in w4afp8.sharing_inputs(linear.name):
            if f"{name}.input_scale" not in entries:
                break
            scales.append(float(self.mapped(entries[f"{name}.input_scale"])))
        return torch.tensor(max(scales)).bfloat16().float()

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Packed rows of a quantized head, where a row's words stand together, or dense ones.

        Raises:
            CheckpointError: as :meth:`weight`; the format has no rows.
        """
        if not self.build.is_quantized(linear):
            return DenseFiles.rows(self, linear, start, stop)
        weight = self.weight(linear)
        if not isinstance(weight, IntegerWeight) or weight.format != _PACKED:
            raise CheckpointError(
                f"{self.path}: {linear.name} is quantized in a format that is not read row by row.",
                hint="Load the model as a whole.",
            )
        parts = {name: part[start:stop] for name, part in weight.parts.items() if name in _BY_ROW}
        if "weight_zero_point" in weight.parts:
            per_word = 32 // weight.grid.bits
            parts["weight_zero_point"] = weight.parts["weight_zero_point"][start // per_word : -(-stop // per_word)]
        shape = (stop - start, linear.in_features)
        whole = {name: part for name, part in weight.parts.items() if name not in parts}
        parts |= whole | {"weight_shape": torch.tensor(shape)}
        return IntegerWeight(linear.name, shape, weight.format, weight.grid, parts)

    def _whole_numbers(self, linear: Linear, grid: Grid) -> PackedWeight:
        """int8 numbers, whatever they mean, as packed words of 8 bits: four codes, with 128 added, in each."""
        entry, shape = self.checkpoint.entries.get(linear.weight), (linear.out_features, linear.in_features)
        if entry is None or entry.dtype != torch.int8:
            return DenseFiles.weight(self, linear)
        problem = self.build.format.check(*shape, grid)
        if entry.shape != shape or problem is not None:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} is int8 {list(entry.shape)}, config.json implies {list(shape)}"
                f"{f': {problem}' if problem else ''}.",
                hint="config.json belongs to another model, or the shard is wrong.",
            )
        codes = self.mapped(entry).view(torch.uint8).bitwise_xor(0x80)
        scale = self.tensor(f"{linear.name}.weight_scale", (shape[0], grid.groups(shape[1])))
        parts = {
            "weight_packed": codes.view(torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor(shape),
        }
        packed = Grid(8, grid.group_size, grid.symmetric, scale.dtype)
        return IntegerWeight(linear.name, shape, _PACKED, packed, parts)


@dataclass(frozen=True, slots=True)
class FloatFiles(DenseFiles):
    """A safetensors build of E4M3 codes."""

    codes: Fp8Checkpoint
    activations: ActivationScheme | None

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """What config.json says of inputs, with the stored scale where they are static."""
        if self.activations is None or linear.weight not in self.codes.scales:
            return None
        entry = self.codes.stored.entries.get(f"{linear.name}.input_scale")
        scale = self.mapped(entry) if entry is not None and entry.numel == 1 else None
        return self.activations.of(scale, linear.in_features)

    def weight(self, linear: Linear) -> PackedWeight:
        """The packed weight, or the dense one of a linear that the build leaves alone."""
        scale = self.codes.scales.get(linear.weight)
        if scale is None:
            return DenseFiles.weight(self, linear)
        entry, shape = self.codes.stored.entry(linear.weight), (linear.out_features, linear.in_features)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, config.json implies {list(shape)}.",
                hint="config.json belongs to another model, or the shard is wrong.",
            )
        grid = _float_grid(self.codes.scheme, scale)
        scales = self.mapped(scale).view(grid.scale_shape(*shape))
        return FloatWeight(linear.name, QTensor(grid, self.mapped(entry), scales, None))


def open_files(path: Path, mapped: MapTensor = map_tensor) -> ModelFiles:
    """Open whatever lies at a path.

    Args:
        path: A folder with safetensors and config.json, a GGUF file (of a set, any one), or a folder that holds one.
        mapped: How tensors are mapped: by default each on its own, so that it takes no memory once it is dropped.

    Raises:
        CheckpointError: damaged, incomplete, of an unknown architecture, or quantized in a way that is not read.
        UsageError: experts are fused.
    """
    if is_gguf(path):
        from qconv.runtime.gguf_files import GgufFiles

        return GgufFiles.open(path, mapped)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder.", hint="Give the folder of a model, or a GGUF file.")
    checkpoint = open_checkpoint(path)
    layout, config = layout_of(path, checkpoint.config), strip_quantization(checkpoint.config)
    with in_config(path):
        model = architecture(config)
    if layout.section is None:
        return DenseFiles(checkpoint, config, model, mapped)
    if layout.scheme is not None:
        codes = Fp8Checkpoint.of(checkpoint, layout.scheme, weight_dtype(path, config))
        return FloatFiles(checkpoint, config, model, mapped, codes, ActivationScheme.parse(layout.section))
    return BuildFiles(checkpoint, config, model, mapped, Build.of(checkpoint))


def require_no_bias(files: ModelFiles, linear: Linear) -> None:
    """Check that a linear whose bias nobody adds has none, or one of zeros, as AutoGPTQ stored for all of them.

    Raises:
        CheckpointError: it has another.
    """
    bias = None if linear.bias else files.bias(linear)
    if bias is not None and bool(bias.any()):
        raise CheckpointError(
            f"{files.path}: {linear.name} has a bias that is not zero; config.json implies none.",
            hint="config.json belongs to another model.",
        )


def _packed(linear: Linear, weight: QTensor) -> IntegerWeight:
    """Integers in the words that they have in memory."""
    packed = get_format(_PACKED).pack(linear.name, weight)
    words = {name.rpartition(".")[2]: tensor for name, tensor in packed}
    return IntegerWeight(linear.name, weight.shape, _PACKED, replace(weight.grid, activations="none"), words)


def _float_grid(scheme: Fp8Scheme, scale: TensorEntry) -> Grid:
    rows = CHANNEL if scheme.rows == WHOLE else scheme.rows
    columns = CHANNEL if scheme.columns == WHOLE else scheme.columns
    return Grid(8, columns, True, scale.dtype, "e4m3", rows)
