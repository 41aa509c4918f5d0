"""AutoRound's words: told in those of the layout that its tensors have, or left as they are.

The sections are those that auto-round 0.15.1 wrote of small models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.errors import UnreadLayoutError
from qconv.formats import detect
from qconv.formats.auto_round import in_their_words
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.conftest import GRIDS, build, small_recipe

GATES = {rf".*model\.layers\.{layer}\.mlp\.gate.*": {"bits": 16, "data_type": "float"} for layer in range(2)}
INTEGERS: dict[str, Any] = {
    "autoround_version": "0.15.1",
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "extra_config": GATES,
    "group_size": 32,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}
FLOATS = INTEGERS | {"packing_format": "auto_round:llm_compressor", "act_dynamic": True, "act_bits": 4}
NVFP4 = FLOATS | {"data_type": "nv_fp", "act_data_type": "nv_fp4_with_static_gs", "group_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", INTEGERS),
    "awq": ("awq", INTEGERS | {"packing_format": "auto_round:auto_awq", "sym": False}),
    "nvfp4_w4a4": ("nvfp4_w4a4", NVFP4),
    "nvfp4": ("nvfp4", NVFP4 | {"act_bits": 16}),
    "mxfp4": ("mxfp4", FLOATS | {"data_type": "mx_fp", "act_bits": 16}),
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=CASES)
def relabelled(
    request: pytest.FixtureRequest, moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A build of ours, and the same with AutoRound's words and nothing that tells whose it is."""
    output_format, section = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    grid = {"grid": GRIDS[output_format]} if output_format in GRIDS else {}
    ours = build(moe, folder / "ours", small_recipe("rtn", output_format, **grid)).out
    theirs = Path(shutil.copytree(ours, folder / "theirs"))
    for name in ("SHA256SUMS", "qconv-report.json", "README.md"):
        (theirs / name).unlink()
    config = json.loads((theirs / "config.json").read_text()) | {"quantization_config": section}
    (theirs / "config.json").write_text(json.dumps(config))
    return request.param, ours, theirs


def test_a_build_in_its_words_is_read_as_one_in_the_layouts_own(relabelled: tuple[str, Path, Path], moe: Path) -> None:
    name, ours, theirs = relabelled
    assert inspect(theirs).format == name
    for against in (None, moe):
        result = verify(theirs, against)
        assert (result.problems, result.not_checked) == ([], [])
        assert not any("skip list" in notice for notice in result.notices)
    before, after, source = Build.open(ours), Build.open(theirs), Source.open(theirs)
    for layer in before.architecture.layers:
        for linear in layer.linears():
            weight = before.qtensor(linear).dequantize()
            assert torch.equal(after.qtensor(linear).dequantize(), weight)
            assert torch.equal(source.read(linear.weight), weight.bfloat16())
    with torch.no_grad():
        one, other = (load(path, backend="reference", dtype="float32")(IDS).logits for path in (ours, theirs))
    assert torch.equal(one, other)


def test_inputs_that_are_rounded_by_their_own_range_are_told() -> None:
    section = in_their_words(FLOATS | {"data_type": "mx_fp"})
    found = detect({"quantization_config": section})
    assert found is not None
    assert found.read_config(section, torch.bfloat16).grid.activations == "dynamic"


def test_exceptions_by_name_are_whole_names() -> None:
    section = in_their_words(INTEGERS | {"extra_config": {"model.layers.0.mlp.down_proj": {"bits": 16}}})
    assert section["dynamic"] == {r"-:model\.layers\.0\.mlp\.down_proj$": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}}},
        {"extra_config": {"model.layers.0.mlp.down_proj": 16}},
        {"extra_config": []},
        {"packing_format": "auto_round:fp8_static", "bits": 8, "data_type": "fp"},
        {"packing_format": None},
        {"packing_format": "auto_round:auto_awq", "extra_config": {".*(gate|up).*": {"bits": 16}}},
        {"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "bits": 8},
    ],
)
def test_what_cannot_be_told_stays_and_is_named(change: dict[str, Any], rtn_build: Path, tmp_path: Path) -> None:
    section = INTEGERS | change
    assert in_their_words(section) == section
    folder = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadLayoutError, match="quant_method 'auto-round'"):
        Build.open(folder)


def test_other_tools_words_stay_what_they_are() -> None:
    assert in_their_words({"quant_method": "gptq", "bits": 4}) == {"quant_method": "gptq", "bits": 4}
