"""The tensors of a GGUF file: their names and shapes, and which tensors of the checkpoint each is made of.

Names come from the ``gguf`` package's own table. Shapes are in torch's order, outermost first; a GGUF file states them
reversed. The experts of a layer lie in one tensor behind each other, in the order of ``sources``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from gguf import MODEL_TENSOR, TENSOR_NAMES, TensorNameMap, get_tensor_name_map
from torch import Tensor

from qconv.core.architecture import Architecture, Layer, Linear, Module, Moe, Norm
from qconv.errors import UsageError
from qconv.formats.gguf.changes import Change, Piece, added
from qconv.formats.gguf.forms import Form, form

_UNQUANTIZED = (MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.SSM_CONV1D)
_WITHIN = re.compile(r"^(model\.)?language_model\.")
"""What comes before, or within, the names of a language model that is a part of a larger one."""
_EXPERT_NUMBER = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: ``blk.0.attn_q.weight``.
        kind: What it is, in the ``gguf`` package's terms.
        layer: Its layer, None outside the layers.
        shape: Outermost dimension first; the last is the row that is cut into blocks.
        sources: The checkpoint's tensors behind each other, each an equal share; empty where ``constant`` is given.
        heads: Where its rows are to be permuted (:func:`permute_heads`), the number of heads; else 0.
        constant: The values of a tensor that no checkpoint holds.
        change: What its one source becomes, where that is not the same numbers in rows; else None.
        piece: Which of the change's pieces it is.
    """

    name: str
    kind: MODEL_TENSOR
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int = 0
    constant: tuple[float, ...] = ()
    change: Change | None = field(default=None, compare=False)
    piece: int = 0

    def made_of(self, source: Tensor) -> Tensor:
        """Its values, of a source's."""
        return source if self.moved is None else self.moved.make(source)

    @property
    def moved(self) -> Piece | None:
        """How it is changed."""
        return None if self.change is None else self.change.pieces[self.piece]

    @property
    def in_rows(self) -> bool:
        """Whether its rows are the checkpoint's, in whatever order."""
        return self.moved is None or self.moved.rows is not None

    @property
    def modules(self) -> tuple[str, ...]:
        """The checkpoint's modules whose weights it holds."""
        return tuple(source.rpartition(".")[0] for source in self.sources)

    @property
    def columns(self) -> int:
        """The length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """The number of rows, those of all experts together."""
        return math.prod(self.shape[:-1])

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def quantizable(self) -> bool:
        """Whether a file type decides about it. Norms, biases, the experts' too, and the router are always F32."""
        return len(self.shape) > 1 and self.kind not in _UNQUANTIZED and not self.name.endswith(".bias")


def architecture_name(family: str) -> str:
    """llama.cpp's name of an architecture: ``qwen3moe`` for the family ``qwen3_moe``.

    Raises:
        UsageError: llama.cpp's form of that family is not known here.
    """
    return form(family).architecture


def gguf_tensors(
    model: Architecture, rope_factors: Sequence[float] = (), present: Collection[str] = ()
) -> list[GgufTensor]:
    """All tensors of a model's GGUF file, in file order.

    Args:
        model: The architecture.
        rope_factors: What each rotary frequency is divided by; empty for none.
        present: The names that a file has which is there already: some may be held in another way that llama.cpp reads.

    Raises:
        UsageError: llama.cpp's form of the family is not known here, or has no place for one of its tensors.
    """
    of = form(model.family)
    names = get_tensor_name_map(of.table, len(model.layers))
    permuted = {}
    if of.pairs:
        permuted = {MODEL_TENSOR.ATTN_Q: model.num_attention_heads, MODEL_TENSOR.ATTN_K: model.num_key_value_heads}
    tensors = []
    for layer, modules in _groups(model):
        for parts in zip(*(module.tensors() for module in modules), strict=True):
            sources = tuple(name for name, _ in parts)
            change = _change(of, model, modules[0], *parts[0])
            other = of.mixing.elsewhere(model, *parts[0]) if present and change is None else None
            if other is not None and _place(of, names, sources[0])[1] not in present:
                change = other
            pieces = [(sources[0], _shape(modules, parts[0][1]))]
            if change is not None:
                pieces = [(piece.name, piece.shape) for piece in change.pieces]
            for number, (called, shape) in enumerate(pieces):
                kind, name = _place(of, names, called)
                heads = permuted.get(kind, 0)
                tensors.append(GgufTensor(name, kind, layer, shape, sources, heads, change=change, piece=number))
    if rope_factors:
        kind = MODEL_TENSOR.ROPE_FREQS
        name = f"{TENSOR_NAMES[kind]}.weight"
        tensors.insert(1, GgufTensor(name, kind, None, (len(rope_factors),), (), constant=tuple(rope_factors)))
    return tensors


