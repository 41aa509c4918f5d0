"""Rows that do not stand for the source's, whatever the rest is like; and rows that do, whatever they are like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.grids.ggml import GgmlType, encode
from qconv.verification.blocks import decoded, least_of_rows
from qconv.verification.rows import LEAST_RATIO, RowReader, WrongRows, wrong_rows

ROWS, COLUMNS = 48, 256
TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ4_NL", "MXFP4", "F16")


def weights(kind: str, seed: int = 0) -> Tensor:
    """Rows of different distributions, float32 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    if kind == "cauchy":  # a few elements hold all of the signal
        return normal / torch.randn(ROWS, COLUMNS, generator=generator)
    if kind == "sparse":
        return normal * (torch.rand(ROWS, COLUMNS, generator=generator) < 0.03)
    if kind == "tiny rows":
        return normal * torch.logspace(0, -9, ROWS).unsqueeze(1)
    if kind == "one sign":
        return normal.abs()
    return normal


def rounded(values: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    type = GGMLQuantizationType[name]
    return decoded(encode(values, GgmlType(type), importance), type)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "sparse", "tiny rows", "one sign"])
@pytest.mark.parametrize("name", TYPES)
def test_no_sound_row_is_called_wrong(name: str, kind: str) -> None:
    values = weights(kind)
    importance = torch.ones(COLUMNS) if name == "IQ2_XXS" else None
    assert not bool(wrong_rows(values, rounded(values, name, importance)).any())


@pytest.mark.parametrize("kind", ["normal", "cauchy", "sparse", "tiny rows", "one sign"])
def test_sound_rows_of_zeros_and_one_magnitude_are_not_called_wrong(kind: str) -> None:
    """By formula nine weights of ten become zeros; an unrelated row is still found, and with importance any other."""
    values, type = weights(kind), GGMLQuantizationType.TQ2_0
    made = rounded(values, "TQ2_0")
    assert not bool(wrong_rows(values, made, least_of_rows(type)).any())
    assert kind != "normal" or bool(wrong_rows(values, made).any()), "else it needs no limit of its own"
    importance = torch.ones(COLUMNS)
    importance[0] = 1.01
    searched = rounded(values, "TQ2_0", importance)
    assert not bool(wrong_rows(values, searched, least_of_rows(type)).any())
    if kind == "normal":
        made[7], searched[7] = made[20].clone(), searched[20].clone()
        assert torch.nonzero(wrong_rows(values, made, least_of_rows(type))).flatten().tolist() == [7]
        assert torch.nonzero(wrong_rows(values, searched, least_of_rows(type))).flatten().tolist() == [7]


def test_what_an_importance_gives_up_is_not_called_wrong() -> None:
    # Two columns hold most of each row's signal and matter to no output; two bits cannot hold them and the rest.
    values = weights("normal")
    values[:, :2] *= 60.0
    importance = torch.ones(COLUMNS)
    importance[:2] = 1e-8
    made = rounded(values, "IQ2_XXS", importance)
    noise = (values - made).square().sum(dim=1)
    suspects = LEAST_RATIO * noise > values.square().sum(dim=1)
    assert int(suspects.sum()) > ROWS // 2, "else hardly a row would be suspected"
    assert not bool(wrong_rows(values, made).any())


@pytest.mark.parametrize("name", TYPES)
def test_each_kind_of_wrong_row_is_found(name: str) -> None:
    values = weights("normal")
    importance = torch.ones(COLUMNS) if name == "IQ2_XXS" else None
    sound = rounded(values, name, importance)
    damages: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": lambda made: made[7].zero_(),
        "negated": lambda made: made[7].neg_(),
        "another": lambda made: made[7].copy_(sound[20]),
        "doubled": lambda made: made[7].mul_(2.0),
        "a tenth": lambda made: made[7].mul_(0.1),
    }
    for damage in damages.values():
        made = sound.clone()
        damage(made)
        assert torch.nonzero(wrong_rows(values, made)).flatten().tolist() == [7]
    shifted = sound.clone()
    shifted[16:24] = sound[17:25]
    assert torch.nonzero(wrong_rows(values, shifted)).flatten().tolist() == list(range(16, 24))


def test_what_was_found_is_said() -> None:
    values = weights("normal")
    made = values.clone()
    found = WrongRows()
    found.add(values, made)
    assert (found.rows, found.of) == (0, ROWS)
    made[3] = 0.0
    found.add(values, made)
    assert str(found) == f"1 of {2 * ROWS} rows are zero, the first is row {ROWS + 3}"
    made[4] = values[5]
    found.add(values, made)
    assert str(found) == f"3 of {3 * ROWS} rows are not the source's, the first is row {ROWS + 3}"


def test_rows_are_taken_across_blocks() -> None:
    rows = torch.arange(20.0).view(10, 2)
    reader = RowReader(iter((rows[:3], rows[3:4], rows[4:])))
    taken = [torch.cat(list(reader.take(count))) for count in (2, 5, 3)]
    assert [len(one) for one in taken] == [2, 5, 3]
    assert torch.equal(torch.cat(taken), rows)
    assert list(reader.take(1)) == []
