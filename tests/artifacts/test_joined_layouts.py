"""Experts in one tensor a layer, in each layout that families have: read as torch's indexing of the whole tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.separation import joined_tensors, separated
from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.header import read_header
from qconv.checkpoint.maps import SharedMaps
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint, map_rows, map_tensor
from qconv.core.architecture import Joined
from qconv.models import architecture, qwen3_moe
from qconv.planning.estimate import estimate
from qconv.verification.build import verify
from tests.artifacts.test_source import edit_tensors, refused
from tests.conftest import FAMILIES, SIZES, build, folder_bytes, small_recipe
from tests.fp8 import same_bits

EXPERTS, WIDTH, HIDDEN = 6, 32, 64
LAYOUTS = {
    f"{'transposed' if transposed else 'rows'}, {'by turns' if interleaved else 'stacked'}": Joined(
        transposed=transposed, interleaved=interleaved
    )
    for transposed in (False, True)
    for interleaved in (False, True)
}
GRANITE = Joined("input_linear.weight", "output_linear.weight")


def joined(tensors: dict[str, Tensor], layout: Joined, block: str = "model.layers.{}.mlp") -> dict[str, Tensor]:
    """A checkpoint's tensors with all experts of a layer in one, by torch alone."""
    found = dict(tensors)
    for layer in (0, 1):
        name = block.format(layer)

        def taken(leaf: str, name: str = name) -> Tensor:
            return torch.stack([found.pop(f"{name}.experts.{expert}.{leaf}") for expert in range(EXPERTS)])

        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            if f"{name}.experts.0.gate_proj.{kind}" not in found:
                continue
            gate, up, down = (taken(f"{leaf}_proj.{kind}") for leaf in ("gate", "up", "down"))
            both = torch.cat([gate, up], 1)
            if layout.interleaved:
                both = torch.empty_like(both)
                both[:, 0::2], both[:, 1::2] = gate, up
            if layout.transposed and kind == "weight":
                both, down = both.transpose(1, 2), down.transpose(1, 2)
            found[f"{name}.{layout.gate_up}{suffix}"] = both.contiguous()
            found[f"{name}.{layout.down}{suffix}"] = down.contiguous()
    return found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives qwen3_moe another layout of joined experts, and biases."""

    def change(layout: Joined, bias: bool = False) -> None:
        monkeypatch.setattr(qwen3_moe, "FAMILY", replace(qwen3_moe.FAMILY, joined=layout, expert_bias=bias))

    return change


def with_biases(folder: Path) -> Path:
    """A checkpoint of which every expert's linears get a bias."""
    generator = torch.Generator().manual_seed(3)

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if ".experts." in one]:
            bias = 0.2 * torch.randn(len(tensors[name]), generator=generator)
            tensors[f"{name.removesuffix('weight')}bias"] = bias.bfloat16()

    return edit_tensors(folder, add)


def both(moe: Path, folder: Path, layout: Joined, bias: bool) -> tuple[Path, Path]:
    """A checkpoint with tensors for each expert, and the same with joined ones."""
    apart, together = (Path(shutil.copytree(moe, folder / name)) for name in ("apart", "joined"))
    for path in (apart, together):
        if bias:
            with_biases(path)
        edit_tensors(path, lambda tensors: None)
    tensors = joined(load_file(together / SINGLE_NAME), layout)
    save_file(tensors, together / SINGLE_NAME)
    return apart, together


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", [*LAYOUTS, "granite"])
def test_the_same_tensors_and_the_same_build(
    moe: Path, use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bias: bool
) -> None:
    layout = GRANITE if name == "granite" else LAYOUTS[name]
    if name == "granite" and bias:
        pytest.skip("it has none")
    use(layout, bias)
    apart, together = both(moe, tmp_path, layout, bias)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    expected, found = Source.open(apart), Source.open(together)
    assert found.checkpoint.entries.keys() == expected.checkpoint.entries.keys()
    maps = SharedMaps()
    for tensor, entry in expected.checkpoint.entries.items():
        assert same_bits(found.read(tensor), expected.read(tensor)), tensor
        assert same_bits(maps(found.checkpoint.entry(tensor)), expected.read(tensor)), tensor
        for ours, theirs in zip(found.blocks(tensor), expected.blocks(tensor), strict=True):
            assert same_bits(ours, theirs), tensor
        assert found.checkpoint.crc32(tensor) == expected.checkpoint.crc32(tensor)
        if len(entry.shape) == 2:
            rows = torch.tensor([5, 0, 5, 3])
            assert same_bits(found.checkpoint.gather(tensor, rows), expected.checkpoint.gather(tensor, rows))
    recipe = small_recipe("gptq", "gptq")
    builds = [folder_bytes(build(path, tmp_path / f"{path.name}-build", recipe).out) for path in (apart, together)]
    assert [path for path in builds[0] if path.endswith(".safetensors")]
    for path in builds[0]:
        if path.endswith((".safetensors", ".index.json")):
            assert builds[0][path] == builds[1][path], path
    if bias:
        shards = [load_file(file) for file in (tmp_path / "joined-build").glob("*.safetensors")]
        names = {one for shard in shards for one in shard if one.endswith("proj.bias") and ".experts." in one}
        assert len(names) == 2 * EXPERTS * 3
    assert not verify(tmp_path / "joined-build", against=together).problems


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("output_format", ["w4a16", "awq", "gptq"])
def test_biases_of_experts_are_calibrated_with_and_written(
    moe: Path, use: Callable[..., None], tmp_path: Path, method: str, output_format: str
) -> None:
    use(Joined(), bias=True)
    folder = with_biases(Path(shutil.copytree(moe, tmp_path / "model")))
    out = build(folder, tmp_path / "out", small_recipe(method, output_format)).out
    assert not verify(out, against=folder).problems


