"""Inputs of the targets: models, builds, runs and files, each made once and copied, and calls that are no commands."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from evals.small_model import save_small_model
from qconv.cli.console import print_error
from qconv.cli.main import as_qconv_error, qconv

QUICK_SUITE = """
engine: {dtype: float32, rows: 2}
noise: null
tasks:
  - {kind: text, name: text, corpus: python-stdlib, context: 64, stride: 32, tokens: 512, document_tokens: 256}
"""
CHAT = {
    "messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "def add(a, b): return a + b"}]
}


STORE = Path(tempfile.gettempdir()) / f"qconv-fuzz-{os.getpid()}"
"""Where what many targets share is made once, by whichever process comes first."""


def shared(name: str, make: Callable[[Path], None], folder: Path) -> None:
    """Copy what ``make`` makes, made at first use, into a folder."""
    made = STORE / name
    if not made.exists():
        partial = made.with_suffix(".partial")
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=os.link, symlinks=True)


def called(*arguments: object) -> None:
    """A command of qconv's that must succeed.

    Raises:
        RuntimeError: it did not.
    """
    try:
        qconv.main([str(one) for one in arguments], prog_name="qconv")
    except SystemExit as end:
        if end.code not in (0, 3, 4, None):
            raise RuntimeError(f"{arguments}: exit code {end.code}") from None


def function(call: Callable[[Path], object]) -> Callable[[Path], object]:
    """A target's run that calls a function: its errors end the process as the command line would."""

    def run(folder: Path) -> None:
        try:
            call(folder)
        except Exception as error:
            known = as_qconv_error(error)
            if known is None:
                raise
            print_error(known, as_json=False)
            raise SystemExit(known.exit_code) from None

    return run


def model(folder: Path) -> None:
    """A random Qwen3-MoE of several shards with the bundled tokenizer, in ``model``."""
    shared("model", _make_model, folder)


def _make_model(folder: Path) -> None:
    save_small_model(folder / "model", width=64, experts=4, head_dim=32, max_shard_size="600KB")


def build(folder: Path) -> None:
    """The model beside its AWQ build, whose scales were folded, in ``build``."""
    shared("build", _make_build, folder)


def _make_build(folder: Path) -> None:
    model(folder)
    options = ("--group-size", 32, "--tokens", 512, "--sequence-length", 64)
    called("quantize", folder / "model", "--fmt", "awq", "--method", "awq", *options, "-o", folder / "build")


def unfinished(folder: Path) -> None:
    """The model beside a build that was interrupted when its first layer was committed."""
    shared("unfinished", _make_unfinished, folder)


def _make_unfinished(folder: Path) -> None:
    from qconv.building.pipeline import quantize
    from qconv.planning.recipe import load_recipe

    class Stop(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if "1" in what:
            raise Stop

    model(folder)
    recipe = load_recipe("w4a16", {"method": "rtn", "grid.group_size": 32})
    try:
        quantize(folder / "model", folder / "out", recipe, progress=progress, log=lambda text: None)
    except Stop:
        return
    raise RuntimeError("the run was not interrupted")


def gguf(folder: Path) -> None:
    """The model as GGUF, ``gguf/model.gguf``, beside it."""
    shared("gguf", _make_gguf, folder)


def _make_gguf(folder: Path) -> None:
    model(folder)
    called("quantize", folder / "model", "--fmt", "gguf:Q8_0", "-o", folder / "gguf")
    (made,) = (folder / "gguf").glob("*.gguf")
    made.rename(folder / "gguf/model.gguf")
    (folder / "gguf/SHA256SUMS").unlink()


def imatrix(folder: Path) -> None:
    """The model beside ``imatrix.gguf``."""
    shared("imatrix", _make_imatrix, folder)


def _make_imatrix(folder: Path) -> None:
    model(folder)
    called("imatrix", folder / "model", "-o", folder / "made", "--tokens", 512, "--sequence-length", 64)
    (made,) = (folder / "made").glob("*.gguf")
    made.rename(folder / "imatrix.gguf")


def run(folder: Path) -> None:
    """A run of the build against the model, in ``run``, and a history with it."""
    shared("run", _make_run, folder)


def _make_run(folder: Path) -> None:
    build(folder)
    (folder / "suite.yaml").write_text(QUICK_SUITE)
    suite = ("--suite", folder / "suite.yaml", "--no-gate", "--cache", folder / "cache")
    called("eval", "run", folder / "build", "--reference", folder / "model", *suite, "-o", folder / "run")
    called("eval", "history", folder / "history", "--add", folder / "run")


def modelopt(folder: Path) -> None:
    """An NVFP4 build in ModelOpt's layout, ``modelopt``: it has a file of settings of its own."""
    shared("modelopt", _made_as("modelopt", "nvfp4-modelopt"), folder)


def w8a8(folder: Path) -> None:
    """A build of int8 weights and inputs in compressed-tensors' layout, ``w8a8``."""
    shared("w8a8", _made_as("w8a8", "w8a8"), folder)


def _made_as(name: str, fmt: str, *more: str) -> Callable[[Path], None]:
    """Makes a build of the model in a format, and leaves the model out."""

    def make(folder: Path) -> None:
        model(folder)
        options = ("--method", "rtn", "--tokens", 512, "--sequence-length", 64, *more)
        called("quantize", folder / "model", "--fmt", fmt, *options, "-o", folder / name)
        shutil.rmtree(folder / "model")

    return make


def file(name: str, content: str) -> Callable[[Path], None]:
    """A folder with the model and one more file."""

    def prepare(folder: Path) -> None:
        model(folder)
        (folder / name).write_text(content)

    return prepare


def packaged(kind: str, name: str) -> str:
    from qconv.evaluation.suites import packaged_folder

    return (packaged_folder(kind) / f"{name}.yaml").read_text()  # type: ignore[arg-type]  # one of two words


def tokens(corpus: str, folder: Path) -> object:
    from qconv.calibration.corpus import build_tokens
    from qconv.core.settings import CalibrationSettings

    settings = CalibrationSettings(corpus=corpus.replace("{}", str(folder)), tokens=128, sequence_length=64)
    return build_tokens(settings, folder / "model")


def night(folder: Path) -> object:
    from qconv.nightly.settings import load_nightly

    return load_nightly(folder / "nightly.yaml")


def gates(folder: Path) -> object:
    from qconv.evaluation.gates import load_gates

    return load_gates(str(folder / "gates.yaml"))


def suite(folder: Path) -> object:
    from qconv.evaluation.suites import load_suite

    return load_suite(str(folder / "suite.yaml"))
