"""llama.cpp by its C functions, and the process around it. Needs xllamacpp and NumPy alone.

    python -m qconv.evaluation.engines.llamacpp_worker MODEL.gguf

First a line of JSON says which version this is. Then each line of JSON on stdin is a request and is answered by a line
of JSON on stdout: ``{"logits": [ids]}`` by ``{"shape": [tokens, vocabulary]}`` and the float32 values after it;
``{"complete": {...}}`` by text, tokens and finish.

All arithmetic that can be is in float32: the key-value cache, and attention without the fused kernel.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from qconv.evaluation.engines.base import stop_at


class Parameters(ctypes.Structure):
    """Room for either parameter struct, which are longer than two registers and so passed and returned in memory."""

    _fields_ = [("raw", ctypes.c_uint8 * 512)]

    def integer(self, offset: int) -> int:
        return int(struct.unpack_from("<i", bytes(self.raw), offset)[0])

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("<i", self.raw, offset, value)


class Batch(ctypes.Structure):
    """llama_batch; null pointers mean consecutive positions of sequence 0."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# Offsets of llama_context_params, with the default by which a drifted struct is recognized.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX = (0, 512), (4, 2048), (8, 512), (12, 1)
N_OUTPUTS_PER_SEQUENCE = (24, 1)
N_THREADS, N_THREADS_BATCH = (28, 4), (32, 4)
FLASH_ATTENTION, TYPE_K, TYPE_V = (52, -1), (104, 1), (108, 1)
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_PIECE = 256  # bytes of one token's text at most, at the first try


class LlamaCpp:
    """A loaded model; its context grows as it is needed."""

    def __init__(self, model: str, n_ctx: int, threads: int = 1) -> None:
        package = importlib.metadata.distribution("xllamacpp")
        library = next(
            file for file in package.files or [] if file.name.startswith("xllamacpp.") and file.suffix == ".so"
        )
        self.c = ctypes.CDLL(str(package.locate_file(library)))
        self.log: list[str] = []
        self._callback = LOG_CALLBACK(lambda level, text, data: self.log.append(text.decode(errors="replace")))
        self._declare()
        self.c.llama_log_set(self._callback, None)
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(model.encode(), self.c.llama_model_default_params())
        if not self.model:
            raise SystemExit("llama.cpp does not load the file:\n" + "".join(self.log[-30:]))
        self._threads = threads
        self.context: Any = None
        self.room = 0
        self.reserve(n_ctx)
        self.vocabulary = self.c.llama_model_get_vocab(self.model)
        self.rows = int(self.c.llama_vocab_n_tokens(self.vocabulary))

    def reserve(self, n_ctx: int) -> None:
        """Make a context of that many tokens, if there is none or a smaller one."""
        if n_ctx <= self.room:
            return
        if self.context:
            self.c.llama_free(self.context)
        parameters = self.c.llama_context_default_params()
        for offset, default in (N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX, N_THREADS, FLASH_ATTENTION, TYPE_K, TYPE_V):
            assert parameters.integer(offset) == default, f"llama_context_params drifted: {offset} is not {default}"
        for field, value in (
            *((field, n_ctx) for field in (N_CTX, N_BATCH, N_UBATCH, N_OUTPUTS_PER_SEQUENCE)),
            *((field, self._threads) for field in (N_THREADS, N_THREADS_BATCH)),
            *((field, 0) for field in (FLASH_ATTENTION, TYPE_K, TYPE_V)),  # disabled; F32 is ggml's type 0
        ):
            parameters.set(field[0], value)
        self.context = self.c.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("llama.cpp makes no context:\n" + "".join(self.log[-30:]))
        self.room = n_ctx

    def _declare(self) -> None:
        pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
        for name, result, *arguments in (
            ("llama_log_set", None, LOG_CALLBACK, pointer),
            ("llama_model_default_params", Parameters),
            ("llama_context_default_params", Parameters),
            ("llama_model_load_from_file", pointer, text, Parameters),
            ("llama_init_from_model", pointer, pointer, Parameters),
            ("llama_free", None, pointer),
            ("llama_model_get_vocab", pointer, pointer),
            ("llama_vocab_n_tokens", integer, pointer),
            ("llama_get_memory", pointer, pointer),
            ("llama_memory_clear", None, pointer, ctypes.c_bool),
            ("llama_decode", integer, pointer, Batch),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, integer),
            ("llama_tokenize", integer, pointer, text, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool),
            ("llama_token_to_piece", integer, pointer, integer, pointer, integer, integer, ctypes.c_bool),
            ("llama_vocab_is_eog", ctypes.c_bool, pointer, integer),
            *((f"llama_vocab_{special}", integer, pointer) for special in ("bos", "eos", "pad")),
            *((f"llama_vocab_get_add_{special}", ctypes.c_bool, pointer) for special in ("bos", "eos")),
        ):
            function = getattr(self.c, str(name))
            function.restype, function.argtypes = result, arguments

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def logits(self, tokens: Sequence[int]) -> Any:
        """float32 [tokens, vocabulary], after what was decoded since :meth:`forget`."""
        count = len(tokens)
        batch = Batch(
            n_tokens=count, token=(ctypes.c_int32 * count)(*tokens), logits=(ctypes.c_int8 * count)(*[1] * count)
        )
        status = self.c.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode ended with {status}:\n" + "".join(self.log[-20:])
        rows = [self.c.llama_get_logits_ith(self.context, index) for index in range(count)]
        return np.stack([np.ctypeslib.as_array(row, (self.rows,)).copy() for row in rows])

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> Any:
        """int32; special tokens recognized, bos and eos added as the file says."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self.c.llama_tokenize(self.vocabulary, data, len(data), room, len(room), add_special, parse_special)
        assert count >= 0, f"{text!r}: more tokens than bytes"
        return np.array(room[:count], dtype=np.int32)

    def piece(self, token: int) -> bytes:
        """The token's text."""
        room = ctypes.create_string_buffer(_PIECE)
        count = self.c.llama_token_to_piece(self.vocabulary, token, room, len(room), 0, True)
        if count < 0:
            room = ctypes.create_string_buffer(-count)
            count = self.c.llama_token_to_piece(self.vocabulary, token, room, len(room), 0, True)
        return room.raw[:count]

    def generate(self, prompt: Sequence[int], count: int) -> Any:
        """The greedy continuation, int32 [count]."""
        self.forget()
        tokens: list[int] = []
        step = list(prompt)
        for _ in range(count):
            step = [int(self.logits(step)[-1].argmax())]
            tokens += step
        return np.array(tokens, dtype=np.int32)

    def special(self) -> Any:
        """bos, eos, pad, and whether bos and eos are added."""
        ids = [getattr(self.c, f"llama_vocab_{kind}")(self.vocabulary) for kind in ("bos", "eos", "pad")]
        added = [getattr(self.c, f"llama_vocab_get_add_{kind}")(self.vocabulary) for kind in ("bos", "eos")]
        return np.array([*ids, *added], dtype=np.int32)


