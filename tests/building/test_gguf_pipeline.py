"""GGUF builds end to end: what is written stands for the source, survives any stop, and is never mixed up."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.building import gguf_pipeline
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.output import Outcome
from qconv.core.qtensor import SquaredError
from qconv.core.settings import OutputSettings, TextSettings
from qconv.errors import CheckpointError, OutputError, RecipeError, StaleJournalError, UsageError
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME
from qconv.formats.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qconv.formats.gguf.reader import GgufModel
from qconv.grids.ggml import GgmlType, encode
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.blocks import decoded, floor_db
from qconv.verification.gguf import verify_gguf
from tests.conftest import BUNDLED, folder_bytes, random_model, save_model

SPLIT = 60_000  # bytes: a handful of files for the random checkpoints
FILE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K", "IQ4_XS", "MXFP4_MOE")


class Stop(Exception):
    """The plug is pulled."""


def convert(
    model: Path,
    out: Path,
    file_type: str = "Q4_0",
    keys: dict[str, Any] | None = None,
    split: int = SPLIT,
    **options: Any,
) -> Outcome:
    """Write GGUF without progress and log; ``keys`` are those of the recipe besides the type."""
    values: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    recipe = parse_gguf_recipe({"type": file_type, **(keys or {})})
    # Smaller than a recipe may say, so that small models have several files.
    recipe = recipe.model_copy(update={"output": OutputSettings.model_construct(max_shard_size=split)})
    return quantize_gguf(model, out, recipe, **values | options)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module")
def made(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in several files."""
    return convert(sparse, tmp_path_factory.mktemp("gguf") / "out").out


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_of_the_bundled_model_verifies(file_type: str, tmp_path: Path) -> None:
    report = convert(BUNDLED, tmp_path / "out", file_type, split=10**9).report
    result = verify_gguf(tmp_path / "out", BUNDLED)
    assert result.problems == []
    assert report["files"] == [f"tiny-coder-moe-{file_type}.gguf"]
    base = {"MXFP4_MOE": "MXFP4", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K"}.get(file_type, file_type)
    assert any(one["type"] == base for one in report["tensors"].values())
    # Read again as a whole, each tensor has what the sampled rows promised, within what a few rows can tell.
    for name, one in report["tensors"].items():
        if one["snr_db"] is not None and one["snr_db"] < 60 and name in result.snr_db:
            assert result.snr_db[name] == pytest.approx(one["snr_db"], abs=2.0)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "qwen3", "llama"])
def test_other_families_verify(model_type: str, tmp_path: Path) -> None:
    changes = {"head_dim": 16} if model_type == "qwen2_moe" else {}
    model = save_model(random_model(model_type, **changes), tmp_path / "model")
    convert(model, tmp_path / "out", "Q8_0")
    assert verify_gguf(tmp_path / "out", model).problems == []


def test_bytes_do_not_depend_on_threads_and_a_finished_build_is_left_alone(
    sparse: Path, made: Path, tmp_path: Path
) -> None:
    for threads in (1, 3):
        assert folder_bytes(convert(sparse, tmp_path / str(threads), threads=threads).out) == folder_bytes(made)
    again = convert(sparse, tmp_path / "1")
    assert again.already_complete
    assert folder_bytes(tmp_path / "1") == folder_bytes(made)


def test_stopped_in_every_file_and_resumed_the_bytes_are_the_same(sparse: Path, made: Path, tmp_path: Path) -> None:
    keys: list[str] = []
    convert(sparse, tmp_path / "whole", progress=lambda key, *_: keys.append(key))
    starts = [index for index, key in enumerate(keys) if key.endswith(".gguf")]
    assert len(starts) > 3
    for number, start in enumerate(starts):
        out, calls = tmp_path / str(number), iter(range(start + 1))

        def stop(key: str, *_: int, calls: Iterator[int] = calls) -> None:
            """Pull the plug after the file's first block."""
            if next(calls, None) is None:
                raise Stop(key)

        with pytest.raises(Stop):
            convert(sparse, out, progress=stop)
        assert not (out / CHECKSUMS_NAME).exists()
        assert not list(out.glob("*.partial"))
        assert len(list(out.glob("*.gguf"))) == number
        assert not convert(sparse, out).already_complete
        assert folder_bytes(out) == folder_bytes(made)


