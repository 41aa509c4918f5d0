"""The commands on GGUF: ``--fmt gguf:TYPE``, ``inspect`` and ``verify`` of its files, and what does not go together."""

from __future__ import annotations

import json
import shutil
from collections import Counter
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
        (("--fmt", "gguf:Q8_0", "--no-propagate"), "--no-propagate: has no meaning"),
        (("--fmt", "gguf:Q8_0", "--refine", "2"), "--refine: has no meaning"),
        (("--fmt", "gguf:Q8_0", "--tensor-type", "ffn_down"), "--tensor-type: 'ffn_down' is not PATTERN=TYPE"),
        (("--fmt", "gguf:Q8_0", "--tensor-type", "attn_q=NVFP4"), "NVFP4 has no encoder in qconv"),
    ],
)
def test_what_does_not_go_together_is_said(
    invoke: Invoke, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("quantize", tiny, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--imatrix", None), ("--tensor-type", "ffn_down=Q6_K")])
def test_options_of_gguf_are_for_gguf(
    option: str, value: str | None, invoke: Invoke, tiny: Path, tmp_path: Path
) -> None:
    shutil.copyfile(tiny / "config.json", tmp_path / "imatrix.gguf")
    given = value or tmp_path / "imatrix.gguf"
    result = invoke("quantize", tiny, "--fmt", "awq", option, given, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{option}: is for --fmt gguf" in result.stderr


def test_a_file_that_is_no_imatrix_is_refused(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny / "config.json", tmp_path / "imatrix.gguf")
    arguments = ("--fmt", "gguf:Q4_0", "-o", tmp_path / "out")
    assert invoke("quantize", tiny, "--imatrix", tmp_path / "imatrix.gguf", *arguments).exit_code == 5
    assert invoke("quantize", tiny, "--imatrix", tmp_path / "none", *arguments).exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: gguf\ntype: Q9_X", "mine.yaml: type: 'Q9_X' is no GGUF file type"),
        ("format: gguf", "mine.yaml: type: "),
        ("format: gguf\ntype: Q8_0\nmethod: magic", "mine.yaml: method: magic is no method; known are rtn, awq"),
        ("format: gguf\ntype: Q8_0\ncalibration: {rooting: routed}", "calibration.rooting: unknown key"),
        ("format: gguf\ntype: Q8_0\ntensor_types: {'ffn_(': Q8_0}", "tensor_types: 'ffn_(' is no regular expression"),
        ("format: gguf\ntype: Q8_0\ntensor_types: {ffn: Q9_K}", "tensor_types: ffn: 'Q9_K' is no type"),
        ("format: gguf\ntype: Q8_0\ntensor_types: {dwon: Q6_K}", "tensor_types.dwon: fits no weight"),
        ("format: gguf\ntype: Q8_0\nimatrix: {shrinkage_tokens: -1}", "imatrix.shrinkage_tokens: "),
    ],
)
def test_a_bad_key_of_a_recipe_is_named(text: str, message: str, invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    for command in (("plan",), ("quantize", "-o", tmp_path / "out")):
        result = invoke(command[0], tiny, "--recipe", recipe, *command[1:])
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_options_replace_what_a_recipe_says(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("format: gguf\ntype: Q4_0\ncalibration: null\ntensor_types: {ffn_down: Q5_0, attn_v: q8_0}\n")
    arguments = ("--recipe", recipe, "--tokens", 512, "--seed", 3, "--tensor-type", "blk.0.ffn_down=Q6_K")
    out = tmp_path / "out"
    result = invoke("quantize", tiny, *arguments, "--max-shard-size", "0.5", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    used = json.loads((out / "qconv-report.json").read_text())["recipe"]
    given = {"corpus": "python-stdlib", "tokens": 512, "sequence_length": 512, "seed": 3}
    assert used["calibration"] == used["calibration"] | given
    assert used["calibration"]["propagate"] == "matched"
    assert list(used["tensor_types"].items()) == [("blk.0.ffn_down", "Q6_K"), ("ffn_down", "Q5_0"), ("attn_v", "Q8_0")]
    assert used["output"] == {"max_shard_size": 500_000_000}
    values = json.loads(result.stdout)
    assert values["types"]["Q5_0"] == 3
    assert values["method"] == "gptq"
    assert values["imatrix"]["coverage"]["experts"] == 64
    # A plan from config.json alone promises the same tensors.
    planned = json.loads(invoke("plan", tiny, *arguments, "--json").stdout)["tensors"]
    assert Counter(one["type"] for one in planned) == values["types"]


def test_the_packaged_recipe_is_planned_as_the_file_type_is(invoke: Invoke, tiny: Path) -> None:
    for name in ("--fmt", "--recipe"):
        result = invoke("plan", tiny, name, "qwen3-coder-480b-gguf-q4_k_m")
        assert result.exit_code == 0, result.stderr
        assert "as gguf:Q4_K_M" in result.stdout


def test_a_calibrated_build_says_so(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny, "--fmt", "gguf:Q4_0", "--tokens", 512, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "imatrix      28 of 28 weights in layers, kept as imatrix.gguf" in result.stdout
    assert "coverage     tokens per expert: least " in result.stdout
    assert "error        squared, in percent: " in result.stdout
    page = tmp_path / "page.html"
    for path in (tmp_path / "out", next((tmp_path / "out").glob("*Q4_0.gguf"))):
        assert invoke("inspect", path, "--html", page).exit_code == 0
        for told in ("Calibration tokens of every expert", "ffn_down_exps", "gguf:Q4_0", "gptq"):
            assert told in page.read_text()
    assert invoke("inspect", tmp_path / "out" / "imatrix.gguf", "--html", page).exit_code == 2


def test_an_imatrix_alone_is_collected_once(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    arguments = ("imatrix", tiny, "--tokens", 512, "-o", tmp_path / "out")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out/imatrix.gguf'}: done")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS",
        "imatrix.gguf",
        "qconv-report.json",
    ]
    values = json.loads(invoke(*arguments, "--json").stdout)
    assert values["already_complete"]
    assert values["coverage"]["covered"] == 28
    assert invoke("verify", tmp_path / "out").exit_code == 0
    other = invoke("imatrix", tiny, "--tokens", 1024, "-o", tmp_path / "out")
    assert other.exit_code == 5
    assert "calibration data changed" in other.stderr
    bad = invoke("imatrix", tiny, "--tokens", 500, "-o", tmp_path / "bad")
    assert bad.exit_code == 2
    assert "tokens 500 is not a multiple" in bad.stderr
    used = invoke("quantize", tiny, "--fmt", "gguf:Q4_0", "--imatrix", values["path"], "-o", tmp_path / "model")
    assert used.exit_code == 0, used.stderr
    shown = invoke("inspect", values["path"])
    assert "importance matrix" in shown.stdout


def test_rules_choose_types_by_the_checkpoints_names(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: gguf\ntype: Q4_K_M\nrules: [{match: '*', grid: Q5_0}]\n")
    rules = ("--rule", "self_attn.[qk]_proj=Q8_0", "--rule", "lm_head=skip", "--json")
    values = json.loads(invoke("plan", tiny, "--recipe", recipe, *rules).stdout)
    types = {one["name"]: one["type"] for one in values["tensors"]}
    assert (types["blk.0.attn_q.weight"], types["output.weight"], types["token_embd.weight"]) == (
        "Q8_0",
        "BF16",
        "Q5_0",
    )
    refused = invoke("plan", tiny, "--fmt", "gguf:Q4_K_M", "--rule", "experts.3.*=Q8_0")
    assert refused.exit_code == 2
    assert "one tensor for them" in refused.stderr