def score(llama: LlamaCpp, ids: Sequence[int]) -> Any:
    """float32 [tokens, vocabulary] of one sequence."""
    llama.reserve(_rounded(len(ids)))
    llama.forget()
    return llama.logits(ids)


def complete(llama: LlamaCpp, request: dict[str, Any]) -> dict[str, Any]:
    """One completion; ``request`` has the fields of ``Prompt`` and ``Sampling`` that decide it."""
    control = bool(request["control_tokens"])
    step = llama.tokenize(request["prompt"], add_special=not control, parse_special=control).tolist()
    llama.reserve(_rounded(len(step) + request["max_tokens"]))
    llama.forget()
    generator = np.random.default_rng(request["seed"])
    tokens: list[int] = []
    data, text, stopped = b"", "", False
    while len(tokens) < request["max_tokens"] and not stopped:
        token = choose(llama.logits(step)[-1], request["temperature"], request["top_p"], generator)
        if llama.c.llama_vocab_is_eog(llama.vocabulary, token):
            stopped = True
            break
        tokens.append(token)
        step = [token]
        data += llama.piece(token)
        text, stopped = stop_at(data.decode(errors="replace"), request["stop"])
    return {"text": text, "tokens": tokens, "finish": "stop" if stopped else "length"}


def choose(logits: Any, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    ordered[np.cumsum(ordered) - ordered >= top_p] = 0.0
    return int(order[generator.choice(len(order), p=ordered / ordered.sum())])


def _rounded(tokens: int) -> int:
    return -(-tokens // 256) * 256


def main(model: str) -> None:
    """Serve requests until stdin ends."""
    out: BinaryIO = sys.stdout.buffer

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value).encode() + b"\n")

    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    say({"xllamacpp": importlib.metadata.version("xllamacpp"), "threads": threads})
    out.flush()
    llama: LlamaCpp | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        llama = llama or LlamaCpp(model, 512, threads)
        if "logits" in request:
            found = score(llama, request["logits"])
            say({"shape": list(found.shape)})
            out.write(found.tobytes())
        else:
            say(complete(llama, request["complete"]))
        out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
