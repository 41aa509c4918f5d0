"""Decoding and prefill from packed weights beside transformers' bf16 model, in one run.

    python evals/runtime_speed.py [--threads 2] [--rounds 5] [--only awq,w4a16] [--cpu-time]

Two models: the bundled one, and a random one of a wider shape that does not fit the processor's caches. The bf16 model
and the build take turns, so that other work on the machine hits both alike; what is compared is each one's best round.
With one thread, ``--cpu-time`` leaves out the time in which the machine did other work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qconv
from qconv.bench import SliceShape, write_slice
from qconv.gguf.recipe import GgufRecipe
from qconv.gguf_pipeline import quantize_gguf
from qconv.pipeline import quantize
from qconv.recipe import load_recipe
from qconv.runtime.loading import memory

BUNDLED = Path(__file__).parent / "models/tiny-coder-moe"
WIDE = SliceShape(hidden_size=2048, expert_width=768, heads=32, kv_heads=4, head_dim=128, vocab_size=8192, top_k=8)
"""Qwen3-Coder-30B-A3B's shapes but for the vocabulary."""
WIDE_LAYERS, WIDE_EXPERTS = 2, 64
FORMATS = ("awq", "gptq", "w4a16", "fp8", "gguf:Q4_K_M", "gguf:Q8_0")
Clock = Callable[[], float]
PROMPT, DECODED, PREFILL = 32, 16, 512


@dataclass(frozen=True, slots=True)
class Row:
    """One build beside the bf16 model: seconds a token, seconds for all tokens, bytes of tensors."""

    model: str
    build: str
    decode: float
    decode_bf16: float
    prefill: float
    prefill_bf16: float
    bytes: int
    bytes_bf16: int


def main() -> None:
    """Measure and print; the rows as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, comma-separated")
    parser.add_argument("--cpu-time", action="store_true", help="the process's time instead of the clock's")
    parser.add_argument("--models", default="tiny,wide")
    parser.add_argument("--work", type=Path, help="where builds are kept; a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="qconv-speed-"))
    rows = []
    print("model  build          decode ms  bf16 ms  ratio   prefill ms  bf16 ms  ratio   MB     bf16 MB", flush=True)
    for name in arguments.models.split(","):
        source = BUNDLED if name == "tiny" else _wide(work / "wide")
        dense = _transformers(source)
        for format in arguments.only.split(","):
            row = _compare(
                name,
                format,
                dense,
                qconv.load(_built(source, work, name, format), dtype=torch.bfloat16),
                arguments.rounds,
                time.process_time if arguments.cpu_time else time.perf_counter,
            )
            rows.append(row)
            print(
                f"{name:6} {format:14} {1e3 * row.decode:9.2f} {1e3 * row.decode_bf16:8.2f} "
                f"{row.decode / row.decode_bf16:6.2f} {1e3 * row.prefill:12.1f} {1e3 * row.prefill_bf16:8.1f} "
                f"{row.prefill / row.prefill_bf16:6.2f} {row.bytes / 1e6:7.1f} {row.bytes_bf16 / 1e6:9.1f}",
                flush=True,
            )
    json.dump([asdict(row) for row in rows], sys.stdout)
    print()
    if arguments.work is None:
        shutil.rmtree(work)


def _wide(folder: Path) -> Path:
    if not folder.exists():
        write_slice(folder, layers=WIDE_LAYERS, experts=WIDE_EXPERTS, shape=WIDE)
    return folder


def _transformers(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    return model.eval()


def _built(source: Path, work: Path, name: str, format: str) -> Path:
    """A build by plain rounding, kept for the next time."""
    out = work / f"{name}-{format.replace(':', '-')}"
    if not out.exists():
        quiet: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
        if format.startswith("gguf:"):
            quantize_gguf(source, out, GgufRecipe(type=format.removeprefix("gguf:")), **quiet)
        else:
            overrides: dict[str, Any] = {} if format.startswith("fp8") else {"method": "rtn"}
            quantize(source, out, load_recipe(format, overrides), **quiet)
    return out


@torch.no_grad()
def _compare(name: str, format: str, dense: Any, packed: Any, rounds: int, now: Clock) -> Row:
    ids = torch.randint(300, 2000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    decode = _best([lambda: _decode(packed, ids, now), lambda: _decode(dense, ids, now)], rounds)
    prefill = _best([lambda: _prefill(packed, ids, now), lambda: _prefill(dense, ids, now)], rounds)
    return Row(name, format, decode[0], decode[1], prefill[0], prefill[1], memory(packed), memory(dense))


def _best(measures: list[Callable[[], float]], rounds: int) -> list[float]:
    """Each one's best, after one round that does not count."""
    results = [[measure() for measure in measures] for _ in range(rounds + 1)][1:]
    return [min(column) for column in zip(*results, strict=True)]


def _decode(model: Any, ids: Tensor, now: Clock) -> float:
    """Seconds a token at batch 1, with a cache."""
    output = model(ids[:, :PROMPT], use_cache=True)
    cache = output.past_key_values
    start = now()
    for step in range(DECODED):
        output = model(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return (now() - start) / DECODED


def _prefill(model: Any, ids: Tensor, now: Clock) -> float:
    start = now()
    model(ids, use_cache=False, logits_to_keep=1)
    return now() - start


if __name__ == "__main__":
    main()
