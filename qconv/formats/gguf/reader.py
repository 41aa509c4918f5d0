"""A GGUF model on disk, one file or a set of splits, whose files are known to belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, Keys
from gguf.quants import dequantize
from torch import Tensor

from qconv.boundary.content import gguf_files
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import map_rows, row_ranges
from qconv.errors import CheckpointError
from qconv.formats.gguf.header import GgufEntry, GgufHeader, Value, read_header

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)

IMATRIX_TYPE = "imatrix"
"""``general.type`` of a file that holds an importance matrix."""

_TILE = 1 << 18
"""Elements that are dequantized at once. Many more, and most of the time is spent on fresh pages for temporaries."""

SCALES = ("scale", "input_scale")
"""What tensors beside an NVFP4 weight are called instead of ``weight``."""

_MIXED_UP = "The file was renamed, or the splits are of different models: download them again."


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A whole model.

    Attributes:
        files: Its files in order.
        metadata: All key/values but those that only say which split a file is.
        entries: Every tensor by name, in file order.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Value]
    entries: dict[str, GgufEntry]

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Read and check the headers of a file and of all other splits of its set.

        Args:
            path: A GGUF file; of a set, any one. Or a folder that holds one model.

        Raises:
            CheckpointError: a file is missing, damaged or of another set; it is named.
        """
        paths = split_paths(_only_model(path) if path.is_dir() else path)
        missing = [file for file in paths if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{missing[0]}: {len(missing)} of {len(paths)} splits missing: "
                f"{', '.join(file.name for file in missing[:5])}{' ...' if len(missing) > 5 else ''}.",
                hint="Finish the download, or the run that writes them.",
            )
        headers = [read_header(file) for file in paths]
        _check_set(headers)
        metadata = {key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")}
        entries = {name: entry for header in headers for name, entry in header.entries.items()}
        return cls(tuple(paths), metadata, entries)

    def entry(self, name: str) -> GgufEntry:
        """Where a tensor lies.

        Raises:
            CheckpointError: no tensor of that name.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.files[0]}: no tensor {name!r}.", hint="The file is of another model.")
        return self.entries[name]

    def beside(self, name: str) -> list[str]:
        """Tensors that hold scales of an NVFP4 weight: what it is multiplied by, and what its inputs are."""
        if self.entries.get(name) is None or self.entries[name].type is not GGMLQuantizationType.NVFP4:
            return []
        stem = name.removesuffix("weight")
        return [stem + leaf for leaf in SCALES if stem + leaf in self.entries]

    def scales_of(self, name: str) -> tuple[float, ...] | None:
        """What a weight is multiplied by, one number or one for each expert; None where there is none.

        Raises:
            CheckpointError: they are no float32, or no positive numbers.
        """
        found = name.removesuffix("weight") + SCALES[0]
        if found not in self.beside(name):
            return None
        entry = self.entries[found]
        if entry.type is not GGMLQuantizationType.F32:
            raise CheckpointError(f"{entry.file}: {found} is {entry.type.name}, not F32.", hint="The file is damaged.")
        values = torch.cat([block.view(torch.float32).flatten() for block in self.blocks(found)])
        if not bool((torch.isfinite(values) & (values > 0.0)).all()):
            raise CheckpointError(f"{entry.file}: {found} is no positive number.", hint="The file is damaged.")
        return tuple(values.tolist())

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor's bytes as consecutive blocks of whole rows, uint8 [rows, bytes], each mapped on its own.

        Raises:
            CheckpointError: no such tensor, or the file cannot be read.
        """
        entry = _as_bytes(self.entry(name))
        for start, stop in row_ranges(entry):
            yield map_rows(entry, start, stop)

    def dequantized(self, name: str) -> Iterator[Tensor]:
        """The tensor's values as consecutive blocks of whole rows, float32 [rows, columns].

        Raises:
            CheckpointError: as :meth:`blocks` and :meth:`scales_of`.
        """
        entry, scales, row = self.entry(name), self.scales_of(name), 0
        step = max(1, _TILE // entry.shape[-1])
        rows = (
            None
            if scales is None
            else torch.tensor(scales).repeat_interleave(math.prod(entry.shape[:-1]) // len(scales))
        )
        for block in self.blocks(name):
            for start in range(0, len(block), step):
                values = torch.from_numpy(dequantize(block[start : start + step].numpy(), entry.type).copy())
                yield values if rows is None else values.mul_(rows[row : row + len(values)].unsqueeze(1))
                row += len(values)


def split_paths(path: Path) -> list[Path]:
    """The files of the set that a file's name says it belongs to; the file alone if it names none.

    Raises:
        CheckpointError: the name is one of an impossible set.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path}: there is no split {number} of {count}.", hint="The file was renamed.")
    return [
        path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}{match['suffix']}") for index in range(1, count + 1)
    ]


def set_name(path: Path) -> str:
    """What a file's set is called: its name without the number and the suffix."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return path.stem if match is None else match["stem"]


def model_files(folder: Path) -> list[Path]:
    """Of every model in a folder one file, by which it is opened. An importance matrix beside a model is none.

    Raises:
        CheckpointError: there is no model, or a header that cannot be read.
    """
    files = gguf_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: holds no GGUF file.", hint="Give the folder or the file of a GGUF model.")
    if len({split_paths(file)[0] for file in files}) > 1:
        files = [file for file in files if read_header(file).metadata.get(Keys.General.TYPE) != IMATRIX_TYPE]
    if not files:
        raise CheckpointError(f"{folder}: holds importance matrices and no model.", hint="Name one file.")
    return list({split_paths(file)[0]: file for file in files}.values())


def _only_model(folder: Path) -> Path:
    files = model_files(folder)
    if len(files) > 1:
        names = ", ".join(name_of(file.name) for file in files[:5])
        raise CheckpointError(f"{folder}: holds several models: {names}.", hint="Name one file.")
    return files[0]


def _check_set(headers: list[GgufHeader]) -> None:
    """That every file says of itself what its name says, and that together they hold what they say."""
    count = len(headers)
    for number, header in enumerate(headers):
        _require(header, "split", header.integer(Keys.Split.LLM_KV_SPLIT_NO) or 0, number)
        _require(header, "number of splits", header.integer(Keys.Split.LLM_KV_SPLIT_COUNT) or 1, count)
    seen: dict[str, Path] = {}
    for header in headers:
        for name in header.entries:
            if name in seen:
                raise CheckpointError(f"{header.path}: tensor {name!r} is also in {seen[name].name}.", hint=_MIXED_UP)
            seen[name] = header.path
    for header in headers:
        if Keys.Split.LLM_KV_SPLIT_COUNT in header.metadata:
            stated = header.integer(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
            _require(header, "set's number of tensors", stated, len(seen))


def _require(header: GgufHeader, what: str, said: int | None, is_so: int) -> None:
    if said != is_so:
        raise CheckpointError(f"{header.path}: says its {what} is {said}, it is {is_so}.", hint=_MIXED_UP)


def _as_bytes(entry: GgufEntry) -> TensorEntry:
    elements, size = GGML_QUANT_SIZES[entry.type]
    row_bytes = entry.shape[-1] // elements * size
    rows = entry.nbytes // row_bytes
    return TensorEntry(entry.name, torch.uint8, (rows, row_bytes), entry.file, entry.offset, entry.nbytes)