def test_a_plan_of_joined_experts_misses_nothing(moe: Path, use: Callable[..., None], tmp_path: Path) -> None:
    use(LAYOUTS["transposed, by turns"], bias=True)
    apart, together = both(moe, tmp_path, LAYOUTS["transposed, by turns"], True)
    for folder in (apart, together):
        weight_map = dict.fromkeys(load_file(folder / SINGLE_NAME), SINGLE_NAME)
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plans = [estimate(folder, small_recipe()) for folder in (apart, together)]
    assert plans[0].notices == plans[1].notices == ()
    assert plans[0].output_bytes == plans[1].output_bytes
    assert plans[0].source_bytes == plans[1].source_bytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_other_orientation_is_named(moe: Path, use: Callable[..., None], tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    use(replace(layout, transposed=not layout.transposed))
    _, together = both(moe, tmp_path, layout, False)
    implied = [EXPERTS, 2 * WIDTH, HIDDEN] if layout.transposed else [EXPERTS, HIDDEN, 2 * WIDTH]
    if implied[1] == implied[2]:
        # gate and up make a square here: down, which does not, tells.
        refused(together, "'model.layers.0.mlp.experts.down_proj' is ")
    else:
        refused(together, f"config.json implies {implied}")


def test_of_a_square_the_description_decides(use: Callable[..., None], tmp_path: Path, moe: Path) -> None:
    square = torch.randn(EXPERTS, HIDDEN, 2 * WIDTH).bfloat16()
    assert square.shape[1] == square.shape[2]
    _, together = both(moe, tmp_path, Joined(), False)
    name = "model.layers.0.mlp.experts"
    tensors = load_file(together / SINGLE_NAME)
    save_file(tensors | {f"{name}.gate_up_proj": square}, together / SINGLE_NAME)
    for transposed in (False, True):
        use(Joined(transposed=transposed))
        stored = Checkpoint.open(together)
        # down is no square: only gate and up are looked at.
        entries = {one: entry for one, entry in stored.entries.items() if not one.endswith("down_proj")}
        found = separated(replace(stored, entries=entries))
        expected = square[2].t() if transposed else square[2]
        assert torch.equal(found.read(f"{name}.2.gate_proj.weight"), expected[:WIDTH])
        assert torch.equal(found.read(f"{name}.2.up_proj.weight"), expected[WIDTH:])


def test_a_bias_that_nobody_expects_is_refused(moe: Path, use: Callable[..., None], tmp_path: Path) -> None:
    use(Joined(), bias=True)
    _, together = both(moe, tmp_path, Joined(), True)
    use(Joined(), bias=False)
    refused(together, "'model.layers.0.mlp.experts.down_proj_bias'")


@given(
    experts=st.integers(1, 4),
    width=st.integers(1, 6),
    hidden=st.integers(1, 7),
    transposed=st.booleans(),
    interleaved=st.booleans(),
    bias=st.booleans(),
    shift=st.integers(0, 3),
    rows=st.tuples(st.integers(0, 5), st.integers(1, 6)),
)
def test_views_are_what_torch_indexes(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    width: int,
    hidden: int,
    transposed: bool,
    interleaved: bool,
    bias: bool,
    shift: int,
    rows: tuple[int, int],
) -> None:
    """Of every size, at every place in a file."""
    config: dict[str, Any] = SIZES | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "num_hidden_layers": 1}
    sizes = {"num_experts": experts, "moe_intermediate_size": width, "hidden_size": hidden, "num_experts_per_tok": 1}
    family = replace(qwen3_moe.FAMILY, joined=Joined(transposed=transposed, interleaved=interleaved), expert_bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_moe, "FAMILY", family)
        model = architecture(config | sizes)
    file = tmp_path_factory.mktemp("views") / "x.safetensors"
    whole = {
        name: torch.randn(tensor.shape).bfloat16()
        for name, tensor in joined_tensors(model).items()
        if tensor.leaf in ("weight", "bias")
    }
    save_file({"a": torch.zeros(shift, dtype=torch.uint8), **whole}, file)
    entries = read_header(file)
    for name, tensor in whole.items():
        described = joined_tensors(model)[name]
        views = list(described.views(entries[name]))
        assert len(views) == experts * described.halves
        for number, view in enumerate(views):
            expert, half = divmod(number, described.halves)
            one = tensor[expert].t() if transposed and described.leaf == "weight" else tensor[expert]
            if described.halves == 2:
                one = one[half::2] if interleaved else one.chunk(2)[half]
            one = one.clone(memory_format=torch.contiguous_format)
            assert same_bits(map_tensor(view), one), view.name
            start, stop = min(rows[0], len(one)), min(sum(rows), len(one))
            assert same_bits(map_rows(view, start, stop), one[start:stop])
            assert entries[name].offset <= view.offset
            assert view.offset + view.span <= entries[name].offset + entries[name].nbytes
