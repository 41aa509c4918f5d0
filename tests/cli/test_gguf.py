"""The commands on GGUF: ``--fmt gguf:TYPE``, ``inspect`` and ``verify`` of its files, and what does not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke


@pytest.fixture
def made(invoke: Invoke, tiny: Path, tmp_path: Path) -> Path:
    """A build in three files."""
    out = tmp_path / "out"
    result = invoke("quantize", tiny, "--fmt", "gguf:Q4_K_M", "--max-shard-size", "0.004", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert len(values["files"]) == 3
    # In 4 layers sensitive ones are 2 (the last eighth rounds to none, (i - 0) % 3 == 2) and 3 (3 >= 7 * 4 // 8).
    assert values["types"] == {"Q4_K": 25, "F32": 21, "Q6_K": 5}
    return out


def test_it_is_inspected_and_verified(invoke: Invoke, made: Path, tiny: Path) -> None:
    shown = invoke("inspect", made)
    assert shown.exit_code == 0
    assert "qwen3moe, tiny-coder-moe" in shown.stdout
    assert "51 tensors in 3 files" in shown.stdout
    values = json.loads(invoke("inspect", made, "--tensors", "--json").stdout)
    assert values["types"] == {"Q4_K": 25, "F32": 21, "Q6_K": 5}
    assert values["metadata"]["qwen3moe.expert_count"] == 16
    assert next(one for one in values["tensors"] if one["name"] == "blk.0.ffn_up_exps.weight")["shape"] == [
        16,
        256,
        256,
    ]
    for path in (made, next(made.glob("*1-of*"))):
        result = invoke("verify", path, "--against", tiny)
        assert result.exit_code == 0, result.stdout
        assert result.stdout.splitlines()[-1] == f"{path}: good"


def test_a_missing_split_is_named_by_both(invoke: Invoke, made: Path) -> None:
    missing = next(made.glob("*-00002-of-*"))
    missing.unlink()
    for command in ("inspect", "verify"):
        result = invoke(command, made)
        assert result.exit_code == 5
        assert missing.name in result.stdout + result.stderr


def test_an_unfinished_build_is_no_build(invoke: Invoke, made: Path) -> None:
    (made / "SHA256SUMS").unlink()
    (made / ".qconv").mkdir()
    (made / ".qconv" / "journal.jsonl").write_text("{}\n")
    for command in ("inspect", "verify"):
        result = invoke(command, made)
        assert result.exit_code == 5
        assert "unfinished build" in result.stderr


def test_the_plan_of_the_480b_is_the_size_that_its_users_know(invoke: Invoke, tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 6144,
        "num_hidden_layers": 62,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 160,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560,
        "intermediate_size": 8192,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000_000,
        "max_position_embeddings": 262144,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    # As llama.cpp's own program makes it: 270.1 GiB at 4.83 bits per weight.
    result = invoke("plan", tmp_path, "--fmt", "gguf:Q4_K_M")
    assert result.exit_code == 0, result.stderr
    assert "(270.1 GiB) as gguf:Q4_K_M, 4.83 bits per weight" in result.stdout
    values = json.loads(invoke("plan", tmp_path, "--fmt", "gguf:Q4_K_M", "--json").stdout)
    assert len(values["tensors"]) == 747


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fmt", "gguf:Q9_X"), "--fmt: gguf:Q9_X names no GGUF file type"),
        (("--fmt", "gguf"), "--fmt: gguf names no GGUF file type"),
        (("--fmt", "gguf:Q8_0", "--method", "rtn"), "--method: has no meaning with --fmt gguf:Q8_0"),
        (("--fmt", "gguf:Q8_0", "--no-propagate"), "--no-propagate: has no meaning"),
        (("--fmt", "gguf:IQ2_M"), "has no encoder in qconv"),
    ],
)
def test_what_does_not_go_together_is_said(
    invoke: Invoke, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("quantize", tiny, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_imatrix_is_for_gguf(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny / "config.json", tmp_path / "imatrix.gguf")
    result = invoke("quantize", tiny, "--fmt", "awq", "--imatrix", tmp_path / "imatrix.gguf", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--imatrix: is for --fmt gguf" in result.stderr
    result = invoke("quantize", tiny, "--fmt", "gguf:Q4_K", "--imatrix", tmp_path / "none", "-o", tmp_path / "out")
    assert result.exit_code == 2
