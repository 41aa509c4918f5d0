"""verify finds one flipped bit anywhere, and everything that checksums would not tell."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import INDEX_NAME
from qconv.errors import CheckpointError, VerificationError
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME
from qconv.formats.awq import unpack_words
from qconv.formats.packed import pack_rows
from qconv.verification.build import verify
from qconv.verification.checksums import build_files, parse_checksums, render_checksums
from qconv.verification.floors import snr_floor_db
from qconv.verification.outcome import Verification
from tests.conftest import BUNDLED, build, random_model, save_model, small_recipe

EXPERT = "model.layers.1.mlp.experts.2"


@pytest.fixture
def awq_copy(awq_build: Path, tmp_path: Path) -> Path:
    """An AWQ build to be damaged."""
    return Path(shutil.copytree(awq_build, tmp_path / "build"))


@pytest.fixture
def rtn_copy(rtn_build: Path, tmp_path: Path) -> Path:
    """A rounded build to be damaged."""
    return Path(shutil.copytree(rtn_build, tmp_path / "build"))


def reseal(folder: Path) -> None:
    """Make the checksums true again, as somebody would who meant the change."""
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in build_files(folder)}
    (folder / CHECKSUMS_NAME).write_text(render_checksums(sums))


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the shard that holds ``name``, and make index and checksums agree."""
    index = json.loads((folder / INDEX_NAME).read_text())
    shard = index["weight_map"][name]
    tensors = load_file(folder / shard)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / shard)
    others = {key: value for key, value in index["weight_map"].items() if value != shard}
    index["weight_map"] = others | dict.fromkeys(tensors, shard)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    reseal(folder)


def problems(folder: Path, against: Path | None = None) -> str:
    """What verify finds, as one text."""
    return "; ".join(verify(folder, against).problems)


def test_sound_builds_are_sound(moe: Path, rtn_build: Path, awq_build: Path) -> None:
    for folder in (rtn_build, awq_build):
        assert verify(folder).problems == []
        result = verify(folder, moe)
        assert result.problems == []
        assert result.notices == []
        assert len(result.snr_db) == 2 * (4 + 6 * 3)
        # 4 bits in groups of 32: about 20 dB by theory (6.02 a bit, less 4 for a gaussian's range).
        assert all(15 < value < 30 for value in result.snr_db.values())


def test_shapes_of_four_bytes_are_read(rtn_build: Path, moe: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(rtn_build, tmp_path / "out"))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [one for one in tensors if one.endswith(".weight_shape")]:
            tensors[name] = tensors[name].int()
        save_file(tensors, file, {"format": "pt"})
    for name in (CHECKSUMS_NAME, REPORT_NAME):
        (out / name).unlink()
    assert not verify(out, against=moe).problems


def test_a_flipped_bit_in_any_file_is_found(awq_copy: Path, moe: Path) -> None:
    chance = random.Random(0)
    names = [*build_files(awq_copy), CHECKSUMS_NAME]
    kinds = {"model-00001-of-00004.safetensors", "qconv-scales/layer-00000.safetensors", "config.json", INDEX_NAME}
    assert kinds | {"tokenizer.json", "qconv-report.json", "README.md", "chat_template.jinja"} <= set(names)
    for name in names:
        path = awq_copy / name
        sound = path.read_bytes()
        for position in (len(sound) - 1, *(chance.randrange(len(sound)) for _ in range(2))):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            found = problems(awq_copy)
            assert found, f"{name}: byte {position}"
            assert name == CHECKSUMS_NAME or name in found
        path.write_bytes(sound)
    assert verify(awq_copy, moe).problems == []


def test_no_damage_to_config_json_is_worse_than_a_problem(awq_copy: Path) -> None:
    # Whatever a flipped digit says (a group size that divides nothing, a billion layers), verify reports it.
    path = awq_copy / "config.json"
    sound = path.read_bytes()
    chance = random.Random(1)
    digits = [position for position, byte in enumerate(sound) if chr(byte) in "0123456789"]
    sizes = [sound.index(b": ", sound.index(key)) + 2 for key in (b'"hidden_size"', b'"group_size"', b'"head_dim"')]
    for position in (*sizes, *chance.sample(digits, 10)):
        damaged = bytearray(sound)
        damaged[position] = ord(chance.choice("123456789"))
        path.write_bytes(damaged)
        found = verify(awq_copy).problems
        assert bytes(damaged) == sound or any("config.json" in problem for problem in found)


