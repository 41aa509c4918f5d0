"""Calibrated GGUF builds: resumed at any layer, the same from any number of threads, nearer to the source's outputs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.errors import RecipeError, VerificationError
from qconv.folders.journal import WORK_FOLDER
from qconv.folders.state import REPORT_NAME
from qconv.formats.gguf.imatrix import read_imatrix
from qconv.grids.ggml import GgmlType
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.gguf import verify_gguf
from tests.building.test_gguf_pipeline import Stop, convert
from tests.conftest import folder_bytes, random_model, save_model

TEXT = {"tokens": 128, "sequence_length": 32}
MATCHED = {"calibration": {**TEXT, "propagate": "matched"}, "refine": {"sweeps": 1, "refits": 1}}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module", params=[{"calibration": TEXT}, MATCHED], ids=["gptq", "matched"])
def keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of a recipe."""
    found: dict[str, Any] = request.param
    return found


@pytest.fixture(scope="module")
def made(sparse: Path, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in several files."""
    return convert(sparse, tmp_path_factory.mktemp("calibrated") / "out", keys=keys).out


def test_it_stands_for_the_source_and_says_how_it_was_made(sparse: Path, made: Path) -> None:
    assert verify_gguf(made, sparse).problems == []
    report = json.loads((made / REPORT_NAME).read_text())
    assert report["method"] == "gptq"
    records = {name: one for layer in report["layers"] for name, one in layer["compensations"].items()}
    assert len(records) == 2 * (4 + 6 * 3)  # both layers' attention, and three matrices of six experts
    assert all(one["error"] <= one["rtn_error"] for one in records.values())
    errors, own = (sum(one[name] for one in records.values()) for name in ("error", "rtn_error"))
    # 128 tokens leave inputs of 64 and 96 features correlated: half the error is the least that is to be had.
    assert errors < 0.5 * own


def test_the_importance_matrix_of_its_inputs_is_kept(sparse: Path, tmp_path: Path) -> None:
    """With unquantized inputs it is what collecting alone gives, up to the order in which sums are made."""
    unquantized = {"calibration": {**TEXT, "propagate": False}}
    ours = convert(sparse, tmp_path / "ours", keys=unquantized).out
    alone = convert(sparse, tmp_path / "alone", keys={"method": "rtn", "calibration": TEXT}).out
    found, expected = (read_imatrix(folder / "imatrix.gguf") for folder in (ours, alone))
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].counts, entry.counts)
        if "ffn_down" not in name:  # which sees what the quantized gate and up make of their inputs
            torch.testing.assert_close(found.entries[name].sums, entry.sums, rtol=1e-4, atol=1e-6)


def test_stopped_at_every_step_and_resumed_the_bytes_are_the_same(
    sparse: Path, made: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    steps: list[str] = []
    convert(sparse, tmp_path / "whole", keys=keys, progress=lambda key, *_: steps.append(key))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(made)
    calls = [number for number, _ in enumerate(steps)][:: max(1, len(steps) // 12)]
    out, stops = tmp_path / "out", 0
    for most in itertools.chain(calls[1:3], calls[3::3]):

        def stop(key: str, *_: int, left: Iterator[int] = iter(range(most))) -> None:  # noqa: B008 - one for each
            if next(left, None) is None:
                raise Stop(key)

        try:
            convert(sparse, out, keys=keys, progress=stop)
        except Stop:
            stops += 1
    assert stops >= 3
    convert(sparse, out, keys=keys)
    assert folder_bytes(out) == folder_bytes(made)
    assert not list((out / WORK_FOLDER).glob("*.safetensors"))


def test_bytes_do_not_depend_on_threads(sparse: Path, made: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    for threads in (1, 3):
        assert folder_bytes(convert(sparse, tmp_path / str(threads), keys=keys, threads=threads).out) == folder_bytes(
            made
        )


def test_a_damaged_layer_of_an_unfinished_run_is_found(sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(key: str, *_: int) -> None:
        if key.endswith(".gguf"):
            raise Stop(key)

    with pytest.raises(Stop):
        convert(sparse, out, keys={"calibration": TEXT}, split=10**9, progress=stop)
    blocks = sorted((out / WORK_FOLDER).glob("layer-*.safetensors"))
    assert len(blocks) == 2
    data = bytearray(blocks[1].read_bytes())
    data[-1] ^= 1
    blocks[1].write_bytes(data)
    with pytest.raises(VerificationError, match=blocks[1].name):
        convert(sparse, out, keys={"calibration": TEXT}, split=10**9)


@pytest.mark.parametrize("type", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_every_type_of_small_blocks_is_calibrated(type: str, sparse: Path, tmp_path: Path) -> None:
    rules = {"tensor_types": {"blk": type}, "calibration": TEXT}
    report = convert(sparse, tmp_path / "out", "BF16", rules).report
    assert {one["type"] for name, one in report["tensors"].items() if name.endswith("exps.weight")} == {type}
    assert verify_gguf(tmp_path / "out", sparse).problems == []
    assert report["layers"][0]["compensations"]


@pytest.mark.parametrize(
    "type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0"]
)
def test_every_type_of_super_blocks_is_calibrated(type: str, tmp_path: Path) -> None:
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 2, "num_experts_per_tok": 1}
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True, **changes), tmp_path / "model")
    rules = {"tensor_types": {"ffn": type}, "calibration": TEXT, "refine": {"sweeps": 1, "refits": 1}}
    report = convert(model, tmp_path / "out", "BF16", rules).report
    assert {one["type"] for name, one in report["tensors"].items() if "exps" in name} == {type}
    assert verify_gguf(tmp_path / "out", model).problems == []
    assert GgmlType[type].block_elements == 256


@pytest.mark.parametrize("type", ["IQ1_S", "IQ1_M", "TQ2_0"])
def test_the_types_of_fewest_bits_are_resumed_to_the_same_bytes(type: str, tmp_path: Path) -> None:
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 2, "num_experts_per_tok": 1}
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True, **changes), tmp_path / "model")
    rules = {"tensor_types": {"ffn": type}, "calibration": TEXT}
    steps: list[str] = []
    convert(model, tmp_path / "whole", "BF16", rules, progress=lambda key, *_: steps.append(key))

    left = iter(range(len(steps) // 2))

    def stop(key: str, *_: int) -> None:
        if next(left, None) is None:
            raise Stop(key)

    with pytest.raises(Stop):
        convert(model, tmp_path / "out", "BF16", rules, progress=stop)
    convert(model, tmp_path / "out", "BF16", rules)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_moe", "qwen3"])
def test_other_families_are_calibrated(model_type: str, tmp_path: Path) -> None:
    """Llama's q and k are permuted: the blocks of their rows must be too."""
    changes = {"head_dim": 16} if model_type == "qwen2_moe" else {}
    model = save_model(random_model(model_type, **changes), tmp_path / "model")
    report = convert(model, tmp_path / "out", "Q8_0", {"calibration": TEXT}).report
    assert report["method"] == "gptq"
    assert verify_gguf(tmp_path / "out", model).problems == []


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({}, False),
        ({"calibration": {}}, True),
        ({"method": "gptq"}, True),
        ({"method": "rtn", "calibration": {}}, False),
        ({"calibration": {}, "imatrix": {"files": ["a.gguf"]}}, False),
    ],
)
def test_text_alone_asks_for_gptq(values: dict[str, Any], method: bool) -> None:
    assert parse_gguf_recipe({"type": "Q4_0", **values}).is_calibrated == method


def test_other_methods_are_refused() -> None:
    with pytest.raises(RecipeError, match="method: gptq\\+awq is no method"):
        parse_gguf_recipe({"type": "Q4_0", "method": "gptq+awq"})