def test_other_inputs_are_refused_and_named(sparse: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    with pytest.raises(StaleJournalError, match="recipe changed"):
        convert(sparse, tmp_path / "out", "Q8_0")
    assert folder_bytes(tmp_path / "out") == folder_bytes(made)
    convert(sparse, tmp_path / "out", "Q8_0", restart=True)
    assert verify_gguf(tmp_path / "out", sparse).problems == []


def test_a_foreign_folder_is_never_overwritten(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(OutputError):
            convert(sparse, tmp_path, restart=restart)
    assert folder_bytes(tmp_path) == {"thesis.txt": b"precious"}


def test_one_flipped_bit_and_a_missing_split_are_found(sparse: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    victim = sorted(out.glob("*.gguf"))[1]
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    assert [problem for problem in verify_gguf(out).problems if victim.name in problem]
    victim.unlink()
    assert any(victim.name in problem for problem in verify_gguf(out).problems)
    with pytest.raises(CheckpointError, match=victim.name):
        GgufModel.open(out)


def test_a_tensor_of_another_model_is_found(sparse: Path, made: Path, tmp_path: Path) -> None:
    other = save_model(random_model("qwen3_moe", seed=1, norm_topk_prob=True), tmp_path / "other")
    problems = verify_gguf(made, other).problems
    assert any("blk.0.ffn_down_exps.weight: signal to noise" in problem for problem in problems)


def imatrix_of(build: Path, path: Path, unseen_expert: int | None = None) -> Path:
    """Random importances of every weight in the layers, of one expert none."""
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, entry in GgufModel.open(build).entries.items():
        if len(entry.shape) < 2 or not name.startswith("blk.") or "gate_inp" in name:
            continue
        rows = entry.shape[0] if len(entry.shape) == 3 else 1
        sums = torch.rand(rows, entry.shape[-1], generator=generator).square() * 100
        counts = torch.full((rows,), 50.0, dtype=torch.float64)
        if rows > 1 and unseen_expert is not None:
            sums[unseen_expert], counts[unseen_expert] = 0.0, 0.0
        entries[name] = Entry(sums, counts)
    write_imatrix(path, Imatrix(entries, ("a test",)))
    return path


def test_an_imatrix_is_used_and_an_expert_without_tokens_survives(sparse: Path, made: Path, tmp_path: Path) -> None:
    said: list[str] = []
    imatrix = imatrix_of(made, tmp_path / "imatrix.gguf", unseen_expert=2)
    convert(sparse, tmp_path / "out", keys={"imatrix": {"files": [str(imatrix)]}}, log=said.append)
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert report["imatrix"]["datasets"] == ["a test"]
    assert report["imatrix"]["file"] is None
    assert report["imatrix"]["coverage"]["without_tokens"] == 2
    assert any("2 of 12 experts saw no token" in line for line in said)  # one of six in both layers
    assert verify_gguf(tmp_path / "out", sparse).problems == []
    ours, plain = GgufModel.open(tmp_path / "out"), GgufModel.open(made)
    for name, entry in ours.entries.items():
        values = torch.cat(list(ours.dequantized(name)))
        if name.endswith("_exps.weight"):
            assert bool(values.view(entry.shape)[2].any()), "a row of zeros in the imatrix must not erase an expert"
            assert not torch.equal(values, torch.cat(list(plain.dequantized(name))))


@pytest.mark.parametrize("type", ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lattices_have_a_floor_between_a_wrong_tensor_and_the_worst_sound_weights(type: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 1024, generator=generator)
    importance = torch.exp(2.0 * torch.randn(1024, generator=generator)) if weighted else None
    kinds = {
        "normal": normal,
        "cauchy": normal / torch.randn(8, 1024, generator=generator),
        "sparse": normal * (torch.rand(8, 1024, generator=generator) < 0.03),
        "outlying columns": normal * torch.exp(2.0 * torch.randn(1024, generator=generator)),
    }
    floor = floor_db(GgmlType[type].value, weighted)
    assert floor > (-2.0 if weighted else 0.0)  # a wrong tensor has -3 dB, zeros have 0
    for name, weight in kinds.items():
        approximation = decoded(encode(weight, GgmlType[type], importance), GgmlType[type].value)
        assert SquaredError.between_(weight, approximation).snr_db > floor, name


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_types_have_a_floor_below_the_worst_sound_weights(type: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 1024, generator=generator)
    importance = torch.exp(2.0 * torch.randn(1024, generator=generator)) if weighted else None
    floor = floor_db(GgmlType[type].value, weighted)
    assert floor > -3.0  # a wrong tensor
    for weight in (normal, normal / torch.randn(8, 1024, generator=generator), normal.abs()):
        approximation = decoded(encode(weight, GgmlType[type], importance), GgmlType[type].value)
        assert SquaredError.between_(weight, approximation).snr_db > floor


@pytest.mark.parametrize("file_type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("ternary", [False, True])
def test_ternary_files_are_verified_and_exact_of_a_ternary_model(file_type: str, ternary: bool, tmp_path: Path) -> None:
    shapes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    random = random_model("qwen3_moe", norm_topk_prob=True, **shapes)
    if ternary:
        for name, weight in random.named_parameters():
            if "experts" in name:
                weight.data = torch.sign(weight.data) * (weight.data.abs() > weight.data.abs().mean()) * 0.03125
    model = save_model(random, tmp_path / "model")
    convert(model, tmp_path / "out", file_type)
    verified = verify_gguf(tmp_path / "out", model)
    assert verified.problems == []
    found = [verified.snr_db[f"blk.0.ffn_{role}_exps.weight"] for role in ("gate", "up", "down")]
    assert min(found) == math.inf if ternary else 0.0 < min(found) < 5.0


@pytest.mark.parametrize("file_type", ["IQ3_M", "IQ2_XXS", "IQ1_M", "IQ1_S"])
def test_low_bits_are_made_with_an_imatrix_and_verified(file_type: str, tmp_path: Path) -> None:
    shapes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True, **shapes), tmp_path / "model")
    convert(model, tmp_path / "plain", "Q8_0")
    imatrix = imatrix_of(tmp_path / "plain", tmp_path / "imatrix.gguf", unseen_expert=2)
    convert(model, tmp_path / "out", file_type, {"imatrix": {"files": [str(imatrix)]}})
    verified = verify_gguf(tmp_path / "out", model)
    assert verified.problems == []
    assert min(verified.snr_db[f"blk.0.ffn_{role}_exps.weight"] for role in ("gate", "up", "down")) > 5.0
    # Any other file type than was asked for, and weights of another model, are not mistaken for it.
    other = save_model(random_model("qwen3_moe", seed=1, norm_topk_prob=True, **shapes), tmp_path / "other")
    problems = verify_gguf(tmp_path / "out", other).problems
    assert sum("_exps.weight: signal to noise" in problem for problem in problems) == 3


def test_an_imatrix_of_another_model_is_refused(sparse: Path, made: Path, tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": Entry(torch.ones(1, 48), torch.ones(1, dtype=torch.float64))}
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(entries, ("another",)))
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q"):
        convert(sparse, tmp_path / "out", keys={"imatrix": {"files": [str(tmp_path / "imatrix.gguf")]}})


def test_an_imatrix_without_any_weight_of_the_model_is_refused(sparse: Path, tmp_path: Path) -> None:
    entries = {"model.layers.0.self_attn.q_proj.weight": Entry(torch.ones(1, 64), torch.ones(1).double())}
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(entries, ("another",)))
    with pytest.raises(UsageError, match="none of its 1 entries is of a weight of this model"):
        convert(sparse, tmp_path / "out", keys={"imatrix": {"files": [str(tmp_path / "imatrix.gguf")]}})
    assert not (tmp_path / "out").exists()


def test_a_type_that_needs_an_imatrix_is_not_made_without_one_for_every_weight(
    sparse: Path, made: Path, tmp_path: Path
) -> None:
    imatrix = read_imatrix(imatrix_of(made, tmp_path / "all.gguf"))
    lacking = {name: entry for name, entry in imatrix.entries.items() if name != "blk.1.attn_q.weight"}
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(lacking, ("a test",)))
    given = {"imatrix": {"files": [str(tmp_path / "imatrix.gguf")]}}
    wide = save_model(random_model("qwen3_moe", norm_topk_prob=True, hidden_size=256), tmp_path / "wide")
    with pytest.raises(UsageError, match="the model needs"):
        convert(wide, tmp_path / "out", "Q2_K_S", given)
    lacking = {"blk.0.attn_q.weight": Entry(torch.ones(1, 256) * torch.arange(1, 257), torch.ones(1).double())}
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(lacking, ("a test",)))
    with pytest.raises(UsageError, match=r"blk\.0\.attn_k\.weight becomes Q2_K, which is useless without"):
        convert(wide, tmp_path / "out", "Q2_K_S", given)


