"""A source model: a checkpoint that is known to be the architecture that its config.json names."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from qconv.artifacts.dtypes import WEIGHT_DTYPES, weight_dtype
from qconv.artifacts.opening import untied, viewed
from qconv.artifacts.storage import storage_of
from qconv.artifacts.verbatim import Verbatim, verbatim_of
from qconv.boundary.content import misplaced_files
from qconv.boundary.printable import printable
from qconv.chat.files import additional_files
from qconv.checkpoint.header import DTYPE_NAMES, read_header
from qconv.checkpoint.hub import folder_name, require_inside
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import SINGLE_NAME, Checkpoint, in_config, read_weight_map, require_finite
from qconv.checkpoint.rope import in_both_spellings
from qconv.checkpoint.tiktoken import RANKS_NAME
from qconv.core.architecture import HEAD, TIED, Architecture
from qconv.errors import CheckpointError
from qconv.models import architecture

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", RANKS_NAME)
"""One of these must be there; the rest of a tokenizer's files are optional."""
COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    RANKS_NAME,
    "tokenization_*.py",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "LICENSE*",
)
"""What travels unchanged from the source to a build; code is copied for engines that are told to trust it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checked checkpoint and its architecture; one of quantized weights reads as the dense one that it stands for.

    ``untied`` tells that its head is one of its own though config.json calls it the embedding: see :func:`untied`.
    ``verbatim`` is what the checkpoint holds beside the model.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    untied: bool
    verbatim: tuple[Verbatim, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Source:
        """Open and check a checkpoint: every tensor of the architecture once, of its shape, none that nobody declares.

        Of a quantized checkpoint also every weight's scale, and that there is no other.

        Raises:
            CheckpointError: the first thing that is wrong, by file and tensor.
            UsageError: experts are joined and quantized; config.json says two things of rotary embeddings.
        """
        with in_config(path):
            stored = viewed(Checkpoint.open(path))
            checkpoint = untied(stored)
            storage = storage_of(path, checkpoint.config)
            model, is_untied = architecture(checkpoint.config), checkpoint is not stored
            if storage is not None:
                checkpoint = storage.read(checkpoint, weight_dtype(path, checkpoint.config))
            verbatim = check_tensors(checkpoint, model)
            in_both_spellings(checkpoint.config)  # contradictions are told now, and not when the work is done
        require_tokenizer(path)
        _require_fetched(path)
        return cls(checkpoint, model, is_untied, verbatim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first layer's weights."""
        return self.checkpoint.entry(self.architecture.layers[0].attention.linears()[0].weight).dtype

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, known to be finite.

        Raises:
            CheckpointError: not readable, or NaN or infinite values in it.
        """
        return require_finite(self.checkpoint.read(name), self.checkpoint.entry(name))

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor as consecutive blocks of rows, each known to be finite; memory holds one of them.

        Each begins at a multiple of ``multiple`` rows.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        row, entry = 0, self.checkpoint.entry(name)
        for block in self.checkpoint.blocks(name, multiple):
            yield require_finite(block, entry, row)
            row += len(block) if block.dim() else 1

    def notices(self) -> list[str]:
        """What a build from this source should be known for, as sentences; empty for an ordinary one."""
        source, sentences = self.checkpoint, []
        if self.untied:
            sentences.append(
                f"config.json ties the head to the embedding, but {HEAD}.weight is another matrix: it is kept, and the "
                f"build's config.json says {TIED} false"
            )
        if not isinstance(source, QuantizedCheckpoint):
            return sentences
        dtype = DTYPE_NAMES[source.entry(next(iter(source.codes))).dtype]
        again = ", and quantizing it to FP8 again need not give the same bits" if source.kind.startswith("FP8") else ""
        sentences.append(
            f"{len(source.codes):,} weights are {source.kind}, read as {dtype}: errors are measured against that{again}"
        )
        if source.ignored:
            sentences.append(
                f"{len(source.ignored):,} scales of static activations or of a cache are ignored, the first "
                f"{source.ignored[0]!r}"
            )
        return sentences

    @property
    def name(self) -> str:
        """What the model is called: its folder's name.

        Raises:
            UsageError: no report could hold it.
        """
        return folder_name(self.checkpoint.path)

    def companion_digests(self) -> dict[str, str]:
        """Of the companions the sha256 by name, hexadecimal.

        Raises:
            CheckpointError: one cannot be read.
        """
        try:
            return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in self.companions()}
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.", hint="Repair it.") from error

    def companions(self) -> list[Path]:
        """Tokenizer, chat template and generation config, sorted by name.

        Raises:
            CheckpointError: as :func:`companions`.
        """
        return companions(self.checkpoint.path)

    def named_companions(self) -> dict[str, Path]:
        """:meth:`companions` by their names relative to the model's folder, which are those in a build."""
        return {file.relative_to(self.checkpoint.path).as_posix(): file for file in self.companions()}

    def require_publishable(self) -> None:
        """Check the model's name and the files that a build takes from it, before any work.

        Raises:
            UsageError: no report could hold the name.
            CheckpointError: as :func:`companions`.
        """
        _ = self.name
        self.companions()


