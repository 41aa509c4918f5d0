"""Builds whose linears are on different grids: made, resumed, verified, run and read as any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.calibration.schemes import FittedScheme, IntegerScheme
from qconv.core.qtensor import Grid
from qconv.errors import StaleJournalError
from qconv.folders.journal import WORK_FOLDER
from qconv.folders.state import CHECKSUMS_NAME
from qconv.grids import e4m3, integers
from qconv.grids.elements import E4M3Grid
from qconv.planning.recipe import Recipe
from qconv.planning.rules import RuleGrid
from qconv.runtime.activations import InputRounding
from qconv.runtime.dense import write_dense
from qconv.runtime.files import open_files
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify
from tests.building.test_pipeline import Stop, calls_of, stop_at
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe
from tests.runtime.test_files import IDS, logits
from tests.verification.test_build import edit

ATTENTION_IN_INT8: list[dict[str, Any]] = [{"match": "self_attn.*", "grid": "int8-channel"}]
ATTENTION_IN_FP8: list[dict[str, Any]] = [{"match": "self_attn.*", "grid": "fp8-channel", "method": "gptq"}]
THREE: list[dict[str, Any]] = [
    {"match": "self_attn.o_proj", "grid": "int8-g32-asym", "method": "rtn"},
    {"match": "layers.0.self_attn.*", "grid": "fp8-channel", "method": "rtn"},
    {"match": "layers.1.mlp.experts.*", "method": "gptq"},
]
MIXTURES: dict[str, Recipe] = {
    "int4 and int8, rounded": small_recipe(rules=ATTENTION_IN_INT8),
    "int4 and int8, awq": small_recipe("awq", rules=ATTENTION_IN_INT8),
    "int4 and int8, gptq": small_recipe("gptq", rules=ATTENTION_IN_INT8),
    "int4 by awq, FP8 by gptq": small_recipe("awq", rules=ATTENTION_IN_FP8),
    "groups of 16 and 32, awq+gptq": small_recipe(
        "awq+gptq", rules=[{"match": "experts.*", "grid": "int4-g16"}, {"match": "o_proj", "grid": "int4-g16"}]
    ),
    "three grids and methods, matched": small_recipe(
        "gptq", rules=THREE, refine={"sweeps": 1, "refits": 1}, calibration={"propagate": "matched"}
    ),
    "floats first": small_recipe(
        output_format="fp8_dynamic",
        grid={"bits": 8, "group_size": -1},
        rules=[{"match": "experts.*", "grid": "int4-g32", "method": "awq"}],
    ),
}
LINEARS = 2 * (4 + 6 * 3)


@pytest.fixture(scope="module")
def mixtures(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each of :data:`MIXTURES`, made once; do not write to it."""
    folder, made = tmp_path_factory.mktemp("mixtures"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = build(moe, folder / str(len(made)), MIXTURES[name]).out
        return made[name]

    return get


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, mixtures: Callable[[str], Path]) -> Path:
    """One of them after the other."""
    return mixtures(request.param)


def test_every_linear_is_on_its_grid_and_verifies(mixture: Path, moe: Path, request: pytest.FixtureRequest) -> None:
    recipe = MIXTURES[request.node.callspec.params["mixture"]]
    opened = Build.open(mixture)
    grids = {linear.name: opened.grid_of(linear) for layer in opened.architecture.layers for linear in layer.linears()}
    assert len(grids) == LINEARS
    assert len(set(grids.values())) >= 2
    for name, grid in grids.items():
        rule = recipe.rule(name)
        wanted = rule.grid.over(recipe.grid) if rule and isinstance(rule.grid, RuleGrid) else recipe.grid
        assert (grid.bits, grid.group_size) == (wanted.bits, wanted.group_size), name
    for against in (None, moe):
        result = verify(mixture, against)
        assert (result.problems, result.notices, result.not_checked) == ([], [], [])
    assert len(result.snr_db) == LINEARS
    report = json.loads((mixture / "qconv-report.json").read_text())
    assert sum(one["linears"] for one in report["schemes"]) == LINEARS
    compensated = {name for layer in report["layers"] for name in layer["compensations"]}
    methods = {name: rule.method if (rule := recipe.rule(name)) and rule.method else recipe.method for name in grids}
    assert compensated == {name for name, method in methods.items() if "gptq" in method}
    assert [opened.compensated()(name) for name in grids] == [name in compensated for name in grids]
    card = (mixture / "README.md").read_text()
    assert all(one["scheme"] in card for one in report["schemes"])


