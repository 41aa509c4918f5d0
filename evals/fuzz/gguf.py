"""Mutated GGUF files: whatever is in one, reading it ends soon, in little memory, and with an error that qconv means.

    python -m evals.fuzz.gguf                  # 300 mutants of seed 0 through inspect, verify and generate
    python -m evals.fuzz.gguf --mutants 1000 --seed 7

Each mutant is read in a fork of one process that has everything imported, under limits of time and memory.
A mutant passes if the commands' functions return or raise one of ``qconv.errors``. Anything else is a fault: another
exception, a signal, time or memory beyond the limits. The exit code is 1 if there are faults; each is printed with what
makes it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 30.0
MEMORY = 2 * 2**30
"""Bytes that the process may hold, Python, torch and transformers included."""
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}
TOKENIZER = Path("evals/models/tiny-coder-moe")
NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e38)
BYTES = (b"\n", b"\x1b[2J", b"\xff\xfe", b"\x00", b"..", b"/", "‮".encode())

Mutate = Callable[[random.Random, bytes, int], bytes]


def _flipped(rng: random.Random, data: bytes, header: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(header)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _weights(rng: random.Random, data: bytes, header: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 64)):
        changed[rng.randrange(header, len(data))] = rng.randrange(256)
    return bytes(changed)


def _truncated(rng: random.Random, data: bytes, header: int) -> bytes:
    return data[
        : rng.choice((rng.randrange(32), rng.randrange(header), rng.randrange(header, len(data)), len(data) - 1))
    ]


def _longer(rng: random.Random, data: bytes, header: int) -> bytes:
    return data + bytes(rng.choice((1, 32, 4096)))


def _number(rng: random.Random, data: bytes, header: int) -> bytes:
    """Somewhere in the header a number of four or eight bytes: a length, a count, a type, an offset."""
    place = rng.randrange(header - 8)
    if rng.random() < 0.2:
        return data[:place] + struct.pack("<f", rng.choice(FLOATS)) + data[place + 4 :]
    size, code = rng.choice(((4, "<I"), (8, "<Q")))
    number = rng.choice(NUMBERS) & (2 ** (8 * size) - 1)
    return data[:place] + struct.pack(code, number) + data[place + size :]


def _key(rng: random.Random, data: bytes, header: int) -> bytes:
    """The value of a key that holds four bytes: of another type, or another number."""
    place = rng.choice(
        [match.end() for match in re.finditer(rb"(general|qwen3moe|tokenizer)\.[a-z_.]{4,60}", data[:header])]
    )
    number = struct.unpack_from("<I", data, place)[0]
    if number not in (4, 5, 6):
        return data[:place] + struct.pack("<I", rng.randrange(14)) + data[place + 4 :]
    value = rng.choice(
        (
            (4, struct.pack("<I", rng.choice(NUMBERS) & (2**32 - 1))),
            (5, struct.pack("<i", rng.choice((-1, -(2**31), 0)))),
            (6, struct.pack("<f", rng.choice(FLOATS))),
            (7, b"\x01"),
            (8, struct.pack("<Q", 2) + rng.choice((b"ab", b"\xff\xff", b"\n\n"))),
            (9, struct.pack("<IQII", 4, 2, *rng.choices(NUMBERS[:8], k=2))),
            (9, struct.pack("<IQ", 8, rng.choice(NUMBERS))),
            (10, struct.pack("<Q", rng.choice(NUMBERS))),
            (12, struct.pack("<d", rng.choice(FLOATS))),
        )
    )
    return data[:place] + struct.pack("<I", value[0]) + value[1] + data[place + 8 :]


def _tensor(rng: random.Random, data: bytes, header: int) -> bytes:
    """A tensor's dimensions, type or offset."""
    names = [
        match.end()
        for match in re.finditer(rb"(blk\.\d+\.[a-z_]+|output|output_norm|token_embd)\.weight", data[:header])
    ]
    place = rng.choice(names)
    dimensions = struct.unpack_from("<I", data, place)[0]
    after = place + 4 + 8 * dimensions
    field = rng.randrange(4)
    if field == 0:
        return data[:place] + struct.pack("<I", rng.choice((0, 1, 2, 3, 4, 5, 2**31))) + data[place + 4 :]
    if field == 1:
        one = place + 4 + 8 * rng.randrange(dimensions)
        return data[:one] + struct.pack("<Q", rng.choice(NUMBERS)) + data[one + 8 :]
    if field == 2:
        return data[:after] + struct.pack("<I", rng.choice((*range(45), 2**31))) + data[after + 4 :]
    return data[: after + 4] + struct.pack("<Q", rng.choice(NUMBERS)) + data[after + 12 :]


def _name(rng: random.Random, data: bytes, header: int) -> bytes:
    """Other bytes in a name or text, of the same length."""
    place, piece = rng.randrange(24, header - 8), rng.choice(BYTES)
    return data[:place] + piece + data[place + len(piece) :]


