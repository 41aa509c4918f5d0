"""Tensors that hold those of several modules: written expert by expert, seen again as views, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qconv.building.stacking import Stacking
from qconv.checkpoint.header import TensorSpec, read_header
from qconv.checkpoint.reader import map_tensor
from qconv.errors import CheckpointError, VerificationError
from qconv.formats import get_format
from qconv.formats.stacks import Stack, stacks

FORMAT = get_format("gpt_oss")
PREFIX = "model.layers.3.mlp.experts"


def members(experts: int, rows: int, leaf: str = "weight_scales") -> list[TensorSpec]:
    return [
        TensorSpec(f"{PREFIX}.{expert}.{role}_proj.{leaf}", torch.uint8, (rows, 5))
        for expert in range(experts)
        for role in ("gate", "up", "down")
    ]


@given(experts=st.integers(1, 4), rows=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_what_comes_module_by_module_is_seen_again_in_the_file(
    experts: int, rows: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, generator = tmp_path_factory.mktemp("stacks"), torch.Generator().manual_seed(seed)
    specs = members(experts, rows)
    given = {one.name: torch.randint(0, 256, one.shape, generator=generator, dtype=torch.uint8) for one in specs}
    found = stacks(FORMAT, specs)
    assert [(one.name, one.spec.shape) for one in found] == [
        (f"{PREFIX}.gate_up_proj_scales", (experts, 2 * rows, 5)),
        (f"{PREFIX}.down_proj_scales", (experts, rows, 5)),
    ]
    stacking = Stacking(found, folder / "waiting")
    for name, tensor in given.items():
        stacking.add(name, [tensor[:1], tensor[1:]])
    file = {one.name: torch.cat(list(stacking.blocks(one))) for one in found}
    stacking.close()
    assert not (folder / "waiting").exists()
    gate_up = file[f"{PREFIX}.gate_up_proj_scales"]
    assert torch.equal(gate_up[0, ::2], given[f"{PREFIX}.0.gate_proj.weight_scales"])
    assert torch.equal(gate_up[-1, 1::2], given[f"{PREFIX}.{experts - 1}.up_proj.weight_scales"])
    save_file(file, folder / "file.safetensors")
    entries = read_header(folder / "file.safetensors")
    seen = {view.name: map_tensor(view) for one in found for view in one.views(entries[one.name])}
    assert seen.keys() == given.keys()
    assert all(torch.equal(seen[name], given[name]) for name in given)


def test_biases_of_one_dimension_lie_by_turns_too() -> None:
    parts = [TensorSpec(f"{PREFIX}.0.{role}_proj.bias", torch.float32, (3,)) for role in ("gate", "up")]
    (found,) = stacks(FORMAT, parts)
    together = found.together([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])])
    assert (found.name, found.spec.shape) == (f"{PREFIX}.gate_up_proj_bias", (1, 6))
    assert together.tolist() == [[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]]


def test_parts_that_do_not_make_a_whole_are_refused() -> None:
    whole = members(3, 2)
    with pytest.raises(ValueError, match="missing"):
        stacks(FORMAT, whole[:3] + whole[6:])
    other = TensorSpec(whole[-1].name, torch.uint8, (2, 6))
    with pytest.raises(ValueError, match="not alike"):
        stacks(FORMAT, [*whole[:-1], other])


def test_a_file_with_another_shape_is_named(tmp_path: Path) -> None:
    down = stacks(FORMAT, members(3, 2))[1]
    save_file({down.name: torch.zeros(2, 2, 5, dtype=torch.uint8)}, tmp_path / "file.safetensors")
    entry = read_header(tmp_path / "file.safetensors")[down.name]
    with pytest.raises(CheckpointError, match=r"down_proj_scales' is U8 \[2, 2, 5\], config.json implies uint8"):
        list(down.views(entry))


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Stacking, Stack, Path]:
    down = stacks(FORMAT, members(2, 2))[1]
    return Stacking([down], tmp_path / "waiting"), down, tmp_path / "waiting"


def test_what_changed_on_the_disk_meanwhile_is_met(waiting: tuple[Stacking, Stack, Path]) -> None:
    stacking, down, path = waiting
    for one in down.members:
        stacking.add(one.name, [torch.ones(one.shape, dtype=torch.uint8)])
    with path.open("r+b") as file:
        file.seek(12)
        file.write(b"\x07")
    with pytest.raises(VerificationError, match=r"1\.down_proj\.weight_scales differs from what was written"):
        list(stacking.blocks(down))


def test_what_was_not_announced_or_did_not_come_is_refused(waiting: tuple[Stacking, Stack, Path]) -> None:
    stacking, down, _ = waiting
    first, second = down.members
    assert not stacking.takes("model.norm.weight")
    with pytest.raises(ValueError, match="15 bytes, not 10"):
        stacking.add(first.name, [torch.ones(3, 5, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="expected"):
        stacking.add(first.name, [torch.ones(2, 5)])
    stacking.add(first.name, [torch.ones(2, 5, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=f"{second.name}: was not written"):
        list(stacking.blocks(down))
