"""A checkpoint or a build in this process, computed by transformers."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconv import __version__
from qconv.calibration.corpus import load_tokenizer
from qconv.checkpoint.reader import read_json
from qconv.errors import EngineError, UsageError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling
from qconv.evaluation.engines.decoding import Decoder
from qconv.formats import detect
from qconv.runtime.dense import write_dense

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalEngine:
    """transformers on the weights that a folder stands for; a build's are dequantized first."""

    def __init__(self, path: Path, *, dtype: str = "float32", device: str = "cpu", rows: int = 8) -> None:
        """Load the model.

        Args:
            path: A checkpoint or a build.
            dtype: In which all arithmetic is done: a name of :data:`DTYPES`.
            device: A torch device.
            rows: Sequences of one batch.

        Raises:
            CheckpointError: damaged weights or tokenizer.
            EngineError: transformers cannot load the model.
        """
        self.path = path
        self.rows = rows
        self._dtype, self._device = dtype, device
        self._tokenizer: Any = None
        self._model = _load(path, DTYPES[dtype], torch.device(device))

    @property
    def identity(self) -> Mapping[str, str]:
        """See :class:`~qconv.evaluation.engines.base.Engine`."""
        return {
            "engine": "local",
            "qconv": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "dtype": self._dtype,
            "device": device_name(self._device),
            "rows": str(self.rows),
        }

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Of each sequence; a batch is as long as its longest sequence."""
        for start in range(0, len(sequences), self.rows):
            group = sequences[start : start + self.rows]
            ids, mask = right_padded(group)
            try:
                found = self._model(
                    input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                ).logits
            except (RuntimeError, ValueError, IndexError) as error:
                raise EngineError(f"{self.path}: the model fails on a batch of {list(ids.shape)}: {error}.") from error
            for row, sequence in zip(found, group, strict=True):
                yield row[: len(sequence)].float().cpu().numpy()

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Every sample of every prompt; ``rows`` completions are decoded at once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        yield from Decoder(self._model, self._tokenizer, self.rows).complete(prompts, sampling)

    def close(self) -> None:
        """Free the model."""
        self._model = None


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [sequences, longest] each."""
    shape = (len(sequences), max(map(len, sequences)))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def device_name(device: str) -> str:
    """What computes: the processor's or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    if not path.is_dir():
        raise UsageError(f"{path}: is no folder.", hint="The local engine computes checkpoints and builds.")
    if detect(read_json(path / "config.json")) is None:
        return _from_pretrained(path, dtype, device)
    with tempfile.TemporaryDirectory(prefix="qconv-dense-") as folder:
        write_dense(path, Path(folder), dtype)
        return _from_pretrained(Path(folder), dtype, device)


def _from_pretrained(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    # transformers lets whatever its loading meets escape.
    except Exception as error:
        raise EngineError(f"{path}: transformers cannot load it: {type(error).__name__}: {error}.") from error
    return model.eval().to(device)
