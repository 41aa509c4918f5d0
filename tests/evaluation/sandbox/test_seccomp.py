"""The filter's program, run by a small interpreter of its own instructions, and the numbers it denies."""

from __future__ import annotations

import errno
import fcntl
import re
import struct
from pathlib import Path

import pytest

from qconv.errors import SandboxError
from qconv.evaluation.sandbox.seccomp import DENIED_COMMANDS, denied_calls, seccomp_filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, linux/audit.h
ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def outcome(program: bytes, architecture: int, number: int, second: int = 0) -> int:
    """What the kernel returns for a system call with a second argument: classic BPF, linux/filter.h."""
    instructions = list(struct.iter_unpack("=HBBI", program))
    data = struct.pack("=IIQQQ", number, architecture, 0, 0, second)  # struct seccomp_data, as far as it is read
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x06:
                return int(value)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_exactly_the_denied_calls_are_denied(machine: str) -> None:
    program, denied = seccomp_filter(machine), set(denied_calls(machine).values())
    for number in range(600):
        expected = DENY if number in denied else ALLOW
        assert outcome(program, ARCHITECTURES[machine], number) == expected, number


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_a_foreign_abi_kills(machine: str) -> None:
    program = seccomp_filter(machine)
    assert outcome(program, 0x40000003, 1) == KILL  # i386, whose numbers differ
    assert outcome(program, ARCHITECTURES[machine], 0x40000000 | 56) == KILL  # x32


@pytest.mark.parametrize(("machine", "fcntl_number"), [("x86_64", 72), ("aarch64", 25)])
def test_of_fcntls_commands_those_that_take_memory_are_denied(machine: str, fcntl_number: int) -> None:
    program = seccomp_filter(machine)
    locking = {fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW}
    for command in range(1100):
        expected = DENY if command in DENIED_COMMANDS.values() else ALLOW
        assert outcome(program, ARCHITECTURES[machine], fcntl_number, command) == expected, command
        # The kernel looks at 32 bits alone.
        assert outcome(program, ARCHITECTURES[machine], fcntl_number, command | 1 << 40) == expected, command
    assert locking <= set(DENIED_COMMANDS.values())
    assert outcome(program, ARCHITECTURES[machine], 3, fcntl.F_SETLK) == ALLOW, "of other calls that is no command"


def test_an_unknown_machine_has_no_sandbox() -> None:
    with pytest.raises(SandboxError, match="riscv64") as caught:
        seccomp_filter("riscv64")
    assert caught.value.exit_code == 6


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers for x86_64 are not installed")
def test_the_numbers_are_the_kernels() -> None:
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADER.read_text())}
    denied = denied_calls("x86_64")
    assert denied == {name: numbers.get(name, number) for name, number in denied.items()}
    assert len(denied.keys() & numbers.keys()) > 35  # an old header lacks a few