def _moved(rng: random.Random, data: bytes, header: int) -> bytes:
    """A piece of the header is gone, there twice, or exchanged with another."""
    first, second = sorted(rng.randrange(header) for _ in range(2))
    length = rng.randint(1, 64)
    piece = data[first : first + length]
    return rng.choice(
        (
            data[:first] + data[first + length :],
            data[:first] + piece + data[first:],
            data[:first] + data[second : second + length] + data[first + length :],
        )
    )


MUTATIONS: tuple[Mutate, ...] = (
    _flipped,
    _weights,
    _truncated,
    _longer,
    _number,
    _key,
    _key,
    _tensor,
    _tensor,
    _name,
    _moved,
)


def mutants(seed: int, data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of ``count`` mutants of a GGUF file; the same for the same seed."""
    yield from (("empty", b""), ("magic", b"GGUF"), ("no tensors", struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)))
    header = _header_bytes(data)
    for number in range(count - 3):
        rng = random.Random(f"{seed} {number}")
        names, changed = [], data
        for mutate in rng.sample(MUTATIONS, rng.choice((1, 1, 1, 2))):
            if len(changed) > header:
                names.append(mutate.__name__.removeprefix("_"))
                changed = mutate(rng, changed, header)
        yield f"{number} {' '.join(names)}", changed


def _header_bytes(data: bytes) -> int:
    """Bytes before the tensors' own."""
    from qconv.formats.gguf.header import read_header

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return min(entry.offset for entry in read_header(Path(file.name)).entries.values())


def original(folder: Path) -> bytes:
    """A small model as a GGUF file, with the bundled tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qconv.building.gguf_pipeline import quantize_gguf
    from qconv.planning.gguf_recipe import GgufRecipe

    torch.manual_seed(0)
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(AutoConfig.for_model("qwen3_moe", **SIZES), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / "model" / name)
    silent: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
    quantize_gguf(folder / "model", folder / "out", GgufRecipe(type="Q4_0"), **silent)
    return next((folder / "out").glob("*.gguf")).read_bytes()


def read(path: Path) -> str:
    """What the commands do with a file, one after the other; how the last ended."""
    from qconv.cli import gguf as commands
    from qconv.errors import QconvError
    from qconv.runtime.generation import complete
    from qconv.runtime.loading import load
    from qconv.runtime.tokenizer import load_tokenizer
    from qconv.verification.gguf import verify_gguf

    def generate() -> None:
        tokenizer = load_tokenizer(path)
        complete(load(path), tokenizer, ["def f("], max_tokens=1)

    ends = []
    for step in (lambda: commands.inspect(path, "tensors", True), lambda: verify_gguf(path), generate):
        try:
            step()
            ends.append("ok")
        except QconvError as error:
            ends.append(str(error.exit_code))
    return " ".join(ends)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How reading a mutant ended: ``fault`` says what it should not have done, None if it ended well."""

    end: str
    fault: str | None
    seconds: float
    memory: int


def judged(path: Path) -> Outcome:
    """Read a mutant in a fork of this process, under the limits."""
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            said = read(path)
        except BaseException:
            said = "traceback: " + " | ".join(traceback.format_exc().splitlines()[-3:])
        os.write(writer, said.encode(errors="replace")[:2000])
        os._exit(0)
    os.close(writer)
    status, memory = _waited(child, start)
    said = os.read(reader, 2000).decode(errors="replace")
    os.close(reader)
    seconds = time.monotonic() - start
    fault = said if said.startswith("traceback") else None
    if seconds > SECONDS:
        fault = f"{seconds:.0f} s"
    elif memory > MEMORY:
        fault = f"{memory / 2**30:.1f} GiB"
    elif os.WIFSIGNALED(status):
        fault = f"signal {os.WTERMSIG(status)}"
    return Outcome(said or "nothing", fault, seconds, memory)


def _waited(child: int, start: float) -> tuple[int, int]:
    """The status of a process and the most memory it took; it is ended at a limit."""
    most = 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, most
        most = max(most, _resident(child))
        if time.monotonic() - start > SECONDS or most > MEMORY:
            os.kill(child, 9)
        time.sleep(0.005)


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Read mutants and count how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a fork has no threads but its own
    ends: collections.Counter[str] = collections.Counter()
    faults, slowest, largest = 0, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="qconv-fuzz-") as folder:
        data = original(Path(folder))
        path = Path(folder) / "mutant.gguf"
        path.write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()):  # and everything is imported
            end = read(path)
        print(f"the file itself, {len(data)} bytes: {end}")
        for name, mutant in mutants(options.seed, data, options.mutants):
            path.write_bytes(mutant)
            outcome = judged(path)
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory)
            ends[outcome.end if outcome.fault is None else "fault"] += 1
            if outcome.fault is not None:
                faults += 1
                print(f"FAULT seed {options.seed} mutant {name}: {outcome.fault}", flush=True)
    for end, count in ends.most_common():
        print(f"{count:5} inspect, verify, generate: {end}")
    print(f"{options.mutants} mutants, {faults} faults; at most {slowest:.1f} s and {largest / 2**20:.0f} MiB")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
