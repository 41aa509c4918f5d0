"""Every parser of qconv with sound input for it: checkpoints, builds, GGUF, recipes, suites, runs, corpora."""

from __future__ import annotations

import functools
import json

from evals.fuzz.harness import Target, command
from evals.fuzz.inputs import (
    CHAT,
    build,
    file,
    function,
    gates,
    gguf,
    imatrix,
    model,
    modelopt,
    night,
    packaged,
    run,
    suite,
    tokens,
    unfinished,
    w8a8,
)
from evals.fuzz.mutations import BYTES, JSON, JSON_LINES, SAFETENSORS, TEXT

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
    Target("suite", file("suite.yaml", packaged("suites", "nightly")), "suite.yaml", TEXT, function(suite)),
    Target("gates", file("gates.yaml", packaged("gates", "default")), "gates.yaml", TEXT, function(gates)),
    Target("nightly", file("nightly.yaml", NIGHT), "nightly.yaml", TEXT, function(night)),
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
        "gguf converted", gguf, "gguf/model.gguf", BYTES, command("convert", "{}/gguf/model.gguf", "--to", "bf16", *TO)
    ),
    Target(
        "config.json that gguf is like",
        gguf,
        "model/config.json",
        JSON,
        command("convert", "{}/gguf/model.gguf", "--to", "bf16", "--like", "{}/model", *TO),
    ),
    Target(
        "header converted to gguf",
        build,
        "build/model-00001-of-00004.safetensors",
        SAFETENSORS,
        command("convert", "{}/build", "--to", "gguf", *TO),
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
        function(functools.partial(tokens, "jsonl:{}/corpus.jsonl:text")),
    ),
    Target(
        "chats",
        file("chats.jsonl", CHATS),
        "chats.jsonl",
        JSON_LINES,
        function(functools.partial(tokens, "jsonl:{}/chats.jsonl:messages")),
    ),
)
