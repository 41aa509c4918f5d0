"""The program inside the sandbox: loads a candidate's source and calls its function on request.

It runs beside the candidate in one process, so nothing it says is believed: it only carries values. It never holds a
check or an expected result. Only the standard library and ``literals`` exist where it runs.

Messages, one line of JSON each: in ``{limits, tmpfs, seccomp, nonce}``, out ``{nonce}``; in ``{program, entry_point,
nonce}``, out an answer; then for each call in ``{arguments, keywords, nonce}``, out an answer. An answer has the
request's nonce and either ``value`` or ``error`` (one of ``raised``, ``memory``, ``value``) with ``detail``.
"""

from __future__ import annotations

import functools
import os
import resource
import select
from collections.abc import Callable

from qconv.evaluation.sandbox.literals import LARGEST_MESSAGE, NotLiteral, decode, encode, read_message, write_message

_DETAIL = 300
_LOOK_MILLISECONDS = 50
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_REMOUNT, _NO_SUID, _NO_DEVICES = 32, 2, 4
_AMBIENT, _CLEAR_ALL = 47, 4
_CAPABILITY_VERSION = 0x20080522


class _Channel:
    """The two pipes, away from descriptors 0 and 1."""

    def __init__(self) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        self._buffer = b""

    def receive(self) -> dict[str, object]:
        while b"\n" not in self._buffer:
            block = os.read(self._input, LARGEST_MESSAGE)
            if not block:
                os._exit(0)
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return read_message(line)

    def send(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._output, line) :]


def main() -> None:
    """Serve until the other side closes its pipe."""
    channel = _Channel()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    setup = channel.receive()
    limits = setup["limits"]
    assert isinstance(limits, dict)
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    if setup["tmpfs"] is not None:
        _limit_files(str(setup["tmpfs"]).encode())
    if setup["seccomp"] is not None:
        _deny_calls(bytes.fromhex(str(setup["seccomp"])))
    channel.send(write_message({"nonce": str(setup["nonce"])}))
    os.dup2(null, 2)

    request = channel.receive()
    functions: list[Callable[..., object]] = []
    channel.send(_answer(request, lambda: functions.append(_load(request))))
    while True:
        call = channel.receive()
        channel.send(_answer(call, functools.partial(_call, functions[0], call)))


def keep() -> None:
    """Serve in a child, and end when its standard input does: this process is the first of its PID namespace."""
    child = os.fork()
    if child == 0:
        main()
    hung_up = select.poll()
    hung_up.register(0, 0)  # POLLHUP is always told
    while not hung_up.poll(_LOOK_MILLISECONDS):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
    os._exit(0)


def _limit_files(options: bytes) -> None:
    """Remount /tmp with its options, then give up every capability: mount(2), capset(2), linux/capability.h.

    Programs that make sandboxes limit the bytes of a tmpfs, and none the number of its files.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, b"/tmp", None, _REMOUNT | _NO_SUID | _NO_DEVICES, options):
        raise OSError(ctypes.get_errno(), "the number of files in /tmp cannot be limited")
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0) or libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def _deny_calls(program: bytes) -> None:
    """Put a filter (``seccomp.seccomp_filter``) on this process: prctl(2), linux/filter.h."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    filters = Program(len(program) // 8, program)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, ctypes.byref(filters), 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter is refused")


def _load(request: dict[str, object]) -> Callable[..., object]:
    program, name = str(request["program"]), str(request["entry_point"])
    namespace: dict[str, object] = {"__name__": "candidate"}  # not __main__: a model's own tests are not to run
    exec(compile(program, "candidate.py", "exec", dont_inherit=True), namespace)
    function = namespace.get(name)
    if not callable(function):
        raise NameError(f"no function {name}")
    return function


def _call(function: Callable[..., object], request: dict[str, object]) -> object:
    arguments, keywords = decode(request["arguments"]), decode(request["keywords"])
    assert isinstance(arguments, list)
    assert isinstance(keywords, dict)
    return function(*arguments, **{str(name): value for name, value in keywords.items()})


def _answer(request: dict[str, object], work: Callable[[], object]) -> bytes:
    nonce = str(request["nonce"])
    exhausted = write_message({"nonce": nonce, "error": "memory", "detail": "MemoryError"})
    try:
        value = work()
    except MemoryError:
        return exhausted
    except BaseException as error:
        return _failure(nonce, "raised", error)
    try:
        return write_message({"nonce": nonce, "value": encode(value)})
    except MemoryError:
        return exhausted
    except NotLiteral as error:
        return _failure(nonce, "value", error)
    except BaseException as error:
        return _failure(nonce, "raised", error)


def _failure(nonce: str, kind: str, error: BaseException) -> bytes:
    try:
        detail = f"{type(error).__name__}: {error}"[:_DETAIL]
        return write_message({"nonce": nonce, "error": kind, "detail": detail})
    except BaseException:
        return write_message({"nonce": nonce, "error": kind, "detail": "an exception that cannot be shown"})
