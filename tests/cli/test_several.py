"""``--fmt`` and ``--recipe`` given more than once: folders, what an option means for each build, plans, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke
from tests.conftest import folder_bytes

TEXT = ("--tokens", 256, "--sequence-length", 64)
GROUPS = ("--group-size", 32)


def test_each_format_gets_a_folder_with_the_bytes_that_it_has_alone(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", tiny, "--fmt", "gptq", "--fmt", "gguf:Q4_0", *GROUPS, *TEXT, "-o", out)
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gguf-Q4_0", "gptq"]
    for text in (str(out / "gptq"), str(out / "gguf-Q4_0"), "least SNR", "peak memory", "time"):
        assert text in result.stdout
    assert "propagate: false" in result.stderr
    assert "gptq/embeddings" in result.stderr
    for fmt, options in (("gptq", GROUPS), ("gguf:Q4_0", ())):
        alone = tmp_path / fmt.replace(":", "-")
        invoke("quantize", tiny, "--fmt", fmt, *options, *TEXT, "--no-propagate", "-o", alone)
        assert folder_bytes(alone) == folder_bytes(out / alone.name)
        assert invoke("verify", out / alone.name, "--against", tiny).exit_code == 0
    again = json.loads(invoke(*command, "--json").stdout)
    assert [one["already_complete"] for one in again["builds"].values()] == [True, True]
    assert again["builds"]["gptq"]["path"] == str(out / "gptq")
    assert {"path", "seconds", "peak_memory_bytes"} < again.keys()


def test_a_recipe_file_gives_its_stem(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "coarse.yaml"
    recipe.write_text("format: w4a16\nmethod: rtn\ngrid: {group_size: 64}\n")
    out = tmp_path / "out"
    given = ("--fmt", "w4a16", "--recipe", recipe, "--method", "rtn")
    result = invoke("quantize", small, *given, "--group-size", 64, "--json", "-o", out)
    assert result.exit_code == 0, result.stdout
    assert sorted(json.loads(result.stdout)["builds"]) == ["coarse", "w4a16"]
    assert sorted(path.name for path in out.iterdir()) == ["coarse", "w4a16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fmt", "awq", "--fmt", "awq"), "awq is asked for twice"),
        (("--fmt", "awq", "--recipe", "awq"), "awq is asked for twice"),
        (("--fmt", "awq", "--recipe", "deep/awq.yaml"), "awq is asked for twice"),
        (("--fmt", "awq", "--fmt", "gguf:Q9"), "gguf:Q9 names no GGUF file type"),
        (("--fmt", "awq", "--fmt", "magic"), "no packaged recipe 'magic'"),
        (("--fmt", "awq", "--fmt", "gptq", "--propagate", "matched"), "--propagate matched: several builds"),
        (("--fmt", "awq", "--fmt", "gptq", "--tensor-type", "ffn=Q8_0"), "--tensor-type: has no meaning for any of"),
        (("--fmt", "gguf:Q8_0", "--fmt", "gguf:F16", "--group-size", "32"), "--group-size: has no meaning for any of"),
        (("--fmt", "fp8", "--fmt", "gguf:Q8_0", "--refine", "1"), "--refine: has no meaning for any of"),
        (("--fmt", "awq", "--recipe", "qwen3-coder-480b-gptq"), "calibration.tokens is 32768 for awq and 262144 for"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_what_does_not_go_together_is_said(
    command: str, invoke: Invoke, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    where = ("-o", tmp_path / "out") if command == "quantize" else ()
    result = invoke(command, tiny, *arguments, *where)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_option_counts_for_the_builds_that_know_it(invoke: Invoke, tiny: Path) -> None:
    options: tuple[Any, ...] = (*GROUPS, "--tensor-type", "ffn_down=Q8_0", "--refine", 2, "--no-propagate")
    result = invoke("plan", tiny, "--fmt", "w4a16", "--fmt", "gguf:Q4_0", *options, "--json")
    assert result.exit_code == 0, result.stdout
    values = json.loads(result.stdout)
    recipe = values["builds"]["w4a16"]["recipe"]
    assert (recipe["grid"]["group_size"], recipe["refine"]["sweeps"]) == (32, 2)
    assert recipe["calibration"]["propagate"] is False
    types = {one["name"]: one["type"] for one in values["builds"]["gguf-Q4_0"]["tensors"]}
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"


def test_a_plan_shows_each_build_and_what_they_share(invoke: Invoke, tiny: Path) -> None:
    formats = ("--fmt", "awq", "--fmt", "w4a16", "--fmt", "gguf:Q4_K_M")
    values = json.loads(invoke("plan", tiny, *formats, "--json").stdout)
    assert sorted(values["builds"]) == ["awq", "gguf-Q4_K_M", "w4a16"]
    assert values["output_bytes"] == sum(one["output_bytes"] for one in values["builds"].values())
    # Activations of 32,768 tokens and 256 channels, once: two bytes three times and four.
    assert values["modelled_scratch_bytes"] == 32768 * 256 * 10
    shown = invoke("plan", tiny, *formats).stdout
    for text in ("awq/", "w4a16/", "gguf-Q4_K_M/", "all together", "scratch disk 83.89 MB"):
        assert text in shown
    assert invoke("plan", tiny, "--fmt", "awq", "--fmt", "w4a16", "--tp", 3).exit_code == 1


def test_a_rule_counts_for_the_builds_whose_scheme_it_names(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    rules = {"w4a16": "self_attn.*=int8-channel", "gguf:Q4_0": "self_attn.*=Q8_0"}
    given = [option for rule in rules.values() for option in ("--rule", rule)]
    out = tmp_path / "out"
    command = ("--fmt", "w4a16", "--fmt", "gguf:Q4_0", "--rule", "layers.0.mlp.*=skip", *given, *TEXT)
    result = invoke("quantize", tiny, *command, "-o", out)
    assert result.exit_code == 0, result.stderr
    for fmt, rule in rules.items():
        alone = tmp_path / fmt.replace(":", "-")
        options = ("--fmt", fmt, "--rule", "layers.0.mlp.*=skip", "--rule", rule, *TEXT, "--no-propagate")
        invoke("quantize", tiny, *options, "-o", alone)
        assert folder_bytes(alone) == folder_bytes(out / alone.name)


def test_a_rule_that_no_build_knows_is_refused(invoke: Invoke, tiny: Path) -> None:
    result = invoke("plan", tiny, "--fmt", "w4a16", "--fmt", "gptq", "--rule", "o_proj=Q8_0")
    assert result.exit_code == 2
    assert "--rule: 'o_proj=Q8_0' has no meaning for any of w4a16, gptq" in " ".join(result.stderr.split())