def test_logits_are_those_of_the_dequantized_weights(mixture: Path, tmp_path: Path) -> None:
    write_dense(mixture, tmp_path / "dense", torch.float32)
    ours, exact = logits(mixture), logits(tmp_path / "dense")
    assert float((ours - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    streamed = next(iter(stream_logits(mixture, [IDS], dtype="float32")))
    assert float((streamed - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_bits_are_counted_by_each_linears_own(mixture: Path) -> None:
    found = {one.name.rpartition(".")[2]: one for one in inspect(mixture).classes}
    assert found["q_proj"].weights == 2 * 96 * 64
    assert found["o_proj"].weights == 2 * 64 * 96
    assert found["up_proj"].weights == 2 * 6 * 32 * 64


@pytest.mark.parametrize("name", ["int4 and int8, gptq", "three grids and methods, matched"])
def test_stopped_in_every_unit_and_resumed_the_bytes_are_the_same(
    name: str, moe: Path, mixtures: Callable[[str], Path], tmp_path: Path
) -> None:
    expected, recipe = folder_bytes(mixtures(name)), MIXTURES[name]
    keys = calls_of(moe, tmp_path / "whole", recipe)
    assert folder_bytes(tmp_path / "whole") == expected
    for number, call in enumerate(keys.index(key) for key in dict.fromkeys(keys)):
        out = tmp_path / str(number)
        with pytest.raises(Stop):
            build(moe, out, recipe, progress=stop_at(call))
        assert not (out / CHECKSUMS_NAME).exists()
        assert not build(moe, out, recipe).already_complete
        assert folder_bytes(out) == expected, f"stopped at call {call}, {keys[call]}"


def test_a_run_goes_on_with_its_own_rules_alone(moe: Path, tmp_path: Path) -> None:
    recipe = MIXTURES["int4 and int8, rounded"]
    with pytest.raises(Stop):
        build(moe, tmp_path / "out", recipe, progress=stop_at(calls_of(moe, tmp_path / "whole", recipe).index("head")))
    assert (tmp_path / "out" / WORK_FOLDER).exists()
    with pytest.raises(StaleJournalError, match="recipe"):
        build(moe, tmp_path / "out", small_recipe())


DAMAGED = {
    "int8": ("model.layers.0.self_attn.v_proj", "weight_packed"),
    "int4": ("model.layers.1.mlp.experts.2.up_proj", "weight_packed"),
    "FP8": ("model.layers.0.self_attn.v_proj", "weight"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_tensor_of_each_group_is_found(
    kind: str, moe: Path, mixtures: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "int4 by awq, FP8 by gptq" if kind == "FP8" else "int4 and int8, gptq"
    folder = Path(shutil.copytree(mixtures(name), tmp_path / "build"))
    module, leaf = DAMAGED[kind]

    def shift(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"{module}.{leaf}"]
        tensors[f"{module}.{leaf}"] = tensor.view(torch.uint8).roll(1, 0).view(tensor.dtype)

    edit(folder, f"{module}.{leaf}", shift)
    problems = verify(folder, moe).problems
    assert problems, "a shifted tensor went unnoticed"
    assert all(module in problem for problem in problems)


def test_inputs_are_rounded_where_weights_are_floats(mixtures: Callable[[str], Path]) -> None:
    files = open_files(mixtures("int4 by awq, FP8 by gptq"))
    for layer in files.architecture.layers:
        assert all(files.input_rounding(linear) == InputRounding() for linear in layer.attention.linears())
        assert all(files.input_rounding(linear) is None for mlp in layer.mlps() for linear in mlp.linears())
    files = open_files(mixtures("int4 and int8, gptq"))
    assert not any(files.input_rounding(one) for layer in files.architecture.layers for one in layer.linears())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_readers_of_one_input_may_have_other_groups_and_methods(method: str, tmp_path: Path) -> None:
    model = save_model(random_model("qwen2_moe"), tmp_path / "model")
    rules = [
        {"match": "shared_expert.*", "grid": "int8-g16", "method": "awq"},
        {"match": "self_attn.v_proj", "method": "awq"},
        {"match": "self_attn.[qk]_proj", "method": "rtn"},
        {"match": "layers.1.mlp.experts.*", "grid": "fp8-channel", "method": "rtn"},
    ]
    out = build(model, tmp_path / "out", small_recipe(method, rules=rules)).out
    result = verify(out, model)
    assert result.problems == []
    shared = [result.snr_db[f"model.layers.{layer}.mlp.shared_expert.{name}_proj"] for layer in (0, 1) for name in MLP]
    assert min(shared) > 40.0  # eight bits in small groups; second moments of another width would not go unnoticed


MLP = ("gate", "up", "down")


def test_rounding_by_a_rule_is_the_grids_own(moe: Path, mixtures: Callable[[str], Path]) -> None:
    source, opened = Source.open(moe), Build.open(mixtures("three grids and methods, matched"))
    for layer in opened.architecture.layers:
        # o in int8, and in layer 0 q, k and v in FP8.
        for linear in layer.attention.linears() if layer.index == 0 else (layer.heads.o,):
            found = opened.qtensor(linear)
            quantize = e4m3.quantize if found.grid.is_float else integers.quantize
            expected = quantize(source.read(linear.weight), found.grid)
            assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(found.scales, expected.scales)


def test_a_rule_that_rounds_with_a_search_searches_as_rounding_does() -> None:
    recipe = small_recipe("gptq", clip={"enabled": True, "steps": 20})
    grid = Grid(4, 32, symmetric=True, scale_dtype=torch.bfloat16)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rounded = IntegerScheme(grid, recipe, ("rtn",))
    expected = integers.quantize(weight, grid, recipe.clip)
    assert torch.equal(rounded.round(weight).dequantize(), expected.dequantize())
    assert not torch.equal(expected.dequantize(), integers.quantize(weight, grid).dequantize())
    assert rounded.gram_width(64) == 0
    assert IntegerScheme(grid, recipe, ("awq",)).gram_width(64) == 32


def test_rounding_on_a_fitted_grid_does_not_look_at_inputs() -> None:
    grid = Grid(8, -1, True, torch.bfloat16, "e4m3", 1, activations="dynamic")
    weight, gram = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.rand(64, 1, 1) + 0.5
    rounded, searched = (FittedScheme(E4M3Grid(grid), method) for method in (("rtn",), ("gptq",)))
    assert rounded.clipped(weight, gram) is None
    assert searched.clipped(weight, gram) is not None


def test_one_grid_by_rules_is_the_build_without_them(moe: Path, rtn_build: Path, tmp_path: Path) -> None:
    recipe = small_recipe(grid={"bits": 8, "group_size": 64}, rules=[{"match": "*", "grid": "int4-g32"}])
    out = build(moe, tmp_path / "out", recipe).out
    for name in ("config.json", *(shard.name for shard in rtn_build.glob("*.safetensors"))):
        assert (out / name).read_bytes() == (rtn_build / name).read_bytes()


def test_whole_numbers_beside_words_are_read(mixtures: Callable[[str], Path], moe: Path, tmp_path: Path) -> None:
    """As llm-compressor writes W8A8 attention beside W4A16 experts: two layouts in one file."""
    made = mixtures("int4 and int8, gptq")
    tensors: dict[str, Tensor] = {}
    for shard in made.glob("*.safetensors"):
        tensors |= load_file(shard)
    opened = Build.open(made)
    for layer in opened.architecture.layers:
        for linear in layer.attention.linears():
            codes = opened.qtensor(linear).codes
            del tensors[f"{linear.name}.weight_packed"], tensors[f"{linear.name}.weight_shape"]
            tensors[linear.weight] = (codes.to(torch.int16) - 128).to(torch.int8)
    config = json.loads((made / "config.json").read_text())
    section = config["quantization_config"]
    section["format"] = "mixed-precision"
    groups = list(section["config_groups"].values())
    (eight,) = (group for group in groups if group["weights"]["num_bits"] == 8)
    eight["format"] = "int-quantized"
    eight["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(moe / name, tmp_path / name)
    assert inspect(tmp_path).format == "mixed_precision"
    assert torch.equal(logits(tmp_path), logits(made))
    result = verify(tmp_path, moe)
    assert (result.problems, result.not_checked) == ([], [])
    assert len(result.snr_db) == LINEARS