def companions(path: Path) -> list[Path]:
    """The files of a model's folder that a build takes over, sorted by name; those of a folder within it come last.

    Raises:
        CheckpointError: one is a link out of the folder, no plain file, or has a name that no list of checksums can
            hold.
    """
    found = sorted({file for pattern in COMPANION_PATTERNS for file in path.glob(pattern) if not file.is_dir()})
    found += additional_files(path)
    for file in found:
        if printable(file.name) != file.name:
            raise CheckpointError(
                f"{printable(str(file))}: its name holds characters that no list of checksums can.",
                hint="Rename the file, or remove it.",
            )
        require_inside(path, file)
        if not file.is_file():
            raise CheckpointError(f"{file}: is no plain file.", hint="Remove it.")
    return found


def is_companion(name: str) -> bool:
    """Whether a file of that name travels unchanged from a source to its builds."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)


def listed_files(path: Path) -> dict[str, str]:
    """The file of each tensor, by the index or the one file that holds the model; empty where neither can tell.

    Raises:
        CheckpointError: the index or the file is damaged.
    """
    listed = read_weight_map(path)
    if listed is not None:
        return dict(listed)
    if not (path / SINGLE_NAME).is_file() or SINGLE_NAME in {Path(name).name for name in misplaced_files(path)}:
        return {}
    return dict.fromkeys(read_header(path / SINGLE_NAME), SINGLE_NAME)


def require_tokenizer(path: Path) -> None:
    """Check that a tokenizer lies in the folder.

    Raises:
        CheckpointError: none of its main files is there.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path}: no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there.",
            hint="Copy the tokenizer files of the original model into the folder.",
        )


def _require_fetched(path: Path) -> None:
    """Check that what travels to a build is no pointer to a file and no page that says why there is none."""
    for name, instead in misplaced_files(path).items():
        if any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS):
            raise CheckpointError(f"{path / name}: is {instead.what}.", hint=instead.remedy)


def check_tensors(checkpoint: Checkpoint, model: Architecture) -> tuple[Verbatim, ...]:
    """Check that a dense checkpoint holds every tensor of its architecture once, of its shape, and no unknown one.

    Gives those that are none of the architecture's, but declared by transformers' own model of the type.

    Raises:
        CheckpointError: the first thing that is wrong, by file and tensor.
    """
    expected = dict(model.tensors())
    missing = [name for name in expected if name not in checkpoint.entries]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors of a {model.family} model are missing, the first "
            f"{missing[0]!r}.",
            hint="The checkpoint is incomplete, or config.json belongs to another model.",
        )
    ignorable = model.ignorable()
    others = [name for name in checkpoint.entries if name not in expected and name not in ignorable]
    verbatim = verbatim_of(checkpoint, model, others)
    unknown = sorted({*others} - {one.name for one in verbatim})
    if unknown:
        raise CheckpointError(
            f"{checkpoint.entry(unknown[0]).file}: {len(unknown)} tensors are not part of a {model.family} model, the "
            f"first {unknown[0]!r}.",
            hint="Remove them, or check config.json: qconv drops nothing silently.",
        )
    for name, shape in expected.items():
        entry = checkpoint.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} is {list(entry.shape)}, config.json implies {list(shape)}.",
                hint="config.json belongs to another model, or the shard is wrong.",
            )
        if entry.dtype not in WEIGHT_DTYPES:
            allowed = ", ".join(DTYPE_NAMES[dtype] for dtype in WEIGHT_DTYPES)
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has dtype {DTYPE_NAMES[entry.dtype]}, a weight must be one of "
                f"{allowed}.",
                hint="Give the original, unquantized checkpoint.",
            )
    return verbatim
