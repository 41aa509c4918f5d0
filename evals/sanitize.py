"""The C++ and its callers under the sanitizers of addresses, undefined behaviour and threads (``make sanitize``).

First the tests of every library and of its first use by many threads must pass without a report. Then bugs are planted,
in copies of the sources or in a caller, and each must be reported: else the run proves nothing.

Exit codes: 0 clean and every planted bug found, 1 otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from qconv import native

CHECKOUT = Path(__file__).resolve().parents[1]
FIRST_USE = "tests/test_first_use.py"
TESTS = (
    FIRST_USE,
    "tests/core/test_integer_grid.py",
    "tests/grids/ggml/test_compiled.py",
    "tests/grids/test_turns.py",
    "tests/runtime/backends/test_cpu.py",
    "tests/runtime/backends/test_cpu_tiles.py",
)
PATIENCE = 3600  # seconds; minutes are usual


@dataclass(frozen=True, slots=True)
class Sanitizer:
    """How libraries are compiled, and what the process loads and sets for them.

    Attributes:
        name: What is looked for.
        flags: The compiler's.
        libraries: The sanitizers' runtimes, which must be loaded before Python.
        options: Environment variables.
        prefix: Of the command: the thread sanitizer needs addresses that are not random.
        tests: What runs under it. Of threads only what starts some: it slows everything else twentyfold.
    """

    name: str
    flags: str
    libraries: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    prefix: tuple[str, ...] = ()
    tests: tuple[str, ...] = TESTS


ADDRESS = Sanitizer(
    "address and undefined behaviour",
    "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    ("libasan.so", "libubsan.so"),
    (("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1")),  # Python itself never frees all
)
THREAD = Sanitizer(
    "threads",
    "-O1 -g -fsanitize=thread",
    ("libtsan.so",),
    (("TSAN_OPTIONS", "exitcode=66"),),
    ("setarch", "-R"),
    (FIRST_USE,),
)

FALSE_ALARMS = "race:_dl_deallocate_tls\n"
"""What the threads' sanitizer is told to keep to itself: glibc frees the storage of threads that have ended, in an
order that it does not see."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A bug, and the words of the report that it must cause.

    Attributes:
        what: It does.
        sanitizer: That finds it.
        report: Words of the report.
        tests: Of :data:`FIRST_USE`, as pytest's ``-k`` takes them.
        edit: A source file, text in it and what to put there.
        patch: Python statements before the tests.
    """

    what: str
    sanitizer: Sanitizer
    report: str
    tests: str
    edit: tuple[str, str, str] | None = None
    patch: str = ""


PLANTED = (
    Planted(
        "a caller keeps only the address of a lattice",
        ADDRESS,
        "heap-use-after-free",
        "encoding and IQ2_XS",
        patch="""
from qconv.grids.ggml import compiled
made = compiled.lattice_tables._function
def forgetful(grid):
    described, tables = made(grid)
    return described, []
compiled.lattice_tables._function = forgetful
""",
    ),
    Planted(
        "codes are written one place too far",
        ADDRESS,
        "heap-buffer-overflow",
        "rounding",
        edit=("rounding.cpp", "codes[first + i] = ", "codes[first + i + 1] = "),
    ),
    Planted(
        "a shift by more bits than there are",
        ADDRESS,
        "runtime error: shift exponent",
        "rounding",
        edit=("rounding.cpp", "float(grid.levels - 1)", "float((1 << (grid.levels + 30)) - 1)"),
    ),
    Planted(
        "two threads of a product write the same output",
        THREAD,
        "data race",
        "products and 1",
        edit=("runtime/parallel.h", "{ work(bound(part), ", "{ work(bound(part) - 1, "),
    ),
)


@click.command()
@click.option("--only", type=click.Choice(["clean", "planted"]), help="One half of it.")
def main(only: str | None) -> None:
    """Run the libraries' tests under sanitizers, then prove that planted bugs are reported."""
    failures = []
    with tempfile.TemporaryDirectory(prefix="qconv-sanitize-") as name:
        scratch = Path(name)
        if only != "planted":
            for sanitizer in (ADDRESS, THREAD):
                started = time.monotonic()
                code, said = run(sanitizer, sanitizer.tests, scratch / "clean")
                last = said.strip().splitlines()[-1] if said.strip() else ""
                click.echo(f"{sanitizer.name}: exit {code} in {time.monotonic() - started:.0f} s: {last}")
                if code:
                    failures.append(sanitizer.name)
                    click.echo(said[-20_000:])
        for number, bug in enumerate(PLANTED if only != "clean" else ()):
            found, said = proven(bug, scratch / f"planted-{number}")
            click.echo(f"planted: {bug.what}: {'reported' if found else 'NOT REPORTED'}: {bug.report}")
            if not found:
                failures.append(bug.what)
                click.echo(said[-5_000:])
    click.echo(
        f"not as it should be: {'; '.join(failures)}" if failures else "clean, and every planted bug was reported"
    )
    sys.exit(1 if failures else 0)


def proven(bug: Planted, scratch: Path) -> tuple[bool, str]:
    """Whether a planted bug is reported, and what was printed."""
    statements = bug.patch
    if bug.edit is not None:
        sources = scratch / "kernels"
        shutil.copytree(native.kernels_folder() / "cpu", sources / "cpu")
        file, before, after = sources / "cpu" / bug.edit[0], *bug.edit[1:]
        text = file.read_text()
        if before not in text:
            raise click.ClickException(f"{bug.edit[0]}: {before!r} is not there; plant the bug anew.")
        file.write_text(text.replace(before, after))
        statements += "\nfrom pathlib import Path\nfrom qconv import native\n"
        statements += f"native.kernels_folder = lambda: Path({str(sources)!r})\n"
    code, said = run(bug.sanitizer, (FIRST_USE, "-k", bug.tests), scratch / "cache", statements)
    return code != 0 and bug.report in said, said


def run(sanitizer: Sanitizer, tests: Sequence[str], cache: Path, statements: str = "") -> tuple[int, str]:
    """Run tests with libraries made under a sanitizer; the exit code, and what was printed."""
    preloaded = " ".join(str(library_path(name)) for name in sanitizer.libraries)
    environment = os.environ | dict(sanitizer.options)
    cache.mkdir(parents=True, exist_ok=True)
    suppressions = cache / "suppressions"
    suppressions.write_text(FALSE_ALARMS)
    environment["TSAN_OPTIONS"] = f"{environment.get('TSAN_OPTIONS', '')} suppressions={suppressions}".strip()
    environment |= {"LD_PRELOAD": preloaded, native.EXTRA_FLAGS: sanitizer.flags, "XDG_CACHE_HOME": str(cache)}
    # Reports go to the process's stderr: -s lets them pass.
    options = ["-q", "-s", "-x", "-p", "no:randomly", "-p", "no:cacheprovider"]
    program = f"{statements}\nimport pytest, sys\nsys.exit(pytest.main({[*options, *tests]!r}))"
    command = [*sanitizer.prefix, sys.executable, "-c", program]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def library_path(name: str) -> Path:
    """Where the compiler's runtime library of a sanitizer lies.

    Raises:
        click.ClickException: it is not installed.
    """
    command = [*native.compiler(), f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute():
        raise click.ClickException(f"{name} is not installed beside {command[0]}.")
    return found


if __name__ == "__main__":
    main()
