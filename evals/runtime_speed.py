"""Decoding and prefill from packed weights beside transformers' bf16 model, in one run.

    python evals/runtime_speed.py [--threads 1] [--rounds 7] [--only awq,w4a16] [--models tiny,wide] [--json FILE]

Two models: the bundled one, and a random one of a wider shape that does not fit the processor's caches. Every build has
a process of its own and so has the bf16 model beside it. The two take turns, so that other work on the machine hits
both alike; what counts is the median over the rounds of the ratio of one turn to the other's right after it, of wall
time and of processor time, which depends less on other processes. Memory is what the whole process had resident at its
peak, loading included.

Exits with 1 if a build takes longer than bf16: at decoding one sequence or at a prompt of 512 tokens, by either clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BUNDLED = Path(__file__).parent / "models/tiny-coder-moe"
WIDE_LAYERS, WIDE_EXPERTS = 2, 64
FORMATS = ("awq", "gptq", "gptq-act-order", "w4a16", "fp8", "gguf:Q4_K_M", "gguf:Q6_K", "gguf:Q8_0")
TASKS = ("decode", "prefill")
PROMPT, DECODED, PREFILL = 32, 16, 512


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of one turn: a decoded token, or all of a prompt."""

    wall: float
    processor: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Turns of a build and of the bf16 model; medians of the seconds, and of the ratios of turns beside each other."""

    wall: float
    wall_bf16: float
    wall_ratio: float
    processor: float
    processor_bf16: float
    processor_ratio: float

    @classmethod
    def of(cls, build: Sequence[Turn], bf16: Sequence[Turn]) -> Comparison:
        """Of turns in their order."""
        pairs = list(zip(build, bf16, strict=True))
        return cls(
            median(turn.wall for turn in build),
            median(turn.wall for turn in bf16),
            median(one.wall / other.wall for one, other in pairs),
            median(turn.processor for turn in build),
            median(turn.processor for turn in bf16),
            median(one.processor / other.processor for one, other in pairs),
        )

    @property
    def fast_enough(self) -> bool:
        """Whether the build is not slower, by either clock."""
        return self.wall_ratio <= 1.0 and self.processor_ratio <= 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One build beside the bf16 model: times, bytes resident at the peak, bytes of tensors."""

    model: str
    build: str
    decode: Comparison
    prefill: Comparison
    peak: int
    peak_bf16: int
    tensors: int
    tensors_bf16: int

    @property
    def fast_enough(self) -> bool:
        """Whether the build is not slower at anything."""
        return self.decode.fast_enough and self.prefill.fast_enough

    def line(self) -> str:
        """Of the table under :data:`HEADING`."""
        times = " | ".join(
            f"{1e3 * one.processor:.1f} | {1e3 * one.processor_bf16:.1f} | "
            f"{one.processor_ratio:.2f} | {one.wall_ratio:.2f}"
            for one in (self.decode, self.prefill)
        )
        memory = f"{self.peak / 1e6:.0f} | {self.peak_bf16 / 1e6:.0f} | {self.peak / self.peak_bf16:.2f}"
        tensors = f"{self.tensors / self.tensors_bf16:.2f}"
        return f"| {self.model} | {self.build} | {times} | {memory} | {tensors} |"


HEADING = """\
| model | build | decode, ms a token | bf16 | ratio | wall | prefill of 512, ms | bf16 | ratio | wall | peak MB | bf16 \
| ratio | tensors |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
"""Milliseconds are of processor time, as is the ratio after them; then the wall time's."""


def main() -> int:
    """Measure and print; 1 if a build is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, comma-separated")
    parser.add_argument("--models", default="tiny,wide")
    parser.add_argument("--work", type=Path, help="where builds are kept; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve(*arguments.serve)
        return 0
    work = arguments.work or Path(tempfile.mkdtemp(prefix="qconv-speed-"))
    rows = []
    print(HEADING, flush=True)
    try:
        for name in arguments.models.split(","):
            source = BUNDLED if name == "tiny" else wide(work / "wide")
            for format in arguments.only.split(","):
                build = built(source, work, name, format)
                with (
                    Served("packed", build, arguments.threads) as packed,
                    Served("bf16", source, arguments.threads) as bf16,
                ):
                    rows.append(compared(name, format, packed, bf16, arguments.rounds))
                print(rows[-1].line(), flush=True)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    slow = [f"{row.model} {row.build}" for row in rows if not row.fast_enough]
    print(f"slower than bf16: {', '.join(slow)}" if slow else "no build is slower than bf16")
    return int(bool(slow))


class Served:
    """A model in a process of its own, which does something only when told to."""

    def __init__(self, kind: str, path: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__)), "--threads", str(threads), "--serve", kind, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def turn(self, task: str) -> Turn:
        """One of :data:`TASKS`."""
        return Turn(**self._ask(task))

    def memory(self) -> tuple[int, int]:
        """Bytes resident at the peak, bytes of tensors."""
        answer = self._ask("memory")
        return answer["peak"], answer["tensors"]

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of a model ended with {self._process.wait()}")
        return json.loads(answer)


def compared(name: str, format: str, packed: Served, bf16: Served, rounds: int) -> Row:
    """Both models' turns, after one of each that does not count."""
    comparisons = {}
    for task in TASKS:
        turns = [(packed.turn(task), bf16.turn(task)) for _ in range(rounds + 1)][1:]
        comparisons[task] = Comparison.of([one for one, _ in turns], [other for _, other in turns])
    (peak, tensors), (peak_bf16, tensors_bf16) = packed.memory(), bf16.memory()
    return Row(name, format, comparisons["decode"], comparisons["prefill"], peak, peak_bf16, tensors, tensors_bf16)


