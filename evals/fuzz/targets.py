"""Every parser of qconv with sound input for it: checkpoints, builds, GGUF, recipes, suites, runs, corpora."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from evals.fuzz.harness import Target, command
from evals.fuzz.mutations import BYTES, JSON, JSON_LINES, SAFETENSORS, TEXT
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


def _packaged(kind: str, name: str) -> str:
    from qconv.evaluation.suites import packaged_folder

    return (packaged_folder(kind) / f"{name}.yaml").read_text()  # type: ignore[arg-type]  # one of two words


def _tokens(corpus: str, folder: Path) -> object:
    from qconv.calibration.corpus import build_tokens
    from qconv.core.settings import CalibrationSettings

    settings = CalibrationSettings(corpus=corpus.replace("{}", str(folder)), tokens=128, sequence_length=64)
    return build_tokens(settings, folder / "model")


def _night(folder: Path) -> object:
    from qconv.nightly.settings import load_nightly

    return load_nightly(folder / "nightly.yaml")


def _gates(folder: Path) -> object:
    from qconv.evaluation.gates import load_gates

    return load_gates(str(folder / "gates.yaml"))


def _suite(folder: Path) -> object:
    from qconv.evaluation.suites import load_suite

    return load_suite(str(folder / "suite.yaml"))


PLAN = ("plan", "{}/model", "--fmt", "w4a16", "--group-size", "32")
SAY = ("--max-tokens", "1", "--dtype", "float32")
RANKS = ("--engine", "vllm", "--tp", "1", "--ep", "2")
TO = ("-o", "{}/out")
VERIFY = ("verify", "{}/build")
AGAINST = (*VERIFY, "--against", "{}/model")
NIGHT = """
work: nights
history: history
suites: [smoke]
keep_nights: 3
budget_minutes: 60.0
engine: local
builds:
  - {name: awq, reference: model, recipe: {format: awq, grid: {group_size: 32}}}
  - {name: fixed, reference: model, build: model, canary: true}
"""
RECIPE = """
format: awq
method: [awq, gptq]
grid: {bits: 4, group_size: 32, symmetric: null}
clip: {enabled: null, steps: 10, max_shrink: 0.5}
awq: {alpha_points: 20, search_tokens: 128}
gptq: {block_size: 128, damp_percent: 0.01, ordering: static}
calibration:
  corpus: python-stdlib
  tokens: 32768
  sequence_length: 512
  seed: 0
  routing: routed
  propagate: true
  token_weights: uniform
  shrinkage_tokens: 64
