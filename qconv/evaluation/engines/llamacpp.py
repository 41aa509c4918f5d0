"""GGUF through llama.cpp, in a process of its own: on some damaged files llama.cpp aborts, which must not end qconv."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

import qconv
from qconv.boundary.content import gguf_files
from qconv.boundary.printable import well_formed
from qconv.errors import EngineError, UsageError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent

INTERPRETER_VARIABLE = "QCONV_LLAMACPP_PYTHON"
"""Names the interpreter that has xllamacpp, if qconv's own has not."""


class LlamaCppEngine:
    """llama.cpp's CPU backend. Sequences and prompts are computed one by one, so no batch shape matters."""

    def __init__(self, path: Path, *, rows: int = 8, interpreter: Path | None = None) -> None:
        """Say which file, or which folder's first file, is to be loaded.

        Args:
            path: A GGUF file, or a folder that holds one set.
            rows: Sequences that a caller hands over at once.
            interpreter: A Python that has xllamacpp; by default the one that the environment names, else this one.

        Raises:
            UsageError: no GGUF file.
        """
        files = [path] if path.is_file() else gguf_files(path)
        if not files or files[0].suffix != ".gguf":
            raise UsageError(f"{path}: holds no GGUF file.", hint="--engine llamacpp is for GGUF; use local.")
        self.path = files[0]
        self.rows = rows
        named = os.environ.get(INTERPRETER_VARIABLE)
        self._interpreter = interpreter or (Path(named) if named else Path(sys.executable))
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._hello: dict[str, Any] = {}

    @property
    def identity(self) -> Mapping[str, str]:
        """See :class:`~qconv.evaluation.engines.base.Engine`."""
        self._started()
        told = {name: str(value) for name, value in self._hello.items()}
        return {"engine": "llamacpp", **told, "dtype": "float32", "device": "cpu", "rows": "1"}

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Of each sequence, in order."""
        for sequence in sequences:
            shape = tuple(self._ask({"logits": [int(one) for one in sequence]})["shape"])
            data = bytearray(self._read(4 * shape[0] * shape[1]))  # torch warns of arrays that cannot be written
            yield np.frombuffer(data, dtype=np.float32).reshape(shape)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        """Every sample of every prompt, in order; llama.cpp tokenizes."""
        for index, prompt in enumerate(prompts):
            for sample in range(sampling.samples):
                request = {
                    "prompt": well_formed(prompt.text),
                    "control_tokens": prompt.control_tokens,
                    "max_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "stop": list(sampling.stop),
                    "seed": sampling.seed_of(prompt, sample),
                }
                found = self._ask({"complete": request})
                yield Completion(index, sample, found["text"], tuple(found["tokens"]), found["finish"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.kill()
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __del__(self) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, after its greeting.

        Raises:
            EngineError: it has no xllamacpp.
        """
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
            root = str(Path(qconv.__file__).parents[1])
            command = [
                str(self._interpreter),
                "-m",
                "qconv.evaluation.engines.llamacpp_worker",
                str(self.path.resolve()),
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=os.environ | {"PYTHONPATH": root},
            )
            self._hello = json.loads(self._line())
        return self._process

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._died() from None
        found: dict[str, Any] = json.loads(self._line())
        return found

    def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        return line

    def _read(self, count: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise self._died()
        return data

    def _died(self) -> EngineError:
        """What the process said last."""
        assert self._process is not None
        assert self._log is not None
        self._process.wait()
        code = self._process.returncode
        self._log.seek(0)
        told = self._log.read().decode(errors="replace").strip().splitlines()[-5:]
        self.close()
        missing = any("xllamacpp" in line and "NotFound" in line for line in told)
        hint = "Install it: pip install 'qconv[llamacpp]'." if missing else "Check the file with: qconv verify."
        return EngineError(f"{self.path}: llama.cpp ended with {code}: {' | '.join(told)}.", hint=hint)
