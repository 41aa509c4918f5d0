"""``qconv plan``: the true model from its config alone, and agreement with what is then written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from qconv.building.bench import SliceShape, write_slice
from tests.cli.conftest import Invoke


@pytest.fixture
def coder_480b(tmp_path: Path) -> Path:
    """config.json of Qwen3-Coder-480B-A35B and nothing else."""
    folder = tmp_path / "480b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SliceShape().config(layers=62, experts=160)))
    return folder


def test_the_true_model_is_planned_from_its_config_in_seconds(invoke: Invoke, coder_480b: Path) -> None:
    start = time.process_time()
    result = invoke("plan", coder_480b, "--fmt", "awq", "--json")
    # A second and a half of work where nothing else runs; hyperthreads and instrumentation cost a multiple.
    assert time.process_time() - start < 8.0
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    # The published count, and two bytes for each.
    assert values["parameters"] == 480_154_875_392
    assert values["source_bytes"] == 2 * values["parameters"]
    by_name = {row["name"].rpartition("layers.*.")[2]: row for row in values["classes"]}
    down = by_name["mlp.experts.*.down_proj"]
    assert (down["modules"], down["shapes"], down["scheme"]) == (62 * 160, [[6144, 2560]], "4-bit g128")
    # Four bits, and for each 128 weights a 16-bit scale and a 4-bit zero point.
    assert down["bits_per_weight"] == pytest.approx(4 + 20 / 128)
    assert by_name["mlp.gate"]["scheme"] == "BF16"
    assert sum(row["output_bytes"] for row in values["classes"]) < values["output_bytes"]
    assert values["output_bytes"] == pytest.approx(252.3e9, rel=1e-3)


def test_tensor_parallel_8_needs_groups_of_64(invoke: Invoke, coder_480b: Path) -> None:
    # 2560 columns over 8 ranks are 320: two and a half groups of 128, five of 64.
    refused = invoke("plan", coder_480b, "--fmt", "awq", "--tp", 8)
    assert refused.exit_code == 1
    assert "down_proj" in refused.stdout
    assert "--group-size 64, 32 fits" in refused.stdout
    assert invoke("plan", coder_480b, "--fmt", "awq", "--tp", 8, "--group-size", 64).exit_code == 0


def test_the_table_fits_a_terminal_of_80_columns(
    invoke: Invoke, coder_480b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("plan", coder_480b, "--fmt", "awq").stdout.splitlines()
    assert any(line.startswith("mlp.experts.*.gate_proj") and line.rstrip().endswith("4.16") for line in lines)
    assert any("(modelled)" in line for line in lines)


def test_the_plan_is_what_is_written(invoke: Invoke, tiny: Path, build: Path) -> None:
    options = ("--fmt", "w4a16", "--method", "rtn", "--units", "--json")
    values = json.loads(invoke("plan", tiny, *options).stdout)
    shards = {file.name: file.stat().st_size for file in build.glob("*.safetensors")}
    assert values["output_bytes"] == sum(shards.values())
    assert [name for unit in values["units"] for name in unit["shards"]] == sorted(shards)
    assert values["notices"] == []
    # The model's own index counts its bytes.
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert values["source_bytes"] == index["metadata"]["total_size"]


def test_an_index_of_another_model_and_absent_shards_are_noted(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "model.safetensors.index.json", tmp_path)
    result = invoke("plan", tmp_path, "--fmt", "w4a16", "--units")
    assert result.exit_code == 0
    assert "model.layers.4" in result.stdout
    assert "5 of 5 shards are not here" in result.stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"dtype": "float8_e4m3fn"}, 5, "float8_e4m3fn"),
        ({"model_type": "gpt2"}, 5, "gpt2"),
        ({"quantization_config": {"quant_method": "gptq"}}, 5, "already quantized"),
        ({"moe_intermediate_size": 200}, 2, "group size 128 does not divide"),
    ],
)
def test_what_cannot_work_is_refused(
    invoke: Invoke, tiny: Path, tmp_path: Path, change: dict[str, object], code: int, message: str
) -> None:
    config = json.loads((tiny / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("plan", tmp_path, "--fmt", "awq")
    assert result.exit_code == code
    assert message in result.stderr


def test_older_configs_spell_the_dtype_differently(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    values = json.loads(invoke("plan", tmp_path, "--fmt", "awq", "--json").stdout)
    assert values["source_bytes"] == 4 * values["parameters"]


@pytest.mark.parametrize("command", ["plan", "quantize"])
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        # As SmolLM2: hidden size 576.
        (["--fmt", "awq", "--method", "rtn"], "64, 32"),
        (["--fmt", "w4a16", "--method", "rtn"], "64, 32, -1"),
        (["--fmt", "gptq", "--method", "rtn"], "64, 32, -1"),
        (["--fmt", "fp8"], "--fmt fp8-dynamic"),
        (["--fmt", "fp8-dynamic", "--group-size", "128"], "one scale a row"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_no_engine_reads_is_refused_with_what_they_do(
    invoke: Invoke, tmp_path: Path, command: str, options: list[str], remedy: str
) -> None:
    shape = SliceShape(hidden_size=576, expert_width=128, heads=9, kv_heads=3, head_dim=64, vocab_size=512, top_k=2)
    write_slice(tmp_path / "model", layers=1, experts=2, shape=shape)
    out = ["-o", tmp_path / "out"] if command == "quantize" else []
    refused = invoke(command, tmp_path / "model", *options, *out)
    assert refused.exit_code == 2, refused.output
    assert remedy in " ".join(refused.stderr.split())
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_what_engines_refuse_of_a_build_is_told(invoke: Invoke, coder_480b: Path) -> None:
    result = invoke("plan", coder_480b, "--fmt", "w4a16", "--group-size", 16, "--json")
    (no_index, *engines) = json.loads(result.stdout)["notices"]
    assert no_index.startswith("no model.safetensors.index.json")
    assert [notice.partition(" ")[0] for notice in engines] == ["vLLM", "SGLang"]


def test_rules_are_shown_by_class_of_modules(invoke: Invoke, coder_480b: Path) -> None:
    rules = ("--rule", "layers.[01].self_attn.*=skip", "--rule", "self_attn.*=int8-channel")
    start = time.process_time()
    result = invoke("plan", coder_480b, "--fmt", "w4a16", *rules, "--json")
    # As without rules, and a pass over 30,000 names for each.
    assert time.process_time() - start < 12.0
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    rows = [(row["name"], row["scheme"], row["modules"]) for row in values["classes"] if row["name"].endswith("q_proj")]
    name = "model.layers.*.self_attn.q_proj"
    assert rows == [(name, "BF16", 2), (name, "8-bit channel", 60)]
    assert {row["scheme"] for row in values["classes"] if "experts" in row["name"]} == {"4-bit g128"}
    assert [rule["match"] for rule in values["recipe"]["rules"]] == ["layers.[01].self_attn.*", "self_attn.*"]


def test_methods_are_shown_where_they_differ(invoke: Invoke, coder_480b: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: w4a16\nmethod: gptq\nrules: [{match: o_proj, grid: fp8-channel, method: rtn}]\n")
    values = json.loads(invoke("plan", coder_480b, "--recipe", recipe, "--rule", "v_proj=int4-g128", "--json").stdout)
    schemes = {row["name"].rpartition(".")[2]: row["scheme"] for row in values["classes"]}
    assert schemes["o_proj"] == "FP8 channel, rtn"
    assert schemes["v_proj"] == "4-bit g128, gptq"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("self_attn.*", "--rule: 'self_attn.*' is not PATTERN=SCHEME."),
        ("self_attn.*=int5", "rules.0.grid: 'int5' is no grid; write int4, int8, "),
        (
            "q_proj=int8",
            "rules: model.layers.0.self_attn.q_proj is to have 8 bits in groups of 128, but model.layers.0.",
        ),
        ("self.attn=int8", "rules: 'self.attn' matches no linear of the model."),
    ],
)
def test_a_rule_that_cannot_be_followed_is_wrong_usage(
    rule: str, message: str, invoke: Invoke, coder_480b: Path
) -> None:
    result = invoke("plan", coder_480b, "--fmt", "w4a16", "--rule", rule)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