skip: ['*.layers.0.self_attn.*']
output: {max_shard_size: 5000000000}
"""
RECIPE_GGUF = """
format: gguf
type: Q4_K_M
tensor_types: {'ffn_down': Q6_K, 'blk.0.*': Q8_0}
calibration: {corpus: python-stdlib, tokens: 512, sequence_length: 64, seed: 0}
imatrix: {files: [], shrinkage_tokens: 64, exponent: 0.5}
output: {max_shard_size: 5000000000}
"""
TEXTS = "".join(json.dumps({"text": "def add(a, b):\n    return a + b\n" * 20}) + "\n" for _ in range(10))
CHATS = "".join(json.dumps(CHAT) + "\n" for _ in range(20))

TARGETS: tuple[Target, ...] = (
    Target(
        "safetensors header",
        model,
        "model/model-00001-of-00002.safetensors",
        SAFETENSORS,
        command("inspect", "{}/model", "--tensors"),
    ),
    Target("index", model, "model/model.safetensors.index.json", JSON, command(*PLAN)),
    Target(
        "index read by quantize",
        model,
        "model/model.safetensors.index.json",
        JSON,
        command("quantize", *PLAN[1:], "--method", "rtn", "-o", "{}/out"),
    ),
    Target("config.json", model, "model/config.json", JSON, command(*PLAN)),
    Target(
        "config.json read by gguf", model, "model/config.json", JSON, command("plan", "{}/model", "--fmt", "gguf:Q8_0")
    ),
    Target(
        "config.json of a build",
        build,
        "build/config.json",
        JSON,
        command("generate", "{}/build", "--prompt", "x", *SAY),
    ),
    Target("checksums", build, "build/SHA256SUMS", TEXT, command(*VERIFY)),
    Target("report", build, "build/qconv-report.json", JSON, command(*VERIFY)),
    Target("scales", build, "build/qconv-scales/layer-00000.safetensors", SAFETENSORS, command(*AGAINST)),
    Target("shard of a build", build, "build/model-00001-of-00004.safetensors", SAFETENSORS, command(*AGAINST)),
    Target(
        "tokenizer.json", model, "model/tokenizer.json", JSON, command("generate", "{}/model", "--prompt", "x", *SAY)
    ),
    Target(
        "tokenizer_config.json",
        model,
        "model/tokenizer_config.json",
        JSON,
        command("generate", "{}/model", "--chat", "x", *SAY),
    ),
    Target(
        "generation_config.json",
        model,
        "model/generation_config.json",
        JSON,
        command("generate", "{}/model", "--prompt", "x", *SAY),
    ),
    Target(
        "chat template", model, "model/chat_template.jinja", TEXT, command("generate", "{}/model", "--chat", "x", *SAY)
    ),
    Target(
        "recipe",
        file("recipe.yaml", RECIPE),
        "recipe.yaml",
        TEXT,
        command("plan", "{}/model", "--recipe", "{}/recipe.yaml"),
    ),
    Target(
        "recipe of gguf",
        file("recipe.yaml", RECIPE_GGUF),
        "recipe.yaml",
        TEXT,
        command("plan", "{}/model", "--recipe", "{}/recipe.yaml"),
    ),
    Target("suite", file("suite.yaml", _packaged("suites", "nightly")), "suite.yaml", TEXT, function(_suite)),
    Target("gates", file("gates.yaml", _packaged("gates", "default")), "gates.yaml", TEXT, function(_gates)),
    Target("nightly", file("nightly.yaml", NIGHT), "nightly.yaml", TEXT, function(_night)),
    Target(
        "journal",
        unfinished,
        "out/.qconv/journal.jsonl",
        JSON_LINES,
        command("quantize", *PLAN[1:], "--method", "rtn", "-o", "{}/out"),
    ),
    Target("gguf", gguf, "gguf/model.gguf", BYTES, command("verify", "{}/gguf/model.gguf")),
    Target(
        "gguf read by generate",
        gguf,
        "gguf/model.gguf",
        BYTES,
        command("generate", "{}/gguf/model.gguf", "--prompt", "x", *SAY),
    ),
    Target("gguf inspected", gguf, "gguf/model.gguf", BYTES, command("inspect", "{}/gguf/model.gguf", "--tensors")),
    Target(
        "imatrix",
        imatrix,
        "imatrix.gguf",
        BYTES,
        command("quantize", "{}/model", "--fmt", "gguf:Q4_0", "--imatrix", "{}/imatrix.gguf", "-o", "{}/out"),
    ),
    Target("config.json checked", w8a8, "w8a8/config.json", JSON, command("check", "{}/w8a8", *RANKS)),
    Target(
        "header checked",
        w8a8,
        "w8a8/model-00001-of-00004.safetensors",
        SAFETENSORS,
        command("check", "{}/w8a8", *RANKS),
    ),
    Target(
        "hf_quant_config.json checked",
        modelopt,
        "modelopt/hf_quant_config.json",
        JSON,
        command("check", "{}/modelopt", *RANKS),
    ),
    Target(
        "config.json of ModelOpt checked",
        modelopt,
        "modelopt/config.json",
        JSON,
        command("check", "{}/modelopt", *RANKS),
    ),
    Target(
        "generation_config.json checked", w8a8, "w8a8/generation_config.json", JSON, command("check", "{}/w8a8", *RANKS)
    ),
    Target("gguf checked", gguf, "gguf/model.gguf", BYTES, command("check", "{}/gguf/model.gguf", *RANKS)),
    Target(
        "config.json converted", build, "build/config.json", JSON, command("convert", "{}/build", "--to", "gptq", *TO)
    ),
    Target(
        "config.json of ModelOpt converted",
        modelopt,
        "modelopt/config.json",
        JSON,
        command("convert", "{}/modelopt", "--to", "compressed-tensors", *TO),
    ),
    Target(
        "header converted",
        modelopt,
        "modelopt/model-00001-of-00004.safetensors",
        SAFETENSORS,
        command("convert", "{}/modelopt", "--to", "nvfp4-w4a4", *TO),
    ),
    Target(
        "report converted",
        build,
        "build/qconv-report.json",
        JSON,
        command("convert", "{}/build", "--to", "w4a16", *TO),
    ),
    Target("run.json", run, "run/run.json", JSON, command("eval", "report", "{}/run", "-o", "{}/page")),
    Target("history", run, "history/history.sqlite", BYTES, command("eval", "history", "{}/history")),
    Target(
        "corpus",
        file("corpus.jsonl", TEXTS),
        "corpus.jsonl",
        JSON_LINES,
        function(functools.partial(_tokens, "jsonl:{}/corpus.jsonl:text")),
    ),
    Target(
        "chats",
        file("chats.jsonl", CHATS),
        "chats.jsonl",
        JSON_LINES,
        function(functools.partial(_tokens, "jsonl:{}/chats.jsonl:messages")),
    ),
)
