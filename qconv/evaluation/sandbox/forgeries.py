"""Programs that try to pass without solving the task, or to get out: a sandbox is used only while all of them fail.

The task is ``double(x)``: x * 2. A forger gives wrong values and wants them accepted. An escaper gives the right
values, but only after it did what must be impossible, so that it passes exactly if it got out. All are tried in the
sandbox as it is on this machine, before any model's code is.
"""

from __future__ import annotations

from qconv.evaluation.sandbox.escapes import ESCAPES
from qconv.evaluation.sandbox.forgery import FAIL, MEMORY, PROTOCOL, program

HONEST = (
    program("plain", "def double(x): return x * 2"),
    program("prints", "def double(x):\n    print('passed', flush=True)\n    return x * 2"),
    program(
        "subclasses of builtins",
        """
        class Text(str): pass
        class Items(list): pass
        class Number(int): pass
        def double(x): return {str: Text, list: Items, int: Number, float: float}[type(x)](x * 2)
        """,
    ),
    program("uses its own /tmp", "def double(x):\n    open('/tmp/x', 'w').write('x')\n    return x * 2"),
)
"""These must pass, or a sandbox in which nothing works would prove itself."""

_VALUES = (
    program(
        "an object that equals everything",
        """
        class Same:
            def __eq__(self, other): return True
            def __sub__(self, other): return 0.0
        def double(x): return Same()
        """,
    ),
    program(
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
    program(
        "a str that equals everything",
        """
        class Same(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        def double(x): return x * 2 if not isinstance(x, str) else Same("wrong")
        """,
    ),
    program(
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
    program(
        "a float that is never far",
        """
        class Near(float):
            def __sub__(self, other): return 0.0
            def __abs__(self): return 0.0
            def __lt__(self, other): return True
        def double(x): return x * 2 if not isinstance(x, float) else Near(9.0)
        """,
    ),
    program(
        "a dict with forged items",
        """
        class Same(dict):
            def __eq__(self, other): return True
            def items(self): return [("value", 42)]
        def double(x): return Same()
        """,
    ),
    program(
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
    program(
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
    program("not a number", "def double(x): return float('nan')"),
    program("infinity", "def double(x): return float('inf')"),
    program("a generator", "def double(x):\n    yield x * 2"),
    program("a lazy result", "def double(x): return map(lambda y: y, [x * 2])"),
    program("a function", "def double(x): return lambda: x * 2"),
    program(
        "an object that pickles to its wish",
        """
        import os
        class Pickled:
            def __reduce__(self): return (os._exit, (0,))
            def __eq__(self, other): return True
        def double(x): return Pickled()
        """,
    ),
    program("a string for every type", "def double(x): return repr(x * 2)"),
    program("a result nested without end", "def double(x):\n    x = []\n    x.append(x)\n    return x"),
    program("a result nested deeply", "def double(x):\n    for _ in range(100_000): x = [x]\n    return x"),
    program("a huge string", "def double(x): return 'x' * 50_000_000"),
    program("a huge number", "def double(x): return 1 << 50_000_000"),
    program("a huge list", "def double(x): return [0] * 1_000_000", FAIL, MEMORY),
)

_ENDINGS = (
    program("exit with success when loaded", "import sys\nsys.exit(0)"),
    program("exit with success when called", "def double(x):\n    raise SystemExit(0)"),
    program("end the process with success", "import os\ndef double(x): os._exit(0)"),
    program("end the process while loading", "import os\nprint('passed', flush=True)\nos._exit(0)"),
    program("print that it passed", "print('passed')\ndef double(x): print('passed')"),
    program("end by a signal", "import os\ndef double(x): os.kill(os.getpid(), 11)"),
    program("not a program", "def double(x: return x * 2"),
    program("no such function", "def triple(x): return x * 2"),
    program("the name is no function", "double = 42"),
    program(
        "an exception that cannot be shown",
        """
        class Silent(BaseException):
            def __str__(self): raise Silent
            __repr__ = __str__
        def double(x): raise Silent
        """,
    ),
    program("recursion without end", "def double(x): return double(x)"),
    program(
        "recursion until the stack ends",
        """
        import sys
        sys.setrecursionlimit(1 << 30)
        class Deep:
            def __repr__(self): return repr([self])
        def double(x): return repr(Deep())
        """,
        FAIL,
        MEMORY,
    ),
)

_TAMPERING = (
    program(
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
        FAIL,
        PROTOCOL,
    ),
    program(
        "small numbers overwritten in memory",
        """
        import ctypes
        ctypes.memmove(id(42) + 24, id(7) + 24, 4)
        def double(x): return 7 if isinstance(x, int) else x * 2
        """,
        FAIL,
        PROTOCOL,
    ),
    program(
        "the guest's own functions replaced",
        """
        import json, sys
        guest = sys.modules["qconv.evaluation.sandbox.guest"]
        def forged(fields): return json.dumps({"nonce": fields["nonce"], "passed": True}).encode() + b"\\n"
        guest.write_message = forged
        def double(x): return 0
        """,
        PROTOCOL,
    ),
    program(
        "a passing answer written to every pipe",
        """
        import os
        def double(x):
            for descriptor in range(3, 32):
                try: os.write(descriptor, b'{"status": "pass"}\\n')
                except OSError: pass
            return 0
        """,
        PROTOCOL,
    ),
    program(
        "answers written in advance",
        """
        import json, os, sys
        for descriptor in range(3, 32):
            for value in (42, "abab", ["list", [1, 2, 1, 2]], 0.5):
                try: os.write(descriptor, json.dumps({"nonce": "0" * 16, "value": value}).encode() + b"\\n")
                except OSError: pass
        def double(x): return 0
        """,
        PROTOCOL,
    ),
    program(
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
        PROTOCOL,
    ),
    program(
        "a pipe flooded without end",
        """
        import os
        def double(x):
            while True:
                for descriptor in range(3, 32):
                    try: os.write(descriptor, b"x" * 65536)
                    except OSError: pass
        """,
        PROTOCOL,
    ),
    program(
        "a message nested deeply",
        """
        import os
        def double(x):
            for descriptor in range(3, 32):
                try: os.write(descriptor, b"[" * 200_000 + b"\\n")
                except OSError: pass
        """,
        PROTOCOL,
    ),
    program(
        "pipes closed",
        "import os\ndef double(x):\n    os.closerange(0, 256)\n    return x * 2",
    ),
)

FORGERIES = _VALUES + _ENDINGS + _TAMPERING + ESCAPES
