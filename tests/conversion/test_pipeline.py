"""``qconv convert``: the same numbers in every layout, the same bytes there and back, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.building.output import Outcome
from qconv.checkpoint.stream import same_bits
from qconv.conversion.pipeline import Wanted, convert
from qconv.errors import CheckpointError, RecipeError, StaleJournalError, UsageError
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}
BUILDS = {
    "awq": ("awq", {"grid": {"group_size": 32}}),
    "gptq": ("gptq", {"grid": {"group_size": 32}}),
    "asym": ("gptq", {"grid": {"group_size": 32, "symmetric": False}}),
    "w4a16": ("w4a16", {"grid": {"group_size": 32}}),
    "int8": ("w4a16", {"grid": {"bits": 8, "group_size": 32}}),
    "fp8": ("fp8", {"grid": {"bits": 8, "group_size": 128}}),
    "blocks": ("fp8_dynamic", {"grid": {"bits": 8, "group_size": 128}}),
    "nvfp4": ("nvfp4", {"grid": {"group_size": 16}}),
    "nvfp4-w4a4": ("nvfp4_w4a4", {"grid": {"group_size": 16}}),
    "nvfp4-modelopt": ("nvfp4_modelopt", {"grid": {"group_size": 16}}),
    "mxfp4": ("mxfp4", {"grid": {"group_size": 32}}),
    "mxfp8": ("mxfp8", {"grid": {"bits": 8, "group_size": 32}}),
    "w4a8": ("w4a8", {"grid": {"group_size": 128}}),
    "static": ("fp8_static", {"grid": {"bits": 8, "group_size": -1}}),
    "w8a8": ("w8a8", {"grid": {"bits": 8, "group_size": -1}}),
}
PAIRS = [
    ("awq", "w4a16"),
    ("awq", "gptq"),
    ("gptq", "awq"),
    ("gptq", "w4a16"),
    ("asym", "w4a16"),
    ("asym", "awq"),
    ("w4a16", "awq"),
    ("w4a16", "gptq"),
    ("int8", "gptq"),
    ("fp8", "fp8-dynamic"),
    ("blocks", "fp8"),
    ("awq", "compressed-tensors"),
    ("fp8", "compressed-tensors"),
    ("w8a8", "compressed-tensors"),
    ("mxfp4", "compressed-tensors"),
    ("mxfp8", "compressed-tensors"),
    ("nvfp4-w4a4", "nvfp4-modelopt"),
    ("nvfp4-modelopt", "nvfp4-w4a4"),
    ("nvfp4-modelopt", "compressed-tensors"),
    ("w4a8", "compressed-tensors"),
    ("static", "compressed-tensors"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def builds(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("builds")
    for name, (output_format, changes) in BUILDS.items():
        method = "awq" if name == "awq" else "rtn"
        build(source, folder / name, small_recipe(method, output_format, **changes))
    return {name: folder / name for name in BUILDS}


def converted(path: Path, out: Path, layout: str | None, **options: object) -> Outcome:
    """Without progress and log."""
    size = options.pop("size", None)
    assert size is None or isinstance(size, int)
    said = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    return convert(path, out, Wanted(layout, size), **said)  # type: ignore[arg-type]


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight, code times scale."""
    opened = Build.open(folder)
    return {
        linear.name: opened.qtensor(linear).dequantize()
        for layer in opened.architecture.layers
        for linear in layer.linears()
        if opened.is_quantized(linear)
    }


