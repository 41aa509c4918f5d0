"""GGUF builds by rules on the checkpoint's names: types and methods of single tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as T

from qconv.artifacts.source import Source
from qconv.errors import RecipeError
from qconv.folders.state import REPORT_NAME
from qconv.formats.gguf.imatrix import read_imatrix
from qconv.formats.gguf.names import gguf_tensors
from qconv.formats.gguf.reader import GgufModel
from qconv.planning.gguf_outline import outline
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.gguf import verify_gguf
from tests.building.test_gguf_layers import TEXT
from tests.building.test_gguf_pipeline import Stop, convert
from tests.conftest import folder_bytes, random_model, save_model

RULES: list[dict[str, Any]] = [
    {"match": "layers.0.self_attn.[qk]_proj", "grid": "Q5_0"},
    {"match": "self_attn.*", "grid": "q8_0", "method": "rtn"},
    {"match": "experts.*.down_proj", "grid": "IQ4_NL"},
    {"match": "layers.1.mlp.experts.*", "grid": "skip"},
    {"match": "lm_head", "grid": "Q6_K"},
]
# The rows of the small model are 64, 96 and 32 long: Q6_K's blocks of 256 become Q8_0's of 32.
TYPES = {
    "blk.0.attn_q.weight": T.Q5_0,
    "blk.0.attn_v.weight": T.Q8_0,
    "blk.1.attn_q.weight": T.Q8_0,
    "blk.0.ffn_down_exps.weight": T.IQ4_NL,
    "blk.1.ffn_down_exps.weight": T.IQ4_NL,
    "blk.0.ffn_up_exps.weight": T.Q4_0,
    "blk.1.ffn_up_exps.weight": T.BF16,
    "blk.1.ffn_gate_inp.weight": T.F32,
    "output.weight": T.Q8_0,
    "token_embd.weight": T.Q4_0,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


def opened(folder: Path) -> GgufModel:
    return GgufModel.open(next(folder.glob("*-00001-of-*.gguf")))


@pytest.fixture(scope="module")
def calibrated(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By rules and GPTQ, in several files."""
    keys = {"type": "Q4_0", "rules": RULES, "calibration": TEXT}
    return convert(sparse, tmp_path_factory.mktemp("rules") / "out", keys=keys).out


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_tensors_have_the_types_of_the_first_rule_that_fits(
    method: str, sparse: Path, calibrated: Path, tmp_path: Path
) -> None:
    keys = {"type": "Q4_0", "rules": RULES, "method": "rtn"}
    out = calibrated if method == "gptq" else convert(sparse, tmp_path / "out", keys=keys).out
    entries = opened(out).entries
    assert {name: entries[name].type for name in TYPES} == TYPES
    assert verify_gguf(out, sparse).problems == []
    recipe = parse_gguf_recipe({"type": "Q4_0", "rules": RULES})
    planned = {info.name: info.type for info in outline(sparse, recipe).tensors}
    assert {name: planned[name] for name in TYPES} == TYPES


def test_a_method_of_its_own_leaves_a_tensor_to_its_encoder(sparse: Path, calibrated: Path, tmp_path: Path) -> None:
    report = json.loads((calibrated / REPORT_NAME).read_text())
    records = {name for layer in report["layers"] for name in layer["compensations"]}
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qk"}
    assert {name for name in records if "self_attn" in name} == attention
    assert len(records) == 2 + 6 * 3 + 6  # layer 0's experts, and down of layer 1, which BF16 has no codes for
    # Rounded alone they are what an uncalibrated build has.
    alone = convert(sparse, tmp_path / "alone", keys={"type": "Q4_0", "rules": RULES, "method": "rtn"}).out
    ours, theirs = opened(calibrated), opened(alone)
    for name, same in (("blk.1.attn_q.weight", True), ("blk.0.attn_q.weight", False)):
        pairs = zip(ours.blocks(name), theirs.blocks(name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == same
    # The importance matrix is of all linears whose layers were looked at, whoever chose their codes.
    assert {"blk.0.attn_v.weight", "blk.1.attn_q.weight"} <= read_imatrix(calibrated / "imatrix.gguf").entries.keys()


def test_a_rule_alone_can_ask_for_calibration(sparse: Path, tmp_path: Path) -> None:
    rules = [{"match": "down_proj", "method": "gptq"}]
    keys = {"type": "Q8_0", "method": "rtn", "rules": rules, "calibration": TEXT}
    report = json.loads((convert(sparse, tmp_path / "out", keys=keys).out / REPORT_NAME).read_text())
    records = {name.rpartition(".")[2] for layer in report["layers"] for name in layer["compensations"]}
    assert records == {"down_proj"}


def test_scales_are_searched_and_folded_where_a_rule_asks_for_it(sparse: Path, tmp_path: Path) -> None:
    rules = [{"match": "experts.*", "method": "awq+gptq"}, {"match": "o_proj", "grid": "Q8_0", "method": "rtn"}]
    out = convert(sparse, tmp_path / "out", keys={"type": "Q4_0", "rules": rules, "calibration": TEXT}).out
    assert verify_gguf(out, sparse).problems == []
    report = json.loads((out / REPORT_NAME).read_text())
    assert all("alpha" in expert for layer in report["layers"] for expert in layer["experts"])
    model, tensors = opened(out), Source.open(sparse).checkpoint
    # What feeds q, k and v, which AWQ does not scale, stays as it is, and what feeds the experts does not.
    for name, source, folded in (
        ("attn_norm", "input_layernorm", False),
        ("ffn_norm", "post_attention_layernorm", True),
    ):
        norm = torch.cat(list(model.dequantized(f"blk.0.{name}.weight"))).flatten()
        assert torch.equal(norm, tensors.read(f"model.layers.0.{source}.weight").float()) != folded


def test_stopped_and_resumed_the_bytes_are_the_same(sparse: Path, calibrated: Path, tmp_path: Path) -> None:
    keys = {"type": "Q4_0", "rules": RULES, "calibration": TEXT}
    steps: list[str] = []
    convert(sparse, tmp_path / "whole", keys=keys, progress=lambda key, *_: steps.append(key))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(calibrated)
    for number, call in enumerate({steps.index(key) for key in dict.fromkeys(steps) if not key.startswith("blk")}):
        left = iter(range(call))

        def stop(key: str, *_: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stop(key)

        with pytest.raises(Stop):
            convert(sparse, tmp_path / str(number), keys=keys, progress=stop)
        assert folder_bytes(convert(sparse, tmp_path / str(number), keys=keys).out) == folder_bytes(calibrated)


FAULTS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"match": "experts.1.*", "grid": "Q8_0"}], "but GGUF has one tensor for them: blk.0.ffn_gate_exps.weight"),
    ([{"match": "experts.[0-4].up_proj", "method": "rtn"}], "one tensor for them: blk.0.ffn_up_exps.weight"),
    ([{"match": "mlp.gate", "grid": "Q8_0"}], "rules: 'mlp.gate' matches no weight of the model that a type can be"),
    ([{"match": "nothing", "grid": "Q8_0"}], "rules: 'nothing' matches no weight of the model"),
]


