"""A whole GGUF build: which files, which tensors in them, of which types; and one file of it written.

A file depends on the plan and the source alone, so files can be written in any order and again after a crash, with the
same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType

from qconv.artifacts.gguf_tensors import Importance, encoded, encoder, uniform
from qconv.artifacts.source import Source
from qconv.checkpoint.extended_rope import with_extended_rope
from qconv.checkpoint.writer import ShardRecord
from qconv.formats.gguf.container import FileLayout, GgufWriter, TensorInfo, lay_out
from qconv.formats.gguf.metadata import FOLDED, model_metadata
from qconv.formats.gguf.mixture import Override, file_type_id, fitted, no_override, tensor_types
from qconv.formats.gguf.names import GgufTensor, architecture_name, gguf_tensors
from qconv.formats.gguf.rope import rope_of
from qconv.formats.gguf.tokenizer import tokenizer_metadata

DEFAULT_SPLIT_SIZE = 50 * 10**9
"""The largest file that the Hub takes."""


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """What a build will hold, known before any weight is read.

    Attributes:
        file_type: ``Q4_K_M`` ...
        tensors: By name, in file order.
        wanted: The type that each tensor was to have.
        types: The type that each has, another where the wanted one does not fit its rows.
        files: The layouts, in order; one unless the model is split.
    """

    file_type: str
    tensors: dict[str, GgufTensor]
    wanted: dict[str, GGMLQuantizationType]
    types: dict[str, GGMLQuantizationType]
    files: tuple[FileLayout, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the number of their elements."""
        nbytes = sum(info.nbytes for file in self.files for info in file.tensors)
        return 8.0 * nbytes / sum(tensor.numel for tensor in self.tensors.values())


def plan_gguf(
    source: Source,
    file_type: str,
    name: str,
    *,
    importance: bool = False,
    override: Override = no_override,
    max_split_size: int = DEFAULT_SPLIT_SIZE,
    folded: bool = False,
    rope: str | None = None,
    beside: Sequence[GgufTensor] = (),
    repacked: Collection[GGMLQuantizationType] = (),
) -> GgufPlan:
    """Plan a build.

    Args:
        source: The checkpoint.
        file_type: A key of :data:`qconv.formats.gguf.mixture.FILE_TYPES`.
        name: What the model and its files are called.
        importance: Whether there is an imatrix.
        override: Gives types before the file type does.
        max_split_size: Bytes of tensors in one file.
        folded: Whether scales are folded into the model.
        rope: A scaling that is asked for, as a recipe says it.
        beside: Further tensors, of constants.
        repacked: Types whose blocks are made already.

    Raises:
        CheckpointError: config.json or the tokenizer is malformed.
        UsageError: llama.cpp cannot express the model, or qconv has no encoder of a type; says what.
    """
    model, config = source.architecture, with_extended_rope(source.checkpoint.config, rope)
    architecture_name(model.family)  # what lacks a form at all is not to be told of a rope that has none
    tensors = gguf_tensors(model, rope_of(config).factors(model.head_dim))
    wanted = tensor_types(file_type, model, tensors, importance=importance, override=override)
    types = fitted(wanted, tensors)
    wanted |= {tensor.name: GGMLQuantizationType.F32 for tensor in beside}
    types |= {tensor.name: GGMLQuantizationType.F32 for tensor in beside}
    metadata = model_metadata(config, model, name, file_type_id(file_type, tensors, types))
    metadata |= tokenizer_metadata(source.checkpoint.path, model.embedding.out_features, config)
    if folded:
        metadata[FOLDED] = GGUFValue(True, GGUFValueType.BOOL)
    tensors += beside
    for type in set(types.values()) - set(repacked):
        encoder(type)
    infos = [TensorInfo(tensor.name, types[tensor.name], tensor.shape) for tensor in tensors]
    files = lay_out(name, metadata, infos, max_split_size)
    return GgufPlan(file_type, {tensor.name: tensor for tensor in tensors}, wanted, types, tuple(files))


def write_file(
    folder: Path, plan: GgufPlan, layout: FileLayout, source: Source, importance: Importance = uniform
) -> ShardRecord:
    """Write one file of a plan, check it and give it its final name.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        OutputError: the disk is full or the file cannot be written.
        VerificationError: what was read back is not what was written.
    """
    with GgufWriter(folder, layout) as writer:
        for info in layout.tensors:
            writer.write_blocks(info.name, encoded(source, plan.tensors[info.name], info.type, importance))
        return writer.commit()
