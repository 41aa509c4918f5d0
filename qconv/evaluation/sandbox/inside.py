"""What exists inside a sandbox, whatever program makes it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from qconv.evaluation.sandbox import guest, literals

ENVIRONMENT = {
    "PYTHONHOME": "/python",
    "LD_LIBRARY_PATH": "/python/lib",
    "PYTHONHASHSEED": "0",  # the order of strings in a set must not change a result from night to night
    "LC_ALL": "C.UTF-8",
    "PATH": "/nonexistent",
    "HOME": "/nonexistent",
}
_PROGRAM = "import sys; sys.path.append('/sandbox'); from qconv.evaluation.sandbox import guest; guest."
_INTERPRETER = ("/python/bin/python3", "-s", "-S", "-P", "-B", "-c")
COMMAND = (*_INTERPRETER, _PROGRAM + "main()")
KEPT_COMMAND = (*_INTERPRETER, _PROGRAM + "keep()")
"""Where a sandbox does not end with the process that started it."""

_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_PACKAGE_FOLDERS = ("python3*/site-packages", "python3*/dist-packages")


@functools.cache
def mounts() -> tuple[tuple[Path, str], ...]:
    """What of this machine is seen inside, read-only: (path here, path there).

    The interpreter that runs qconv, without its virtual environment; the system's libraries; the two files of this
    package that run inside. Without their ``__init__`` they need nothing else of qconv.
    """
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    found = [(Path(folder), folder) for folder in _SYSTEM_LIBRARIES if Path(folder).is_dir()]
    found.append((executable, "/python/bin/python3"))
    for name in dict.fromkeys(("lib", sys.platlibdir)):
        if Path(sys.base_prefix, name).is_dir():
            found.append((Path(sys.base_prefix, name), f"/python/{name}"))
    for module in (guest, literals):
        file = Path(str(module.__file__))
        found.append((file, f"/sandbox/qconv/evaluation/sandbox/{file.name}"))
    return tuple(found)


@functools.cache
def hidden_folders() -> tuple[str, ...]:
    """Installed packages within the mounts, to be covered by empty folders: results must not depend on them."""
    return tuple(
        f"{target}/{folder.relative_to(source)}"
        for source, target in mounts()
        if source.is_dir() and not source.is_symlink()
        for pattern in _PACKAGE_FOLDERS
        for folder in sorted(source.glob(pattern))
        if folder.is_dir()
    )
