"""The system calls that candidates are denied, as a classic BPF program.

No process or thread can be made, so there is nothing that could outlive the candidate, and a fork bomb ends with its
first fork; RLIMIT_NPROC cannot do that, since the kernel does not apply it to root. Also denied is memory that no other
limit counts (System V and POSIX queues, memory files, keys, io_uring), sockets, tracing, and what past escapes from
namespaces went through.

Numbers: Linux arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; instructions:
linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct

from qconv.errors import NoSandboxError

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4
_X32_BIT = 0x40000000

# Numbers from 424 on are the same everywhere.
_COMMON = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "memfd_secret": 447,
}
_X86_64 = {
    "shmget": 29,
    "socket": 41,
    "socketpair": 53,
    "clone": 56,
    "fork": 57,
    "vfork": 58,
    "semget": 64,
    "msgget": 68,
    "ptrace": 101,
    "personality": 135,
    "pivot_root": 155,
    "chroot": 161,
    "mount": 165,
    "umount2": 166,
    "init_module": 175,
    "quotactl": 179,
    "mq_open": 240,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "finit_module": 313,
    "memfd_create": 319,
    "bpf": 321,
    "userfaultfd": 323,
}
_AARCH64 = {
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "chroot": 51,
    "quotactl": 60,
    "personality": 92,
    "unshare": 97,
    "kexec_load": 104,
    "init_module": 105,
    "ptrace": 117,
    "mq_open": 180,
    "msgget": 186,
    "semget": 190,
    "shmget": 194,
    "socket": 198,
    "socketpair": 199,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "clone": 220,
    "perf_event_open": 241,
    "fanotify_init": 262,
    "open_by_handle_at": 265,
    "setns": 268,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "finit_module": 273,
    "memfd_create": 279,
    "bpf": 280,
    "userfaultfd": 282,
}
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def denied_calls(machine: str | None = None) -> dict[str, int]:
    """Name and number of what is denied on a machine, by default this one.

    Raises:
        NoSandboxError: the numbers of this machine are not known.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in _MACHINES:
        known = ", ".join(_MACHINES)
        raise NoSandboxError(
            f"running model-written code: no system call filter for {machine} (known: {known}).",
            hint="Run HumanEval on such a machine, or choose a suite without it.",
        )
    return _MACHINES[machine][1] | _COMMON


def seccomp_filter(machine: str | None = None) -> bytes:
    """The program for ``machine``: a foreign ABI kills, a denied call fails with EPERM, the rest is allowed.

    Raises:
        NoSandboxError: the numbers of this machine are not known.
    """
    machine = platform.machine() if machine is None else machine
    denied = denied_calls(machine)
    program = [
        _instruction(_LOAD_WORD, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, _MACHINES[machine][0], if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD_WORD, _OFFSET_NUMBER),
        _instruction(_JUMP_AT_LEAST, _X32_BIT, if_false=1),
        _instruction(_RETURN, _KILL),
    ]
    for number in sorted(denied.values()):
        program += [
            _instruction(_JUMP_EQUAL, number, if_false=1),
            _instruction(_RETURN, _ERRNO | errno.EPERM),
        ]
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)