@pytest.mark.parametrize(("rules", "message"), FAULTS, ids=str)
def test_rules_that_cannot_be_followed(rules: list[dict[str, Any]], message: str, sparse: Path, tmp_path: Path) -> None:
    keys = {"type": "Q4_0", "rules": rules}
    for attempt in (
        lambda: outline(sparse, parse_gguf_recipe(keys)),
        lambda: convert(sparse, tmp_path / "out", keys=keys),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)) as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_needs_an_importance_is_not_left_alone(tmp_path: Path) -> None:
    wide = random_model("qwen3_moe", norm_topk_prob=True, hidden_size=256)
    model = save_model(wide, tmp_path / "model", max_shard_size="5MB")
    rules = [{"match": "gate_proj", "grid": "IQ2_XS", "method": "rtn"}]
    with pytest.raises(RecipeError, match=r"blk\.0\.ffn_gate_exps\.weight becomes IQ2_XS by its encoder alone"):
        convert(model, tmp_path / "out", keys={"type": "Q4_0", "rules": rules, "calibration": TEXT})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "a", "grid": "int8"}, "rules.0.grid: 'int8' is no type of a GGUF tensor"),
        ({"match": "a", "grid": "I8"}, "rules.0.grid: "),
        ({"match": "a", "method": "gp"}, "rules.0.method: gp is no method"),
        ({"match": "a"}, "rules.0: says neither grid nor method"),
        ({"match": "a", "grid": "skip", "method": "rtn"}, "skip and a method contradict each other"),
    ],
)
def test_a_rule_that_says_nothing_that_is_known(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_gguf_recipe({"type": "Q8_0", "rules": [rule]})


def test_tensor_types_go_before_rules(sparse: Path) -> None:
    recipe = parse_gguf_recipe(
        {"type": "Q4_0", "tensor_types": {"attn_q": "Q5_1"}, "rules": [{"match": "self_attn.*", "grid": "skip"}]}
    )
    tensors = {tensor.name: tensor for tensor in gguf_tensors(Source.open(sparse).architecture)}
    types = {dtype: recipe.override(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert {found(tensors["blk.0.attn_q.weight"]) for found in types.values()} == {T.Q5_1}
    assert [found(tensors["blk.0.attn_k.weight"]) for found in types.values()] == [T.BF16, T.F16, T.F32]
    assert recipe.override(torch.bfloat16)(tensors["blk.0.ffn_up_exps.weight"]) is None


def test_recipes_without_rules_have_the_digest_that_they_had() -> None:
    # Journals of runs that began before there were rules name these.
    assert parse_gguf_recipe({"type": "Q4_K_M"}).digest() == DIGEST
    assert parse_gguf_recipe({"type": "Q4_K_M", "rules": []}).digest() == DIGEST
    assert parse_gguf_recipe({"type": "Q4_K_M", "rules": [{"match": "a", "grid": "Q8_0"}]}).digest() != DIGEST


DIGEST = "dcd56c86899be5fc9b39b1db41208390181aefd886bd40418439cd5f02d8f43f"