@pytest.mark.parametrize(("name", "layout"), [("nvfp4-w4a4", "nvfp4-modelopt"), ("nvfp4-modelopt", "nvfp4-w4a4")])
def test_nvfp4_there_and_back_is_the_same_but_for_a_reciprocals_rounding(
    name: str, layout: str, builds: dict[str, Path], tmp_path: Path
) -> None:
    """One layout divides by the scale of inputs, and the other multiplies: float32 has no exact inverse of each."""
    converted(builds[name], tmp_path / "there", layout)
    converted(tmp_path / "there", tmp_path / "back", name)
    before, after = (Build.open(one).checkpoint for one in (builds[name], tmp_path / "back"))
    assert before.entries.keys() == after.entries.keys()
    for key in before.entries:
        ours, theirs = before.read(key), after.read(key)
        if key.endswith(("input_scale", "input_global_scale")):
            assert torch.allclose(ours, theirs, rtol=2.0**-23, atol=0.0), key
        else:
            assert same_bits(ours, theirs), key


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=[f"{one}-{other}" for one, other in PAIRS])
def test_every_number_is_kept(name: str, layout: str, builds: dict[str, Path], source: Path, tmp_path: Path) -> None:
    outcome = converted(builds[name], tmp_path / "out", layout)
    before, after = numbers(builds[name]), numbers(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert outcome.report["converted"]["rounded_again"] == {}
    assert not verify(tmp_path / "out", None).problems
    against = verify(tmp_path / "out", source)  # folded scales, method and compensation came along
    assert not against.problems
    assert against.snr_db == pytest.approx(verify(builds[name], source).snr_db)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gptq", "w4a16"),
        ("asym", "awq"),
        ("w4a16", "gptq"),
        ("fp8", "fp8-dynamic"),
        ("awq", "gptq"),
    ],
)
def test_there_and_back_gives_the_same_shards(name: str, layout: str, builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds[name], tmp_path / "there", layout)
    converted(tmp_path / "there", tmp_path / "back", BUILDS[name][0].replace("_", "-"))
    before, after = folder_bytes(builds[name]), folder_bytes(tmp_path / "back")
    shards = [file for file in before if file.endswith(".safetensors")]
    assert shards
    assert {file: before[file] for file in shards} == {file: after.get(file) for file in shards}
    sections = [json.loads(one["config.json"])["quantization_config"] for one in (before, after)]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_plain_weights_are_the_numbers_cast_once(
    name: str, layout: str, dtype: torch.dtype, builds: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    converted(builds[name], out, layout)
    opened = Source.open(out)
    assert "quantization_config" not in opened.checkpoint.config
    for linear, value in numbers(builds[name]).items():
        assert torch.equal(opened.read(f"{linear}.weight"), value.to(dtype)), linear


def test_plain_weights_load_in_transformers_and_give_the_same_logits(builds: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qconv.runtime.loading import load

    converted(builds["awq"], tmp_path / "out", "f32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        theirs = model(tokens).logits
        packed = load(builds["awq"], dtype=torch.float32)(tokens)
        ours = packed.logits if hasattr(packed, "logits") else packed
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_files_of_another_size_hold_the_same_tensors(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["w4a16"], tmp_path / "small", None, size=10**6)
    files = list((tmp_path / "small").glob("model-*.safetensors"))
    assert len(files) >= len(list(builds["w4a16"].glob("model-*.safetensors")))
    assert all(torch.equal(one, numbers(tmp_path / "small")[key]) for key, one in numbers(builds["w4a16"]).items())
    assert not verify(tmp_path / "small", None).problems


@pytest.mark.parametrize(("name", "layout"), [("w4a16", "fp8"), ("int8", "awq"), ("fp8", "awq"), ("nvfp4", "w4a16")])
def test_nothing_is_done_where_numbers_would_differ(
    name: str, layout: str, builds: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"linears would be other numbers there: model\.layers\.0") as caught:
        converted(builds[name], tmp_path / "out", layout)
    assert "--requantize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    outcome = converted(builds[name], tmp_path / "out", layout, requantize=True)
    assert len(outcome.report["converted"]["rounded_again"]) == len(numbers(builds[name]))
    assert not verify(tmp_path / "out", None).problems


@pytest.mark.parametrize(("name", "layout"), [("nvfp4", "mxfp4"), ("mxfp4", "nvfp4"), ("fp8", "mxfp8")])
def test_one_format_of_a_library_is_not_taken_for_another(
    name: str, layout: str, builds: dict[str, Path], tmp_path: Path
) -> None:
    """compressed-tensors holds both, so that the numbers would fit; the build would be what it was, misnamed."""
    with pytest.raises(UsageError, match="what format"):
        converted(builds[name], tmp_path / "out", layout)
    outcome = converted(builds[name], tmp_path / "out", layout, requantize=True)
    assert Build.open(outcome.out).format.name == outcome.report["format"] == layout


def test_compressed_tensors_layout_is_the_one_of_the_grid(builds: dict[str, Path], tmp_path: Path) -> None:
    for name, wanted in (("w8a8", "w8a8"), ("mxfp4", "mxfp4"), ("fp8", "fp8_dynamic"), ("asym", "w4a16")):
        assert converted(builds[name], tmp_path / name, "compressed-tensors").report["format"] == wanted


def test_gguf_is_told_from_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError):
        converted(tmp_path / "model.gguf", tmp_path / "out", "awq")


def test_stored_scales_of_inputs_cannot_be_made_up(builds: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only calibration finds"):
        converted(builds["w4a16"], tmp_path / "out", "fp8-static", requantize=True)


def test_a_second_run_has_nothing_to_do_and_another_build_is_stale(builds: dict[str, Path], tmp_path: Path) -> None:
    converted(builds["gptq"], tmp_path / "out", "awq")
    before = folder_bytes(tmp_path / "out")
    assert converted(builds["gptq"], tmp_path / "out", "awq").already_complete
    assert folder_bytes(tmp_path / "out") == before
    with pytest.raises(StaleJournalError):
        converted(builds["asym"], tmp_path / "out", "awq")
    with pytest.raises(StaleJournalError):
        converted(builds["gptq"], tmp_path / "out", "w4a16")


def test_scales_of_a_cache_come_along_or_are_refused(source: Path, tmp_path: Path) -> None:
    recipe = small_recipe("rtn", "w4a16", kv_cache="fp8")
    build(source, tmp_path / "cached", recipe)
    assert Build.open(tmp_path / "cached").described.cache
    again = converted(tmp_path / "cached", tmp_path / "again", None, size=10**6)
    assert again.report["converted"]["rounded_again"] == {}
    name = "model.layers.1.self_attn.k_scale"
    assert torch.equal(
        Build.open(tmp_path / "again").checkpoint.read(name), Build.open(tmp_path / "cached").checkpoint.read(name)
    )
    assert not verify(tmp_path / "again", source).problems
    with pytest.raises(UsageError, match="no place for the stored scales of the cache"):
        converted(tmp_path / "cached", tmp_path / "awq", "awq")
    told: list[str] = []
    converted(tmp_path / "cached", tmp_path / "plain", "bf16", log=told.append)
    assert any("scales of the cache are left out" in one for one in told)


def test_what_is_no_build_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no quantization_config"):
        converted(source, tmp_path / "out", "awq")


def test_mixtures_go_where_mixtures_are_held(source: Path, tmp_path: Path) -> None:
    rules = [{"match": "self_attn.*", "grid": "int8-g32"}]
    build(source, tmp_path / "mixed", small_recipe("rtn", "w4a16", rules=rules))
    with pytest.raises((RecipeError, UsageError)):
        converted(tmp_path / "mixed", tmp_path / "awq", "awq")
    converted(tmp_path / "mixed", tmp_path / "again", None, size=2 * 10**6)
    before, after = numbers(tmp_path / "mixed"), numbers(tmp_path / "again")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_build_that_lacks_a_tensor_or_has_another_shape_is_refused_before_anything_is_written(
    builds: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(builds["gptq"], broken)
    config = json.loads((broken / "config.json").read_text())
    for key, change in (("vocab_size", 1), ("num_hidden_layers", 1), ("vocab_size", -1)):
        (broken / "config.json").write_text(json.dumps(config | {key: config[key] + change}))
        with pytest.raises(CheckpointError, match=f"{broken}: tensor"):
            converted(broken, tmp_path / "out", "w4a16")
        assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_refused_before_anything_is_written(
    builds: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(builds["w4a16"], tmp_path / "huge")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    for shard in (tmp_path / "huge").glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file(tensors | {name: torch.full_like(tensors[name], 1e5)}, shard, {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights are beyond float16's 65,504, the first model\.layers\.1"):
        converted(tmp_path / "huge", tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()
