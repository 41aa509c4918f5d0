"""``qconv convert``: what it says, its JSON, and what is asked wrongly."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Invoke


def test_a_build_becomes_another_one(invoke: Invoke, build: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("convert", build, "--to", "gptq", "-o", out)
    assert result.exit_code == 0
    assert f"{out}: done, every weight the same number" in result.stdout
    assert "layout       w4a16 to gptq" in result.stdout
    assert invoke("verify", out, "--against", tiny).exit_code == 0
    again = invoke("convert", build, "--to", "gptq", "-o", out, "--json")
    values = json.loads(again.stdout)
    assert values["already_complete"] is True
    assert values["converted"]["from"] == "w4a16"
    card = (out / "README.md").read_text()
    assert "## Converted" in card
    assert card.splitlines()[1] == f"base_model: {tiny.name}"


def test_what_cannot_be_is_told_before_anything_is_written(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("convert", build, "--to", "fp8", "-o", out)
    assert result.exit_code == 2
    assert "208 linears would be other numbers there" in result.stderr
    assert "--requantize" in result.stderr
    assert not out.exists()
    assert invoke("convert", build, "--to", "fp8", "-o", out, "--requantize").exit_code == 0


def test_bad_requests(invoke: Invoke, build: Path, tiny: Path, tmp_path: Path) -> None:
    unknown = invoke("convert", build, "--to", "nothing", "-o", tmp_path / "a")
    assert unknown.exit_code == 2
    assert "sharded:SIZE" in unknown.stderr
    size = invoke("convert", build, "--to", "sharded:x", "-o", tmp_path / "a")
    assert size.exit_code == 2
    assert "--to sharded: 'x' is no size" in size.stderr
    assert invoke("convert", build, "--to", "awq", "-o", build / "inside").exit_code == 2
    assert invoke("convert", tmp_path / "none", "--to", "awq", "-o", tmp_path / "a").exit_code == 2
    dense = invoke("convert", tiny, "--to", "awq", "-o", tmp_path / "a")
    assert dense.exit_code != 0
    assert "unquantized" in dense.stderr
    assert not (tmp_path / "a").exists()


def test_rounding_to_sixteen_bits_is_told(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    assert "rounded once to bf16" in invoke("convert", build, "--to", "bf16", "-o", tmp_path / "a").stdout
    assert "every weight the same number" in invoke("convert", build, "--to", "f32", "-o", tmp_path / "b").stdout


def test_sizes_of_files(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert invoke("convert", build, "--to", "sharded:1MB", "-o", out).exit_code == 0
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > len(list(build.glob("model-*.safetensors")))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {file.name for file in shards} == set(index["weight_map"].values())


def test_of_gguf_the_size_of_files_can_be_changed(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert invoke("quantize", tiny, "--fmt", "gguf:Q4_0", "-o", whole).exit_code == 0
    refused = invoke("convert", whole, "--to", "fp8", "-o", parts)
    assert refused.exit_code == 2
    assert "--requantize" in refused.stderr
    assert not parts.exists()
    result = invoke("convert", whole, "--to", "sharded:2MB", "-o", parts)
    assert result.exit_code == 0
    assert len(list(parts.glob("*.gguf"))) > 1
    assert invoke("verify", parts, "--against", tiny).exit_code == 0
    assert invoke("check", parts, "--engine", "llamacpp").exit_code == 0


def test_gguf_becomes_a_checkpoint_with_what_it_is_like(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert invoke("quantize", tiny, "--fmt", "gguf:Q8_0", "-o", whole).exit_code == 0
    result = invoke("convert", whole, "--to", "compressed-tensors", "--like", tiny, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "every weight the same number" in result.stdout
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert invoke("verify", out).exit_code == 0
    back = invoke("convert", out, "--to", "gguf", "-o", tmp_path / "back")
    assert back.exit_code == 0, back.stderr
    assert invoke("verify", tmp_path / "back").exit_code == 0
    assert invoke("convert", whole, "--to", "bf16", "--like", tmp_path, "-o", tmp_path / "no").exit_code == 5