def serve(kind: str, path: str) -> None:
    """What a process of its own does: measure what is asked, line by line."""
    from qconv.runtime.loading import memory

    model = _loaded(kind, path)
    ids = torch.randint(300, 2000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    measures = {"decode": _decode, "prefill": _prefill}
    for line in sys.stdin:
        task = line.strip()
        if task == "memory":
            answer = {"peak": peak_memory(), "tensors": memory(model)}
        else:
            with torch.no_grad():
                answer = asdict(measures[task](model, ids))
        print(json.dumps(answer), flush=True)


def peak_memory() -> int:
    """Bytes of this process that were resident at once; Linux counts from when the program was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _loaded(kind: str, path: str) -> Any:
    if kind == "packed":
        import qconv

        return qconv.load(path, dtype=torch.bfloat16)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model.eval()


def _decode(model: Any, ids: Tensor) -> Turn:
    """A token at batch 1, with a cache."""
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    wall, processor = time.perf_counter(), time.process_time()
    for step in range(DECODED):
        cache = model(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=cache, use_cache=True).past_key_values
    return Turn((time.perf_counter() - wall) / DECODED, (time.process_time() - processor) / DECODED)


def _prefill(model: Any, ids: Tensor) -> Turn:
    """A prompt, of whose last token the logits are wanted."""
    wall, processor = time.perf_counter(), time.process_time()
    model(ids, use_cache=False, logits_to_keep=1)
    return Turn(time.perf_counter() - wall, time.process_time() - processor)


def wide(folder: Path) -> Path:
    """A random model of Qwen3-Coder-30B-A3B's shapes but for the vocabulary and the number of layers and experts."""
    from qconv.building.bench import SliceShape, write_slice

    shape = SliceShape(hidden_size=2048, expert_width=768, heads=32, kv_heads=4, head_dim=128, vocab_size=8192, top_k=8)
    if not folder.exists():
        write_slice(folder, layers=WIDE_LAYERS, experts=WIDE_EXPERTS, shape=shape)
    return folder


def built(source: Path, work: Path, name: str, format: str) -> Path:
    """A build by plain rounding, kept for the next time."""
    from qconv.building.gguf_pipeline import quantize_gguf
    from qconv.building.pipeline import quantize
    from qconv.planning.gguf_recipe import GgufRecipe
    from qconv.planning.recipe import load_recipe

    out = work / f"{name}-{format.replace(':', '-')}"
    if out.exists():
        return out
    if format == "gptq-act-order":
        return reordered(built(source, work, name, "gptq"), out)
    quiet: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    if format.startswith("gguf:"):
        quantize_gguf(source, out, GgufRecipe(type=format.removeprefix("gguf:")), **quiet)
    else:
        overrides: dict[str, Any] = {} if format.startswith("fp8") else {"method": "rtn"}
        quantize(source, out, load_recipe(format, overrides), **quiet)
    return out


def reordered(build: Path, out: Path) -> Path:
    """A GPTQ build with its inputs dealt to groups at random: other weights, but what act-order costs."""
    generator = torch.Generator().manual_seed(0)
    partial = out.with_suffix(".partial")
    shutil.copytree(build, partial)
    for shard in partial.glob("*.safetensors"):
        tensors = load_file(shard)
        for key, tensor in tensors.items():
            if key.endswith(".g_idx"):
                tensors[key] = tensor[torch.randperm(len(tensor), generator=generator)]
        save_file(tensors, shard, {"format": "pt"})
    for file in (partial / "config.json", partial / "quantize_config.json"):
        if file.exists():
            values = json.loads(file.read_text())
            values.get("quantization_config", values)["desc_act"] = True
            file.write_text(json.dumps(values))
    return partial.rename(out)


if __name__ == "__main__":
    sys.exit(main())