def test_a_file_that_is_missing_or_was_added_is_named(awq_copy: Path) -> None:
    (awq_copy / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in problems(awq_copy)
    (awq_copy / "notes.txt").write_text("harmless")
    assert "notes.txt: not part of the build" in verify(awq_copy).notices
    shutil.copyfile(awq_copy / "model-00001-of-00004.safetensors", awq_copy / "other.safetensors")
    assert "other.safetensors: not listed" in problems(awq_copy)


def test_without_checksums_it_says_what_it_cannot_tell(awq_copy: Path) -> None:
    (awq_copy / CHECKSUMS_NAME).unlink()
    result = verify(awq_copy)
    assert result.problems == []
    assert any(CHECKSUMS_NAME in notice for notice in result.notices)


def test_another_models_weights_are_not_the_source(tmp_path: Path, rtn_build: Path, awq_build: Path) -> None:
    wrong = save_model(random_model("qwen3_moe", seed=1), tmp_path / "wrong")
    for folder in (rtn_build, awq_build):
        result = verify(folder, wrong)
        # Every linear and every plain tensor, not only the first.
        assert len(result.problems) > len(result.snr_db)
        assert all(value < 3 for value in result.snr_db.values())
        with pytest.raises(VerificationError, match="the build is bad") as caught:
            result.raise_if_bad(folder)
        assert caught.value.exit_code == 5


def test_another_architecture_is_said_to_be_one(rtn_build: Path, tmp_path: Path) -> None:
    assert "the source is another model" in problems(rtn_build, BUNDLED)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        verify(rtn_build, tmp_path)  # the source's damage is not the build's


def natural_order(tensors: dict[str, Tensor]) -> None:
    """One expert's AWQ words packed without AWQ's interleave: engines load that and compute garbage."""
    name = f"{EXPERT}.gate_proj.qweight"
    tensors[name] = pack_rows(unpack_words(tensors[name]), 4)


def swap_nibbles(tensors: dict[str, Tensor]) -> None:
    """Each byte's nibbles exchanged."""
    name = f"{EXPERT}.gate_proj.qweight"
    raw = tensors[name].view(torch.uint8)
    tensors[name] = ((raw << 4) | (raw >> 4)).view(torch.int32)


def swap_experts(tensors: dict[str, Tensor]) -> None:
    """Two experts exchanged."""
    for leaf in ("qweight", "qzeros", "scales"):
        one, other = f"{EXPERT}.gate_proj.{leaf}", f"model.layers.1.mlp.experts.3.gate_proj.{leaf}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def gate_and_up(tensors: dict[str, Tensor]) -> None:
    """gate and up exchanged: of one shape, so nothing else shows it."""
    for leaf in ("qweight", "qzeros", "scales"):
        one, other = f"{EXPERT}.gate_proj.{leaf}", f"{EXPERT}.up_proj.{leaf}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def zero_scale(tensors: dict[str, Tensor]) -> None:
    """One group's scale lost."""
    tensors[f"{EXPERT}.gate_proj.scales"][0, 3] = 0.0


def nan_scale(tensors: dict[str, Tensor]) -> None:
    """One group's scale damaged."""
    tensors[f"{EXPERT}.gate_proj.scales"][0, 3] = float("nan")


@pytest.mark.parametrize("damage", [natural_order, swap_nibbles, swap_experts, gate_and_up, zero_scale, nan_scale])
def test_wrong_weights_under_true_checksums_are_found(
    awq_copy: Path, moe: Path, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    edit(awq_copy, f"{EXPERT}.gate_proj.qweight", damage)
    assert f"{EXPERT}.gate_proj" in problems(awq_copy, moe)


@pytest.mark.parametrize("damage", [zero_scale, nan_scale])
def test_scales_that_are_no_scales_are_found_without_the_source(
    awq_copy: Path, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    edit(awq_copy, f"{EXPERT}.gate_proj.qweight", damage)
    assert f"{EXPERT}.gate_proj: a scale is not" in problems(awq_copy)


@pytest.mark.parametrize("leaf", ["gate_proj.qweight", "gate_proj.qzeros", "gate_proj.scales", "down_proj.qweight"])
def test_a_missing_tensor_is_named(awq_copy: Path, leaf: str) -> None:
    name = f"{EXPERT}.{leaf}"
    edit(awq_copy, name, lambda tensors: tensors.__delitem__(name))
    assert f"tensor {name} is missing" in problems(awq_copy)


def test_an_added_or_misshapen_tensor_is_named(awq_copy: Path) -> None:
    name = f"{EXPERT}.gate_proj.scales"
    edit(awq_copy, name, lambda tensors: tensors.update({"model.extra": torch.ones(1)}))
    assert "tensor model.extra is not part of the model" in problems(awq_copy)
    edit(awq_copy, name, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    assert f"tensor {name} is [1, 32], not [2, 32]" in problems(awq_copy)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate", "lm_head", f"{EXPERT}.gate_proj"])
def test_a_wrong_skip_list_is_found(rtn_copy: Path, name: str) -> None:
    config = json.loads((rtn_copy / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    if name in ignored:
        ignored.remove(name)
        expected = f"{name} is not quantized but is not on the skip list"
    else:
        ignored.append(name)
        expected = f"{name} is quantized but is on the skip list"
    (rtn_copy / "config.json").write_text(json.dumps(config))
    reseal(rtn_copy)
    assert expected in problems(rtn_copy)


def test_a_router_that_was_not_compensated_is_found(awq_copy: Path, moe: Path) -> None:
    source = Source.open(moe)
    scales = load_file(awq_copy / "qconv-scales/layer-00001.safetensors")
    router, norm = "model.layers.1.mlp.gate.weight", "model.layers.1.post_attention_layernorm"
    assert f"{norm}.scale" in scales, "otherwise nothing was folded and there is nothing to forget"
    edit(awq_copy, router, lambda tensors: tensors.update({router: source.read(router).clone()}))
    assert "model.layers.1.mlp.gate" in problems(awq_copy, moe)


def test_the_record_of_what_was_folded_counts(awq_copy: Path, moe: Path) -> None:
    path = awq_copy / "qconv-scales/layer-00001.safetensors"
    scales = load_file(path)
    for factor in (2.0, -1.0, 0.0, float("nan")):
        key = "model.layers.1.post_attention_layernorm.scale"
        save_file({**scales, key: scales[key] * factor}, path)
        reseal(awq_copy)
        try:
            found = problems(awq_copy, moe)
        except CheckpointError as error:
            found = error.message
        assert "layer" in found
    path.unlink()
    reseal(awq_copy)
    assert "model.layers.1.post_attention_layernorm" in problems(awq_copy, moe)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_unquantized_tensors_must_be_the_sources_bit_for_bit(rtn_copy: Path, moe: Path, name: str) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1).view(torch.int16)
        flat[7] ^= 1  # the last bit of one value

    edit(rtn_copy, name, nudge)
    assert name.removesuffix(".weight") in problems(rtn_copy, moe)


BROKEN_SUMS = ["", "x", "abc  config.json\n", "0" * 64 + " config.json\n", "\n"]


@pytest.mark.parametrize("text", BROKEN_SUMS)
def test_a_checksum_file_that_is_not_ours_is_a_problem(rtn_copy: Path, text: str) -> None:
    (rtn_copy / CHECKSUMS_NAME).write_text(text)
    assert problems(rtn_copy)


def test_checksums_are_sha256sums_format(rtn_build: Path) -> None:
    text = (rtn_build / CHECKSUMS_NAME).read_text()
    sums = parse_checksums(text)
    assert render_checksums(sums) == text
    assert set(sums) == set(build_files(rtn_build))
    assert all(hashlib.sha256((rtn_build / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())


def test_the_floor_is_below_any_sound_quantization_and_above_noise() -> None:
    for bits in (2, 3, 4, 8):
        # A uniform quantizer in groups: 6.02 dB a bit, about 4 less for a gaussian's range, a few for heavy tails.
        assert snr_floor_db(bits, compensated=False) < 6.02 * bits - 4 - 5
        # Unrelated tensors of one size are at -3 dB: the difference has the energy of both.
        assert -3 < snr_floor_db(bits, compensated=True) < 6.02 * bits - 12
    # What wrong order, wrong tensor or wrong scale leave is at most about 3 dB.
    assert snr_floor_db(4, compensated=False) > snr_floor_db(4, compensated=True) > 3


def test_a_floor_is_chosen_by_how_the_build_was_made(moe: Path, rtn_build: Path, tmp_path: Path) -> None:
    made = Build.open(rtn_build)
    assert made.method() == ("rtn",)
    shutil.copytree(rtn_build, tmp_path / "build")
    report = tmp_path / "build" / REPORT_NAME
    values = json.loads(report.read_text())
    values["recipe"]["method"] = ["awq", "gptq"]
    report.write_text(json.dumps(values))
    assert Build.open(tmp_path / "build").method() == ("awq", "gptq")
    for damage in ("{", "{}", "[]"):
        report.write_text(damage)
        with pytest.raises(CheckpointError, match=r"qconv-report\.json"):
            Build.open(tmp_path / "build").method()
        reseal(tmp_path / "build")
        assert "qconv-report.json" in problems(tmp_path / "build", moe)
    report.unlink()
    assert Build.open(tmp_path / "build").method() is None


def test_problems_are_counted() -> None:
    result = Verification(problems=[f"problem {number}" for number in range(5)])
    with pytest.raises(VerificationError, match=r"problem 0; problem 1; problem 2 \(and 2 more\)"):
        result.raise_if_bad(Path("x"))
    Verification().raise_if_bad(Path("x"))


def test_a_build_in_many_shards_verifies_and_is_read_by_the_library(tmp_path: Path) -> None:
    recipe: Any = small_recipe("rtn", "w4a16", grid={"group_size": 64}, output={"max_shard_size": 10**6})
    out = build(BUNDLED, tmp_path / "out", recipe).out
    shards = sorted(out.glob("*.safetensors"))
    layers = [set(load_file(shard)) for shard in shards]
    assert sum(any("layers.0." in name for name in names) for names in layers) > 1
    weight_map = json.loads((out / INDEX_NAME).read_text())["weight_map"]
    assert weight_map == {name: shard.name for shard, names in zip(shards, layers, strict=True) for name in names}
    assert verify(out, BUNDLED).problems == []
