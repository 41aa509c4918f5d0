"""``qconv inspect`` and ``qconv bench``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qconv.building.bench import write_slice
from qconv.core.settings import GridSettings
from qconv.formats import get_format
from tests.cli.conftest import SMALL, Invoke


def test_a_build_has_format_classes_and_skip_list(invoke: Invoke, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("inspect", build)
    assert result.exit_code == 0
    assert "Qwen3MoeForCausalLM, 4 layers" in result.stdout
    assert "format w4a16" in result.stdout
    assert "model.layers.*.mlp.gate (4), lm_head" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("mlp.experts.*.up_proj"))
    assert row.split() == ["mlp.experts.*.up_proj", "64", "weight_packed", "I32", "256x32", "2.16", "MB", "4.13"]
    assert "\x1b" not in result.output


def test_layers_and_tensors(invoke: Invoke, build: Path) -> None:
    layers = invoke("inspect", build, "--layers").stdout
    assert [f"model.layers.{index} " in layers for index in range(5)] == [True] * 4 + [False]
    assert "outside layers" in layers
    values = json.loads(invoke("inspect", build, "--layers", "--json").stdout)
    assert sum(row["bytes"] for row in values["by_layer"]) == values["bytes"]
    values = json.loads(invoke("inspect", build, "--tensors", "--json").stdout)
    assert len(values["by_tensor"]) == values["tensors"]
    first = values["by_tensor"][0]
    assert first.keys() == {"name", "dtype", "shape", "bytes", "file", "offset"}
    names = invoke("inspect", build, "--tensors").stdout
    assert all(row["name"] in names for row in values["by_tensor"])


def test_json_of_the_source_and_of_the_build_count_the_same_weights(invoke: Invoke, tiny: Path, build: Path) -> None:
    dense, packed = (json.loads(invoke("inspect", path, "--json").stdout) for path in (tiny, build))
    assert dense["weights"] == packed["weights"] == 14_961_408  # the model card's 15 M
    assert dense["quantization"] is None
    assert dense["bits_per_weight"] == 16.0
    assert packed["quantization"]["quant_method"] == "compressed-tensors"


def test_a_page_shows_error_coverage_and_bits(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke("inspect", build, "--html", page)
    assert (result.exit_code, result.stdout.strip()) == (0, str(page))
    text = page.read_text()
    for told in ("Where the error sits", "Error of every expert", "Bits per weight of the files", "experts.down_proj"):
        assert told in text
    before = page.read_bytes()
    assert invoke("inspect", build, "--html", page).exit_code == 0, "a page of ours is replaced"
    assert page.read_bytes() == before
    assert invoke("verify", build).exit_code == 0, "the build is as it was"


def test_a_page_of_a_model_says_that_it_has_no_report(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert invoke("inspect", tiny, "--html", page).exit_code == 0
    assert "of error and calibration nothing is known" in page.read_text()


@pytest.mark.parametrize("place", ["inside", "foreign", "folder", "nowhere"])
def test_a_page_goes_nowhere_where_it_harms(place: str, invoke: Invoke, build: Path, tmp_path: Path) -> None:
    foreign, folder = tmp_path / "foreign.html", tmp_path / "folder"
    foreign.write_text("<p>mine</p>")
    folder.mkdir()
    nowhere = tmp_path / "absent" / "page.html"
    page = {"inside": build / "page.html", "foreign": foreign, "folder": folder, "nowhere": nowhere}[place]
    result = invoke("inspect", build, "--html", page)
    assert result.exit_code == 2
    assert "--html" in result.stderr
    assert foreign.read_text() == "<p>mine</p>"
    assert not (build / "page.html").exists()


def test_a_page_has_all_views(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    for option in ("--roles", "--json"):
        result = invoke("inspect", build, "--html", tmp_path / "page.html", option)
        assert result.exit_code == 2
        assert not (tmp_path / "page.html").exists()


def test_a_damaged_shard_exits_with_5(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(build, bad)
    shard = sorted(bad.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    result = invoke("inspect", bad)
    assert result.exit_code == 5
    assert shard.name in result.stderr
    assert "truncated" in result.stderr


def test_bench_slice_writes_a_checkpoint(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command has no option for other shapes, and the true ones are 4 GB of embeddings alone.
    def small(*arguments: Any, **named: Any) -> None:
        write_slice(*arguments, **{**named, "shape": SMALL})

    monkeypatch.setattr("qconv.building.bench.write_slice", small)
    out = tmp_path / "slice"
    arguments = ("bench", "slice", "--layers", 2, "--experts", 3, "-o", out)
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{out}: 2 layers of 3 experts")
    values = json.loads(invoke("inspect", out, "--json").stdout)
    assert values["layers"] == 2
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert "not an empty folder" in refused.stderr
    other = json.loads(invoke(*arguments[:-1], tmp_path / "other", "--seed", 1, "--json").stdout)
    assert other["bytes"] > values["bytes"]


def test_fp8_says_how_weights_share_scales_and_not_how_inputs_do(invoke: Invoke, tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "fc.weight_scale": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, group_size, expected in (
        ("fp8", 128, "format fp8), fmt e4m3, weight_block_size [128, 128], activation_scheme dynamic"),
        ("fp8_dynamic", -1, "num_bits 8, type float, strategy channel, symmetric True"),
        ("fp8_dynamic", 128, "strategy block, block_structure [128, 128]"),
        ("fp8_static", -1, "format fp8_static), format float-quantized, num_bits 8, type float"),
    ):
        output_format = get_format(name)
        grid = output_format.grid(GridSettings(bits=8, group_size=group_size), torch.bfloat16)
        section = output_format.config({grid: []}, [])
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
        line = next(line for line in invoke("inspect", tmp_path).stdout.splitlines() if line.startswith("quantization"))
        assert expected in line


def test_each_group_of_a_mixture_is_told(invoke: Invoke, tmp_path: Path) -> None:
    tensors = {"a.fc.weight_packed": torch.zeros(8, 4, dtype=torch.int32), "a.up.weight": torch.zeros(8, 16)}
    save_file(tensors, tmp_path / "model.safetensors")
    output_format = get_format("w4a16")
    grids = [output_format.grid(GridSettings(bits=4, group_size=32), torch.bfloat16)]
    grids.append(output_format.grid(GridSettings(bits=8, group_size=-1), torch.bfloat16, "e4m3"))
    section = output_format.config(dict(zip(grids, [["a.fc"], ["a.up"]], strict=True)), [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    lines = invoke("inspect", tmp_path).stdout.splitlines()
    line = next(line for line in lines if line.startswith("quantization"))
    assert line.endswith("compressed-tensors (format mixed_precision), 2 groups: 4 int group 32; 8 float channel")
