"""Put somebody's files of every kind where qconv writes and removes, and see that no command ever changes one of them.

For each command: folders that hold nothing but one of those files; and unfinished and finished folders of its own with
all of them added, run again, with --restart, with a request that cannot work, and killed before the n-th change to the
file system, at several n. Afterwards each file must be what it was: its bytes, its kind, where a link leads, its time.
Exits with 1 if one is not.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import shutil
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from qconv.cli.main import qconv  # noqa: E402 - the checkout's own

PLANTS = (
    *("notes.txt", ".hidden", "weights.bin", "results.json", "LICENSE", "LICENSE.mine", "README.md", "config.json"),
    *("tokenizer.json", "tokenizer_notes.docx", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.mine"),
    *(
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
    ),
    *("other.gguf", "model-Q8_0.gguf", "imatrix.gguf", "config.json.partial", "SHA256SUMS.partial", "mine.partial"),
    *("qconv-report.json", "SHA256SUMS", "run.json", "report.html", "report.md", "report.json", "junit.xml"),
    *("blame.json", "history.sqlite", "key.json", "journal.jsonl", ".git/config", "photos/a.jpg", "build/a.o"),
    *("qconv-scales/mine.safetensors", "files/mine.json", "reference/mine", "2019-07-04/holiday.jpg"),
    *(".qconv/notes.txt", ".qconv/mine.bin", ".qconv/journal.jsonl", ".qconv/key.json", ".qconv/task-text/mine"),
    *(".qconv-files", ".qconv-trash/listing.json", ".qconv-trash/files/mine", ".qconv-discarded/files/mine"),
    *(".qconv-blame/mine", "2026-01-01/notes.txt", "2026-01-01/a/notes.txt", "2026-01-01/a/build/LICENSE.mine"),
    *("link -> file", "tokenizer.link -> file", "config.json -> file", ".qconv -> folder", "qconv-scales -> folder"),
    *("awq/notes.txt", "awq/config.json.partial", "awq/.qconv/mine", "gguf-Q8_0/other.gguf", "gguf-Q8_0/mine/a.jpg"),
    *("linked -> folder", "2018-01-01 -> folder", "empty/"),
)
"""A file, a link to a file or folder elsewhere, or an empty folder."""
COMMANDS = (
    *(
        "qconv.building.pipeline",
        "qconv.conversion.pipeline",
        "qconv.building.gguf_pipeline",
        "qconv.building.imatrix_pipeline",
        "qconv.building.several_pipeline",
        "qconv.nightly.run",
        "qconv.calibration.run",
    ),
    *(
        "qconv.evaluation.run",
        "qconv.evaluation.blaming",
        "qconv.evaluation.engines.local",
        "qconv.evaluation.report.view",
    ),
    *("transformers.models.qwen3_moe.modeling_qwen3_moe", "qconv.evaluation.report.page", "safetensors.numpy"),
)
"""What the commands import when they need it."""
MINE = b"somebody's own work, not qconv's\n"

Arguments = Callable[[Path], Sequence[str | Path]]
State = dict[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """A command that writes.

    Attributes:
        name: What the table calls it.
        arguments: What runs it on a folder.
        failing: The same of a request that cannot work; None if every request of that kind works.
        restarts: Whether it knows --restart.
        base: A folder of which the one that it works on is a copy at first; None for one that it makes.
    """

    name: str
    arguments: Arguments
    failing: Arguments | None = None
    restarts: bool = True
    base: Path | None = None


@dataclass(slots=True)
class Count:
    """What a kind of situation came to: runs by exit code, and what was changed."""

    codes: Counter[int] = field(default_factory=Counter)
    planted: int = 0
    problems: list[str] = field(default_factory=list)


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=5, show_default=True, help="In every killed situation.")
@click.option("--only", metavar="NAME", multiple=True, help="Only commands in whose name this is found; repeatable.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=REPOSITORY / "build/foreign-files",
)
def main(kills: int, only: Sequence[str], work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "QCONV_CACHE": str(work / "cache")}
    for module in COMMANDS:  # once, and not in every process
        importlib.import_module(module)
    torch.set_num_threads(1)  # a process that is forked beside others' threads would wait for them for ever
    results = {
        case.name: sweep(case, work / case.name.replace(" ", "-"), kills)
        for case in cases(work / "made")
        if not only or any(one in case.name for one in only)
    }
    sys.exit(1 if report(results) else 0)


def cases(made: Path) -> list[Case]:
    """Every command that writes or removes, on a model of a few kB."""
    model, corpus, suite = made / "model", made / "corpus", made / "suite.yaml"
    small = ("--layers", "1", "--experts", "2")
    prepare(model, corpus, suite)
    calib = ("--tokens", "64", "--sequence-length", "32", "--calib")
    good, bad = (*calib, f"text:{corpus}"), (*calib, f"text:{made / 'absent'}")
    measured = ("--no-gate", "--cache", made / "cache")
    for name, arguments in (
        ("build", ("quantize", model, "--fmt", "fp8-dynamic")),
        ("run", ("eval", "run", made / "build", "--reference", model, "--suite", suite, *measured)),
    ):
        if run([*arguments, "-o", made / name], made / "log.txt") != 0:
            raise click.ClickException(f"{name} could not be made: see {made / 'log.txt'}")

    def quantize(fmt: str, *more: str, name: str | None = None) -> Case:
        def arguments(*text: str) -> Arguments:
            return lambda out: ("quantize", model, "--fmt", fmt, *text, *more, "-o", out)

        return Case(f"quantize {name or fmt}", arguments(*good), arguments(*bad))

    def nightly(suite: Path) -> Arguments:
        def arguments(out: Path) -> Sequence[str | Path]:
            config = out.parent / f"{out.name}-{suite.stem}.yaml"
            build = f"{{name: a, reference: {model}, recipe: fp8-dynamic}}"
            config.write_text(
                f"work: {out}\nhistory: {out.parent}/{out.name}-history\nkeep_nights: 1\nsuites: [{suite}]\n"
                f"builds: [{build}]\n"
            )
            date = "2026-01-02" if (out / "2026-01-01" / "report.html").is_file() else "2026-01-01"
            return ("nightly", config, "--date", date)

        return arguments

    evaluate = ("eval", "run", made / "build", "--reference", model, *measured)
    return [
        quantize("awq", "--group-size", "32"),
        quantize("gguf:Q8_0"),
        Case(
            "convert",
            lambda out: ("convert", made / "build", "--to", "bf16", "-o", out),
            lambda out: ("convert", made / "build", "--to", "awq", "-o", out),
        ),
        Case(
            "convert to GGUF",
            lambda out: ("convert", made / "build", "--to", "gguf:BF16", "-o", out),
            lambda out: ("convert", made / "build", "--to", "gguf:Q4_0", "-o", out),
        ),
        quantize("awq", "--fmt", "gguf:Q8_0", "--group-size", "32", name="two formats"),
        Case(
            "imatrix", lambda out: ("imatrix", model, *good, "-o", out), lambda out: ("imatrix", model, *bad, "-o", out)
        ),
        Case(
            "eval run",
            lambda out: (*evaluate, "--suite", suite, "-o", out),
            lambda out: (*evaluate, "--suite", made / "absent.yaml", "-o", out),
        ),
        Case("eval report", lambda out: ("eval", "report", made / "run", "-o", out), restarts=False),
        Case(
            "eval blame",
            lambda out: ("eval", "blame", out, "--tokens", "64", "--layers", "1"),
            lambda out: ("eval", "blame", out, "--tokens", "64", "--baseline", made / "model"),
            restarts=False,
            base=made / "run",
        ),
        Case(
            "eval reference",
            lambda out: ("eval", "reference", model, "--suite", suite, "--cache", out),
            lambda out: ("eval", "reference", model, "--suite", made / "absent.yaml", "--cache", out),
            restarts=False,
        ),
        Case("eval history", lambda out: ("eval", "history", out, "--add", made / "run"), restarts=False),
        Case("nightly", nightly(suite), nightly(made / "absent.yaml"), restarts=False),
        Case(
            "bench slice",
            lambda out: ("bench", "slice", *small, "-o", out),
            lambda out: ("bench", "slice", *small, "--seed", "1", "-o", out),
            restarts=False,
        ),
    ]


def prepare(model: Path, corpus: Path, suite: Path) -> None:
    """A random model, a corpus of a few documents and a suite of one small task."""
    from qconv.building import bench

    shape = bench.SliceShape(hidden_size=64, expert_width=32, heads=2, kv_heads=2, head_dim=32, vocab_size=300)
    bench.write_slice(model, layers=1, experts=2, shape=shape, shard_size=80_000)
    # What `bench slice` writes here is small too.
    bench.write_slice = functools.partial(bench.write_slice, shape=shape, shard_size=80_000)
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 12)
    suite.write_text(
        f"seed: 0\nengine: {{dtype: auto, rows: 4}}\ntasks:\n  - {{kind: text, name: text, corpus: 'text:{corpus}', "
        "context: 32, stride: 16, tokens: 128}\n"
    )


def sweep(case: Case, work: Path, kills: int) -> dict[str, Count]:
    """All situations of a command, each in a folder of its own."""
    work.mkdir()
    log = work / "log.txt"
    counts = {"foreign": Count(), "unfinished": Count(), "finished": Count(), "killed": Count(), "restart": Count()}
    numbers = iter(range(10**6))

    def at(situation: str, template: Path | None, plants: Sequence[str], arguments: Arguments, kill: int = 0) -> None:
        out = folder(template)
        planted = [plant(out, one) for one in plants]
        before = state(out.parent, [one for one in planted if one is not None])
        given = arguments(out)
        count = counts[situation]
        count.codes[run(given, log, kill)] += 1
        count.planted += len(before)
        found = changed(before, out.parent)
        count.problems += [f"{' '.join(map(str, given))}: {one}" for one in found]
        if not found:
            shutil.rmtree(out.parent)

    def folder(template: Path | None) -> Path:
        out = work / f"{next(numbers)}" / "out"
        out.parent.mkdir()
        if template is not None:
            shutil.copytree(template, out, symlinks=True)
        return out

    def undisturbed(kill: int = 0, counting: bool = False) -> tuple[Path, int]:
        out = folder(case.base)
        return out, run(case.arguments(out), log, kill, counting)

    def restarted(arguments: Arguments) -> Arguments:
        return lambda out: (*arguments(out), "--restart")

    ways = [case.arguments, *([] if case.failing is None else [case.failing])]
    if case.restarts:
        ways += map(restarted, ways[:])
    finished, code = undisturbed()
    if code not in (0, 3, 4):
        raise click.ClickException(f"{case.name}: the undisturbed run failed: see {log}")
    _, steps = undisturbed(counting=True)
    unfinished, _ = undisturbed(kill=max(2, steps // 2))
    unfinished.mkdir(exist_ok=True)
    spread = [1 + (steps - 1) * number // kills for number in range(1, kills + 1)]

    for one in PLANTS:
        for arguments in (way for way in ways if way is not case.failing):
            at("foreign", case.base, [one], arguments)
    for situation, template in (("unfinished", unfinished), ("finished", finished)):
        # What a command writes itself is in its way; the rest lies beside it.
        own = [one for one in PLANTS if os.path.lexists(finished / one.partition(" ")[0])]
        for arguments in ways:
            at(situation, template, [one for one in PLANTS if one not in own], arguments)
            for one in own:
                at(situation, template, [one], arguments)
        for number in spread:
            for arguments in ways:
                at("killed", template, ["notes.txt", "LICENSE.mine", "photos/a.jpg"], arguments, number)
    for number in (*range(1, kills + 1), *spread) if case.restarts else ():
        out = folder(finished)
        killed = run(restarted(case.arguments)(out), log, number)
        code = run(case.arguments(out), log)
        counts["restart"].codes[killed] += 1
        if code != 0 and not (code == 1 and (out / "run.json").exists()):
            counts["restart"].problems.append(f"{out}: killed before change {number} of a restart, it does not go on")
    return counts


def plant(out: Path, what: str) -> str | None:
    """Put something of somebody's into a folder, in place of what may be there; its path beside the folder's."""
    name, _, target = what.partition(" -> ")
    path = out / name.rstrip("/")
    elsewhere = out.parent / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True, exist_ok=True)
    for file in (elsewhere / "file", elsewhere / "folder" / "journal.jsonl"):
        file.write_bytes(MINE)
    if any((out / parent).is_symlink() or (out / parent).is_file() for parent in path.relative_to(out).parents):
        return None
    if path.is_dir() or path.is_symlink():
        return None  # planted before in another shape
    for suffix in ("-journal", "-wal", "-shm"):  # of a database, whose place somebody's file takes
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if target:
        path.unlink(missing_ok=True)
        path.symlink_to(elsewhere / target)
    elif name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(MINE)
    return str(path.relative_to(out.parent))


def state(folder: Path, names: Sequence[str]) -> State:
    """What each of somebody's paths is, and all that lies elsewhere."""
    elsewhere = [str(path.relative_to(folder)) for path in (folder / "elsewhere").rglob("*")]
    return {name: facts(folder / name) for name in (*names, *elsewhere)}


