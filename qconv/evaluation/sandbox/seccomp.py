"""The system calls that candidates are denied, as a classic BPF program.

No process or thread can be made, so there is nothing that could outlive the candidate, and a fork bomb ends with its
first fork; RLIMIT_NPROC cannot do that, since the kernel does not apply it to root. Also denied is memory that no other
limit counts (extended attributes, file locks, System V and POSIX queues, memory files, pipes, timers, events, keys,
io_uring, rule sets), sockets, tracing, and what past escapes from namespaces went through.

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
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_SECOND_ARGUMENT = 0, 4, 24
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
    "pidfd_open": 434,
    "quotactl_fd": 443,
    "landlock_create_ruleset": 444,
    "memfd_secret": 447,
    "statmount": 457,
    "listmount": 458,
    "setxattrat": 463,
    "open_tree_attr": 467,
}
_X86_64 = {
    "pipe": 22,
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
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "io_setup": 206,
    "epoll_create": 213,
    "timer_create": 222,
    "mq_open": 240,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "inotify_init": 253,
    "unshare": 272,
    "signalfd": 282,
    "timerfd_create": 283,
    "eventfd": 284,
    "signalfd4": 289,
    "eventfd2": 290,
    "epoll_create1": 291,
    "pipe2": 293,
    "inotify_init1": 294,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "finit_module": 313,
    "seccomp": 317,
    "memfd_create": 319,
    "bpf": 321,
    "userfaultfd": 323,
}
_AARCH64 = {
    "io_setup": 0,
    "setxattr": 5,
    "lsetxattr": 6,
    "fsetxattr": 7,
    "eventfd2": 19,
    "epoll_create1": 20,
    "inotify_init1": 26,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "chroot": 51,
    "pipe2": 59,
    "quotactl": 60,
    "signalfd4": 74,
    "timerfd_create": 85,
    "personality": 92,
    "unshare": 97,
    "kexec_load": 104,
    "init_module": 105,
    "timer_create": 107,
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
    "seccomp": 277,
    "memfd_create": 279,
    "bpf": 280,
    "userfaultfd": 282,
}
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
_FCNTL = {"x86_64": 72, "aarch64": 25}
DENIED_COMMANDS = {"F_SETLK": 6, "F_SETLKW": 7, "F_SETLEASE": 1024, "F_NOTIFY": 1026, "F_SETPIPE_SZ": 1031}
DENIED_COMMANDS |= {"F_OFD_SETLK": 37, "F_OFD_SETLKW": 38}
"""Of fcntl(2): locks on ranges of a file are as many as its bytes."""


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


def numbers_of(name: str) -> dict[str, int]:
    """A denied call's number on each machine that has it."""
    return {machine: denied_calls(machine)[name] for machine in _MACHINES if name in denied_calls(machine)}


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
    # fcntl's command is an unsigned int: the lower half of its argument, which is the first on these machines.
    program += [
        _instruction(_JUMP_EQUAL, _FCNTL[machine], if_true=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_LOAD_WORD, _OFFSET_SECOND_ARGUMENT),
    ]
    for command in sorted(DENIED_COMMANDS.values()):
        program += [_instruction(_JUMP_EQUAL, command, if_false=1), _instruction(_RETURN, _ERRNO | errno.EPERM)]
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)
