"""``qconv check``: verdicts of real builds, damaged ones, other people's, and what is asked wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv.engines.readers import READERS, SGLANG, VLLM
from qconv.engines.table import ENGINES
from qconv.formats import formats
from qconv.planning.recipe import load_recipe, packaged_recipes
from tests.cli.conftest import Invoke

FEWER = {"w4a16-asym": (VLLM,), "w4a16-fp8": (VLLM, SGLANG)}
"""Recipes of a format that have fewer readers than what ``--fmt`` gives by that format's own name."""
PLAIN = [name for name in packaged_recipes() if not name.startswith("qwen3-coder-480b")]


@pytest.fixture(scope="module", params=PLAIN)
def default_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ``--fmt NAME`` writes of a small model with experts, rounded so that it takes no time."""
    from qconv.planning.recipe import parse_recipe, read_values
    from tests import gpt_oss
    from tests.conftest import build, random_model, save_model

    folder = tmp_path_factory.mktemp("default")
    if request.param == "gpt-oss":
        model = gpt_oss.dense(folder / "model")
    else:
        sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}
        model = save_model(random_model("qwen3_moe", **sizes), folder / "model")
    values, _ = read_values(request.param)
    values |= {"calibration": {"tokens": 64, "sequence_length": 32}}
    for key in ("refine", "awq", "gptq"):
        values.pop(key, None)
    if values.get("method") != "rtn" and "static" not in request.param:
        values["method"] = "rtn"
    build(model, folder / "out", parse_recipe(values))
    return request.param, folder / "out"


def test_no_default_build_breaks_a_rule_of_an_engine_that_reads_it(
    default_build: tuple[str, Path], invoke: Invoke
) -> None:
    name, folder = default_build
    result = invoke("check", folder, "--json")
    verdicts = {one["version"]: one for one in json.loads(result.stdout)["engines"]}
    for engine in FEWER.get(name, tuple(READERS[load_recipe(name).format])):
        if engine in verdicts:
            assert verdicts[engine]["verdict"] == "loads and right", (engine, verdicts[engine]["findings"])
    report = json.loads((folder / "qconv-report.json").read_text())
    told = {one["engine"]: one["verdict"] for one in report["engines"]}
    assert told == {one["engine"]: one["verdict"] for one in verdicts.values()}  # before it was there, and after
    card = (folder / "README.md").read_text()
    assert "## Engines" in card
    assert all(f"| {engine} |" in card for engine in ENGINES)


def test_every_format_has_readers_and_readers_are_formats() -> None:
    assert set(READERS) == set(formats())


def test_exit_codes_follow_what_was_asked(invoke: Invoke, build: Path, tiny: Path, tmp_path: Path) -> None:
    assert invoke("check", build).exit_code == 0  # some refuse it, some load it, nobody is WRONG
    build = tmp_path / "awq"
    assert invoke("quantize", tiny, "--fmt", "awq", "--method", "rtn", "-o", build).exit_code == 0
    assert invoke("check", build, "--engine", "vllm").exit_code == 0
    assert invoke("check", build, "--engine", "llamacpp").exit_code == 1  # refused, and named
    assert invoke("check", build, "--engine", "vllm", "--engine", "llamacpp").exit_code == 1
    everything = invoke("check", build)
    assert everything.exit_code == 1  # an AWQ build of experts is WRONG in transformers
    assert "loads and WRONG: transformers" in everything.stdout
    assert invoke("check", build, "--engine", "all").stdout == everything.stdout
    assert invoke("check", build, "--engine", "all", "--engine", "mlx").exit_code == 2
    assert invoke("check", build, "--engine", "nobody").exit_code == 2
    assert invoke("check", build / "none").exit_code == 2


def test_an_expert_that_is_gone_is_found(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(build, bad)
    index = json.loads((bad / "model.safetensors.index.json").read_text())
    gone = [name for name in index["weight_map"] if "layers.1.mlp.experts.3.down_proj" in name]
    for name in gone:
        shard = bad / index["weight_map"].pop(name)
        tensors = load_file(shard)
        del tensors[name]
        save_file(tensors, shard)
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    result = invoke("check", bad, "--engine", "vllm", "--json")
    assert result.exit_code == 1
    (engine,) = json.loads(result.stdout)["engines"]
    assert engine["verdict"] == "loads and WRONG"
    assert "loads and WRONG: vllm" in invoke("check", bad, "--engine", "vllm").stdout


def test_ranks_are_asked_about(invoke: Invoke, build: Path) -> None:
    whole = invoke("check", build, "--engine", "vllm", "--tp", "2", "--json")
    assert whole.exit_code == 0
    assert "--tensor-parallel-size 2" in json.loads(whole.stdout)["engines"][0]["start"]
    split = invoke("check", build, "--engine", "vllm", "--tp", "4", "--json")
    assert split.exit_code == 1
    (engine,) = json.loads(split.stdout)["engines"]
    assert {one["rule"] for one in engine["findings"]} >= {"vllm/tp-groups"}
    assert invoke("check", build, "--engine", "vllm", "--tp", "4", "--ep", "4").exit_code in (0, 1)


def test_plan_uses_the_same_rules(invoke: Invoke, tiny: Path) -> None:
    planned = invoke("plan", tiny, "--fmt", "awq", "--tp", "4", "--json")
    engines = {one["engine"]: one for one in json.loads(planned.stdout)["engines"]}
    assert "vllm/tp-groups" in {one["rule"] for one in engines["vllm"]["findings"]}
    assert engines["transformers"]["verdict"] == "loads and WRONG"
    assert "engines      " in invoke("plan", tiny, "--fmt", "awq").stdout


def test_a_gguf_file_and_its_folder(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    assert invoke("quantize", tiny, "--fmt", "gguf:Q8_0", "-o", out).exit_code == 0
    file = next(out.glob("*.gguf"))
    for path in (out, file):
        result = invoke("check", path, "--json")
        assert result.exit_code == 0  # nothing is WRONG, and llama.cpp loads it
        found = {one["engine"]: one for one in json.loads(result.stdout)["engines"]}
        assert found["llamacpp"]["verdict"] == "loads and right"
        assert found["llamacpp"]["start"] == f"llama-server --jinja -m {file}"
        assert found["sglang"]["verdict"] == "unknown to the rules"
    assert "note: no rule knows" in invoke("check", file, "--engine", "sglang").stdout
    report = json.loads((out / "qconv-report.json").read_text())
    assert {one["engine"]: one["verdict"] for one in report["engines"]}["llamacpp"] == "loads and right"


def test_of_a_repository_headers_are_read(
    invoke: Invoke, build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "snapshot"
    small.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        if (build / name).exists():
            shutil.copyfile(build / name, small / name)

    class Info:
        def __init__(self, dtype: str, shape: list[int]) -> None:
            self.dtype, self.shape = dtype, shape

    class File:
        def __init__(self, path: Path) -> None:
            from qconv.checkpoint.header import read_header

            self.tensors = {name: Info(one.dtype_name, list(one.shape)) for name, one in read_header(path).items()}

    class Found:
        def __init__(self) -> None:
            self.files_metadata = {path.name: File(path) for path in build.glob("*.safetensors")}

    def metadata(name: str, revision: str | None = None) -> Any:
        assert (name, revision) == ("owner/name", "main")
        return Found()

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(small))
    result = invoke("check", "owner/name@main", "--engine", "vllm", "--engine", "sglang")
    assert result.exit_code == 0
    assert "only headers are read" in result.stdout


def test_calls_of_tools_get_their_parser(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    other = tmp_path / "tools"
    shutil.copytree(build, other)
    (other / "chat_template.jinja").write_text("<tool_call><function=name></function></tool_call>")
    said = invoke("check", other, "--engine", "vllm").stdout
    assert f"start  vllm serve {other} --enable-auto-tool-choice --tool-call-parser qwen3_coder" in said


def test_raw_zeros_of_gptq_are_read_from_the_file(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "gptq"
    assert invoke("quantize", tiny, "--fmt", "gptq", "--method", "rtn", "-o", out).exit_code == 0
    assert invoke("check", out, "--engine", "vllm").exit_code == 0
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        raw = {name: torch.full_like(one, 0x88888888 - 2**32) for name, one in tensors.items() if "qzeros" in name}
        save_file(tensors | raw, shard)
    result = invoke("check", out, "--engine", "vllm", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["engines"][0]["findings"][0]["rule"] == "vllm/gptq-zeros"