def facts(path: Path) -> tuple[object, ...]:
    """Kind, content, target and time of change of a path."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return ("gone",)
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISLNK(kind):
        return kind, os.readlink(path)
    return (kind,) if stat.S_ISDIR(kind) else (kind, path.read_bytes(), found.st_mtime_ns)


def changed(before: State, folder: Path) -> list[str]:
    """Which of the paths are not what they were."""
    after = {name: facts(folder / name) for name in before}
    return [
        f"{name} is {'gone' if after[name] == ('gone',) else 'changed'}"
        for name in before
        if before[name] != after[name]
    ]


def run(arguments: Sequence[str | Path], log: Path, kill: int = 0, counting: bool = False) -> int:
    """Run qconv in a process of its own, made by a fork, which needs no imports.

    Args:
        arguments: The command line's.
        log: Gets what it prints.
        kill: Send SIGKILL before that change to the file system; 0 for none.
        counting: Return how many changes there are and not the exit code.

    Returns:
        The exit code, negative for a signal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run_child(list(map(str, arguments)), log, kill, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(said or 0) if counting else code


def _run_child(arguments: list[str], log: Path, kill: int, writing: int) -> NoReturn:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(output, f"$ qconv {' '.join(arguments)}\n".encode())
        for stream in (1, 2):
            os.dup2(output, stream)
        count = hooked(kill)
        sys.argv = ["qconv", *arguments]
        try:
            run: Callable[..., object] = qconv.main  # which a test replaces by one that returns
            run(prog_name="qconv")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        os.write(writing, str(count()).encode())
        sys.stdout.flush()
    finally:
        os._exit(code)


def hooked(kill: int) -> Callable[[], int]:
    """Count changes to the file system, and die before the one of that number; tells how many there were."""
    lock, number = threading.Lock(), 0

    def step() -> None:
        nonlocal number
        with lock:
            number += 1
            if number == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(real: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if changes(*args, **options):
                step()
            return real(*args, **options)

        return call

    def always(*_: Any, **__: Any) -> bool:
        return True

    def creates(path: object, flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & (os.O_CREAT | os.O_TRUNC))

    def writes(file: object, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set("wax+") & set(mode)) and not str(file).startswith("/dev/")

    for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate"):
        setattr(os, name, wrapped(getattr(os, name), always))
    os.open = wrapped(os.open, creates)
    builtins.open = io.open = wrapped(builtins.open, writes)
    return lambda: number


def report(results: dict[str, dict[str, Count]]) -> list[str]:
    """Print the table; what was changed."""
    console = Console()
    table = Table("command", "situation", "runs", "exit codes", "files of somebody's", "changed", title="Foreign files")
    problems = []
    for name, counts in results.items():
        for situation, count in counts.items():
            codes = ", ".join(f"{code}: {number}" for code, number in sorted(count.codes.items()))
            runs = str(count.codes.total())
            table.add_row(name, situation, runs, codes, str(count.planted), str(len(count.problems)))
            problems += count.problems
    console.print(table)
    for problem in problems[:50]:
        console.print(problem, highlight=False, style="red", soft_wrap=True)
    console.print("CHANGED" if problems else "nothing that is not qconv's was changed")
    return problems


if __name__ == "__main__":
    main()
