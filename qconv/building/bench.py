"""Random checkpoints with the true shapes of Qwen3-Coder-480B-A35B or others, so that scale can be tried without them.

The weights are random but behave: standard deviation 0.02 keeps activations of order one through any number of layers,
and a few channels of the layer norms are 10 to 30 times the others, as in trained models, so that an activation-aware
method has something to find.

How it is fast and small
    Drawing 7.5 billion normals takes far longer than writing them. A pool of them is drawn once; each block of a tensor
    is a slice of the pool at a pseudo-random offset, times the tensor's own scale. Offsets and scales come from the
    seed and the tensor's name, so no two experts are equal and a tensor is the same however many others there are.
    Memory holds the pool and one block.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.building.bench_models import PublishedModel
from qconv.checkpoint.header import TensorSpec, encode_header
from qconv.checkpoint.writer import output_errors, sync_folder, write_atomically
from qconv.errors import CheckpointError, OutputError, ResourceError, UsageError
from qconv.folders.journal import JOURNAL_NAME, Journal, locked
from qconv.folders.ownership import LEDGER_NAME, WORK_FOLDER, remove_claimed, strangers
from qconv.models import architecture

Progress = Callable[[str, int, int], None]
"""Called with the shard's name, bytes written so far and bytes in all."""

WEIGHT_STD = 0.02
NORM_STD = 0.1
OUTLIER_SCALE = (10.0, 30.0)

_POOL = 1 << 25  # elements, 64 MiB
_BLOCK = 1 << 22  # elements, 8 MiB
_SMALL_FILES = 10**7  # bytes to spare for config, tokenizer and index

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("i", "n"),)
"""One, since readers of byte-level BPE want to see some."""
FIRST_SPECIAL = 256 + len(MERGES)  # after the byte tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class SliceShape:
    """The sizes that a slice shares with the whole model; the defaults are Qwen3-Coder-480B's."""

    hidden_size: int = 6144
    expert_width: int = 2560
    heads: int = 96
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    top_k: int = 8

    def nbytes(self, layers: int, experts: int) -> int:
        """Bytes of all tensors, by what a layer and an expert add: nothing is made for each of a billion layers."""
        one, two_layers, two_experts = (self._nbytes(*counts) for counts in ((1, 1), (2, 1), (1, 2)))
        return one + (layers - 1) * (two_layers - one) + layers * (experts - 1) * (two_experts - one)

    def _nbytes(self, layers: int, experts: int) -> int:
        shapes = (shape for _, shape in architecture(self.config(layers, experts)).tensors())
        return sum(math.prod(shape) for shape in shapes) * torch.bfloat16.itemsize

    def tensors(self, config: Mapping[str, Any]) -> Iterator[TensorSpec]:
        """What the files of a slice hold."""
        for name, shape in architecture(dict(config)).tensors():
            yield TensorSpec(name, torch.bfloat16, shape)

    def config(self, layers: int, experts: int) -> dict[str, Any]:
        """config.json of a model with so many layers and experts, in the keys that the published one uses."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "eos_token_id": FIRST_SPECIAL,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.expert_width,
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": experts,
            "num_experts_per_tok": min(self.top_k, experts),
            "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads,
            "output_router_logits": False,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1e7,
            "router_aux_loss_coef": 0.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


def write_slice(
    out: Path,
    *,
    layers: int,
    experts: int,
    seed: int = 0,
    shard_size: int = 4 * 10**9,
    shape: SliceShape | PublishedModel | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a random checkpoint of ``layers`` layers with ``experts`` experts each, or go on with it.

    Args:
        out: A folder that does not exist, is empty, or holds the beginning of the same slice.
        layers, experts: How much of the model (480B: 62 and 160).
        seed: The same seed gives the same bytes.
        shard_size: Bytes a shard may have; one tensor larger than that gets a shard of its own.
        shape: All other sizes; Qwen3-Coder-480B's if None.
        progress: Told after every block.

    Raises:
        UsageError: a count below 1 or beyond what config.json may say, or a vocabulary without room for the tokenizer.
        OutputError: the folder holds something else, or cannot be written.
        StaleJournalError: it holds the beginning of another slice.
        ResourceError: the disk lacks room; nothing was written.
    """
    shape = shape or SliceShape()
    config, specs, total = _described(out, shape, layers, experts)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    asked = f"{layers} layers, {experts} experts, seed {seed}, shards of {shard_size}, {shape}"
    with locked(out):
        journal = _journal(out, {"slice": hashlib.sha256(asked.encode()).hexdigest()})
        weights = _Weights(seed)
        shards = _split(specs, shard_size)
        weight_map: dict[str, str] = {}
        done = 0
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for size in _write_shard(out / name, shard, weights, journal):
                done += size
                if progress is not None:
                    progress(name, done, total)
            weight_map |= {spec.name: name for spec in shard}
        # The index comes last: a slice that was interrupted has none, and no reader takes it for a whole one.
        small = {
            **_tokenizer_files(),
            "generation_config.json": _json({"do_sample": False, "eos_token_id": FIRST_SPECIAL}),
            "config.json": _json(config),
            "model.safetensors.index.json": _json({"metadata": {"total_size": total}, "weight_map": weight_map}),
        }
        for name, data in small.items():
            _write_small(out / name, data, journal)
        remove_claimed(out / WORK_FOLDER)