def test_a_type_that_needs_an_imatrix_gets_one_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_pipeline, "TextSettings", lambda: TextSettings(tokens=512))
    said: list[str] = []
    wide = save_model(random_model("qwen3_moe", norm_topk_prob=True, hidden_size=256), tmp_path / "wide")
    report = convert(wide, tmp_path / "out", "Q2_K_S", log=said.append).report
    assert report["imatrix"]["file"] == "imatrix.gguf"
    assert any("gguf:Q2_K_S needs an imatrix" in line for line in said)
    assert verify_gguf(tmp_path / "out", wide).problems == []


COLLECTED: dict[str, Any] = {"method": "rtn", "calibration": {"tokens": 128, "sequence_length": 32}}


@pytest.fixture(scope="module")
def calibrated(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in several files, with an imatrix that was collected for it."""
    return convert(sparse, tmp_path_factory.mktemp("calibrated") / "out", keys=COLLECTED).out


def test_what_was_collected_is_kept_used_and_told(sparse: Path, made: Path, calibrated: Path, tmp_path: Path) -> None:
    report = json.loads((calibrated / REPORT_NAME).read_text())
    told = report["imatrix"]
    assert told["file"] == "imatrix.gguf"
    assert told["datasets"][0].startswith("python-stdlib, seed 0: 4 x 32 tokens")
    matrix = read_imatrix(calibrated / "imatrix.gguf")
    counts = torch.cat([matrix.entries[f"blk.{layer}.ffn_up_exps.weight"].counts for layer in range(2)])
    coverage = told["coverage"]
    assert (coverage["least"], coverage["most"]) == (int(counts.min()), int(counts.max()))
    assert (coverage["covered"], coverage["weights"], coverage["experts"]) == (14, 14, 12)
    assert coverage["mostly_shared"] == int((counts <= 64).sum())  # k / (n + k) is a half at n = k
    card = (calibrated / "README.md").read_text()
    assert "`imatrix.gguf` is what qconv collected" in card
    assert f"Tokens per expert: least {coverage['least']}" in card
    # The set beside it is still one model, and a user who gives the file gets the same weights.
    assert verify_gguf(calibrated, sparse).problems == []
    given = {"imatrix": {"files": [str(calibrated / "imatrix.gguf")]}}
    again = convert(sparse, tmp_path / "given", keys=given).out
    names = [file.name for file in calibrated.glob("model-*.gguf")]
    assert len(names) > 3
    for name in names:
        assert (again / name).read_bytes() == (calibrated / name).read_bytes()
    assert any((again / name).read_bytes() != (made / name).read_bytes() for name in names)


def test_collecting_and_writing_are_resumed_to_the_same_bytes(sparse: Path, calibrated: Path, tmp_path: Path) -> None:
    keys: list[str] = []
    convert(sparse, tmp_path / "whole", keys=COLLECTED, progress=lambda key, *_: keys.append(key))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(calibrated)
    starts = [0, *(index for index in range(1, len(keys)) if keys[index] != keys[index - 1])]
    out, stops = tmp_path / "out", 0
    for start in starts[:2] + starts[2::9]:  # in both layers, then here and there among the tensors
        calls = iter(range(start))

        def stop(key: str, *_: int, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise Stop(key)

        try:
            convert(sparse, out, keys=COLLECTED, progress=stop)
        except Stop:
            stops += 1
    assert stops >= 3
    convert(sparse, out, keys=COLLECTED)
    assert folder_bytes(out) == folder_bytes(calibrated)


def test_given_and_collected_matrices_are_merged(sparse: Path, made: Path, calibrated: Path, tmp_path: Path) -> None:
    files = [str(imatrix_of(made, tmp_path / "one.gguf")), str(calibrated / "imatrix.gguf")]
    both = convert(sparse, tmp_path / "files", keys={"imatrix": {"files": files}})
    mixed = convert(sparse, tmp_path / "mixed", keys=COLLECTED | {"imatrix": {"files": files[:1]}})
    for report in (both.report, mixed.report):
        assert sorted(name.split(",")[0] for name in report["imatrix"]["datasets"]) == ["a test", "python-stdlib"]
    for file in both.out.glob("model-*.gguf"):
        assert file.read_bytes() == (mixed.out / file.name).read_bytes()
    # What is kept is what was collected: given again with the other file, nothing counts twice.
    assert (mixed.out / "imatrix.gguf").read_bytes() == (calibrated / "imatrix.gguf").read_bytes()


def test_other_calibration_text_is_another_run(sparse: Path, calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated, tmp_path / "out")
    with pytest.raises(StaleJournalError, match="calibration data, recipe changed"):
        convert(
            sparse,
            tmp_path / "out",
            keys={"method": "rtn", "calibration": {"tokens": 128, "sequence_length": 32, "seed": 1}},
        )
    with pytest.raises(StaleJournalError, match="calibration data, recipe"):
        convert(sparse, tmp_path / "out")


def test_rules_of_a_recipe_decide_about_tensors(sparse: Path, tmp_path: Path) -> None:
    rules = {"tensor_types": {r"blk\.1\.ffn_down_exps": "q6_K", "ffn_.*_exps": "Q5_1", "output": "F16"}}
    report = convert(sparse, tmp_path / "out", "Q4_0", rules).report
    types = {name: one["type"] for name, one in report["tensors"].items()}
    # Rows of 32 are no whole block of Q6_K: the rule falls back to Q8_0.
    assert types["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_down_exps.weight"] == types["blk.1.ffn_up_exps.weight"] == "Q5_1"
    assert types["output.weight"] == "F16"
    assert types["blk.0.attn_output.weight"] == "F16", "the pattern is searched for anywhere in the name"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert report["recipe"]["tensor_types"] == {
        r"blk\.1\.ffn_down_exps": "Q6_K",
        "ffn_.*_exps": "Q5_1",
        "output": "F16",
    }
    assert verify_gguf(tmp_path / "out", sparse).problems == []


def test_a_rule_that_fits_nothing_is_an_error(sparse: Path, tmp_path: Path) -> None:
    for pattern in ("ffn_dwon", "ffn_gate_inp", "attn_norm"):
        with pytest.raises(RecipeError, match=f"tensor_types.{pattern}: fits no weight of the model"):
            convert(sparse, tmp_path / "out", "Q8_0", {"tensor_types": {pattern: "Q6_K"}})
    assert not (tmp_path / "out").exists()