def unobserved(model: Architecture) -> frozenset[str]:
    """Weights of linears that calibration does not look at, by name: latent attention's ``kv_b``, a delta rule's gates.

    They are small, and engines keep them as they are. A GGUF file quantizes them, but nobody knows what that costs.
    """
    kept = (module for layer in model.layers for module in layer.attention.kept())
    return frozenset(module.weight for module in kept if isinstance(module, Linear))


def permute_heads(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k, [heads * head_dim, ...], from transformers' rotary layout to llama.cpp's.

    Of a head's ``head_dim`` rows transformers rotates row i together with row i + head_dim / 2, llama.cpp's ``llama``
    rotates 2i with 2i + 1. Scores do not change, since q and k are reordered alike.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _change(of: Form, model: Architecture, module: Module, name: str, shape: tuple[int, ...]) -> Change | None:
    """What a tensor becomes in the file, None for the same numbers."""
    if isinstance(module, Norm) and module.offset:
        return added(name, shape, module.offset)
    return of.mixing.changes(model, name, shape)


def _place(of: Form, names: TensorNameMap, source: str) -> tuple[MODEL_TENSOR, str]:
    """What a tensor of the checkpoint is in llama.cpp's form; the tables have a router's correction as a module.

    Raises:
        UsageError: it has no place there.
    """
    plain = _WITHIN.sub(r"\1", _EXPERT_NUMBER.sub("", source))
    for name in (plain, plain.removesuffix("_bias") + ".bias"):
        found: tuple[MODEL_TENSOR, str] | None = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return found
    raise UsageError(
        f"{source}: llama.cpp's {of.architecture} has no place for it.", hint="This model cannot be written as GGUF."
    )


def _groups(model: Architecture) -> Iterator[tuple[int | None, Sequence[Module]]]:
    """Modules that become one tensor together (or one for weights and one for biases), with their layer."""
    yield None, [model.embedding]
    for layer in model.layers:
        for modules in _layer_groups(layer):
            yield layer.index, modules
    yield None, [model.final_norm]
    if model.lm_head is not None:
        yield None, [model.lm_head]


def _layer_groups(layer: Layer) -> Iterator[Sequence[Module]]:
    yield [layer.input_norm]
    yield from ([linear] for linear in layer.attention.linears())
    yield from ([kept] for kept in (*layer.attention.kept(), layer.post_attention_norm))
    yield from ([module] for module in layer.routing())
    if isinstance(layer.mlp, Moe):
        yield from zip(*(expert.linears() for expert in layer.mlp.experts), strict=True)
    for mlp in layer.mlps()[len(layer.mlp.experts) if isinstance(layer.mlp, Moe) else 0 :]:
        yield from ([linear] for linear in mlp.linears())


def _shape(modules: Sequence[Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a merged tensor one dimension more; of the shared expert's gate, a single row, the vector that it is."""
    if _EXPERT_NUMBER.search(modules[0].name):
        return (len(modules), *shape)
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