def _described(
    out: Path, shape: SliceShape | PublishedModel, layers: int, experts: int
) -> tuple[dict[str, Any], list[TensorSpec], int]:
    """config.json of a slice, its tensors and their bytes, for which the disk has room."""
    if isinstance(shape, SliceShape):
        if layers < 1 or experts < 1 or shape.vocab_size < FIRST_SPECIAL + len(SPECIAL_TOKENS):
            counts = f"{layers} layers, {experts} experts and {shape.vocab_size} tokens"
            raise UsageError(f"a slice of {counts} cannot be made.")
        # Nothing is made for each of a billion layers before it is known that they fit.
        _require_fit(out, shape.nbytes(layers, experts))
    config = shape.config(layers, experts) | {"eos_token_id": FIRST_SPECIAL}
    try:
        specs = list(shape.tensors(config))
    except CheckpointError as error:
        raise UsageError(f"a slice of {layers:,} layers of {experts:,} experts: {error.message}") from error
    total = sum(spec.nbytes for spec in specs)
    _require_fit(out, total)
    return config, specs, total


class _Weights:
    """Pseudo-random tensors by name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.empty(_POOL, dtype=torch.bfloat16)
        for start in range(0, _POOL, _BLOCK):
            self._pool[start : start + _BLOCK] = torch.randn(_BLOCK, generator=generator)
        self._buffer = torch.empty(_BLOCK, dtype=torch.bfloat16)
        self._coded: dict[torch.dtype, Tensor] = {}

    def blocks(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The tensor's elements in order, flat; a block is valid until the next one is asked for."""
        source = random.Random(f"{self.seed}/{spec.name}")
        if len(spec.shape) == 1:
            yield self._norm(spec, source)
            return
        if spec.dtype != torch.bfloat16:
            yield from self._codes(spec, source)
            return
        std = WEIGHT_STD * source.uniform(0.8, 1.25)
        left = spec.nbytes // 2
        while left:
            block = self._buffer[: min(left, _BLOCK)]
            start = source.randrange(_POOL - len(block) + 1)
            torch.mul(self._pool[start : start + len(block)], std, out=block)
            left -= len(block)
            yield block

    def _codes(self, spec: TensorSpec, source: random.Random) -> Iterator[Tensor]:
        """Quantized weights and their scales, which together have about the same spread as others.

        FP8 numbers are normal with deviation 1 and their scales the weights' deviation; four-bit ones are any of 16,
        which have deviation 2.9, and their scales 2^-7.
        """
        if spec.dtype == torch.float32:
            yield torch.full((spec.nbytes // 4,), WEIGHT_STD * source.uniform(0.8, 1.25))
            return
        if spec.name.endswith("_scales"):
            yield torch.full((spec.nbytes,), 120, dtype=torch.uint8)
            return
        if spec.dtype not in self._coded:
            coded = self._pool.to(spec.dtype) if spec.dtype.is_floating_point else self._pool.view(torch.uint8)[::2]
            self._coded[spec.dtype] = coded.contiguous()
        left = spec.nbytes
        while left:
            size = min(left, _BLOCK)
            start = source.randrange(_POOL - size + 1)
            left -= size
            yield self._coded[spec.dtype][start : start + size]

    def _norm(self, spec: TensorSpec, source: random.Random) -> Tensor:
        """Near one. A layer norm's outlier channels are the same in every layer, as trained models have them."""
        (size,) = spec.shape
        start = source.randrange(_POOL - size + 1)
        weight = self._pool[start : start + size].float().mul_(NORM_STD).add_(1.0)
        if spec.name.endswith("layernorm.weight"):
            for channel in random.Random(f"{self.seed}/outliers").sample(range(size), max(1, size // 1024)):
                weight[channel] = source.uniform(*OUTLIER_SCALE)
        return weight.to(spec.dtype)


def _require_fit(out: Path, total: int) -> None:
    """Check that the folder is new, empty or the beginning of a slice, and that its disk has room."""
    with output_errors(out):
        begun = (out / WORK_FOLDER / JOURNAL_NAME).is_file()
        fit = begun or not out.exists() or (out.is_dir() and not strangers(out, {f"{WORK_FOLDER}/{LEDGER_NAME}": None}))
        if not fit:
            raise OutputError(f"{out} exists and is not an empty folder.", hint="Choose another folder or remove it.")
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in out.glob("*.safetensors"))
        if free < total + _SMALL_FILES:
            raise ResourceError(
                f"{out}: the slice needs {total / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free.",
                hint="Ask for fewer layers or experts, or choose another disk.",
            )


def _split(specs: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    """Consecutive tensors into shards of at most ``shard_size`` bytes."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _journal(out: Path, fingerprints: Mapping[str, str]) -> Journal:
    """The journal of a slice, begun or gone on with.

    Raises:
        StaleJournalError: it is another slice's.
    """
    path = out / WORK_FOLDER / JOURNAL_NAME
    journal = Journal.load(path)
    if journal is None:
        return Journal.create(path, fingerprints)
    journal.require(fingerprints)
    return journal


def _write_shard(path: Path, specs: Sequence[TensorSpec], weights: _Weights, journal: Journal) -> Iterator[int]:
    """Stream a shard, yielding the bytes of each block. No checksum: the data mean nothing, and speed is asked for.

    One that is there already is passed over if the journal knows it by its size; nothing is ever replaced.
    """
    header = encode_header(specs)
    size = len(header) + sum(spec.nbytes for spec in specs)
    temporary = journal.staged(path.name)
    with output_errors(path):
        if os.path.lexists(path):
            if journal.units.get(path.name) != {"size": size} or path.lstat().st_size != size or path.is_symlink():
                raise OutputError(f"{path}: was not written by this slice.", hint="Move it away.")
            yield size - len(header)
            return
        with temporary.open("wb") as file:
            file.write(header)
            for spec in specs:
                for block in weights.blocks(spec):
                    yield file.write(block.contiguous().view(torch.uint8).numpy().data)
        journal.commit(path.name, {"size": size})
        temporary.rename(path)
        sync_folder(path.parent)


def _write_small(path: Path, data: bytes, journal: Journal) -> None:
    """Write a file of always the same bytes; one that is there must have them."""
    with output_errors(path):
        if os.path.lexists(path):
            if path.is_symlink() or path.read_bytes() != data:
                raise OutputError(f"{path}: was not written by this slice.", hint="Move it away.")
            return
    write_atomically(path, data, journal.staged(path.name))


def _tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE of one token a byte and hardly a merge, with ChatML's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": 262144,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(settings),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
