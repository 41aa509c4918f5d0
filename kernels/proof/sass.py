"""Reads a cubin with NVIDIA's own tools: registers, spills and the machine instructions of each kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qconv.errors import BackendError


@dataclass(frozen=True, slots=True)
class MachineInstruction:
    """One SASS instruction: ``@P0 BRA 0x2690`` has mnemonic ``BRA``, guarded or not.

    Attributes:
        address: Bytes from the function's start.
        opcode: With its modifiers, ``HMMA.16816.F32``.
        target: Where a branch goes, or None.
    """

    address: int
    opcode: str
    target: int | None

    @property
    def mnemonic(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What ptxas made of one kernel.

    Attributes:
        registers: 32-bit registers a thread.
        stack_bytes: Local memory a thread: spills, and arrays that are indexed at run time.
        instructions: In order.
    """

    name: str
    registers: int
    stack_bytes: int
    instructions: tuple[MachineInstruction, ...]

    def main_loop(self) -> tuple[MachineInstruction, ...]:
        """The shortest loop with the most arithmetic in it, first of all one with a barrier; nothing without a loop."""
        best: tuple[bool, int, int] = (False, 0, 0)
        body: tuple[MachineInstruction, ...] = ()
        for instruction in self.instructions:
            if instruction.target is None or instruction.target >= instruction.address:
                continue
            span = [each for each in self.instructions if instruction.target <= each.address <= instruction.address]
            work = sum(each.mnemonic in ("HMMA", "HFMA2", "FFMA", "IDP") for each in span)
            rank = any(each.mnemonic == "BAR" for each in span), work, -len(span)
            if rank > best or not body:
                best, body = rank, tuple(span)
        return body

    def mix(self) -> Counter[str]:
        """How often each mnemonic occurs."""
        return Counter(instruction.mnemonic for instruction in self.instructions)


_FUNCTION = re.compile(r"Function : (\S+)\n")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_RESOURCES = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def read_cubin(cubin: bytes) -> dict[str, MachineCode]:
    """Every kernel of a cubin.

    Raises:
        BackendError: NVIDIA's disassembler is missing or fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("--dump-sass", file.name)
    usage = {name: (int(regs), int(stack) + int(local)) for name, regs, stack, local in _RESOURCES.findall(resources)}
    parts = _FUNCTION.split(listing)
    return {
        name: MachineCode(name, *usage[name], tuple(_instructions(text)))
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _instructions(text: str) -> Sequence[MachineInstruction]:
    found = []
    for address, opcode, rest in _LINE.findall(text):
        target = re.search(r"(0x[0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        found.append(MachineInstruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    return found


def resource_usage(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Registers and bytes of local memory a thread, by kernel.

    Raises:
        BackendError: NVIDIA's disassembler is missing or fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _cuobjdump("--dump-resource-usage", file.name)
    return {name: (int(regs), int(stack) + int(local)) for name, regs, stack, local in _RESOURCES.findall(listing)}


@cache
def tools_folder() -> Path:
    """Where cuobjdump and nvdisasm are.

    Raises:
        BackendError: the packages are not installed.
    """
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    if not (folder / "cuobjdump").is_file() or not (folder / "nvdisasm").is_file():
        raise BackendError(
            f"{folder}: cuobjdump and nvdisasm are not there.",
            hint="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
        )
    return folder


def _cuobjdump(*arguments: str) -> str:
    folder = tools_folder()
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [folder / "cuobjdump", *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )
    if done.returncode:
        raise BackendError(f"cuobjdump {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
