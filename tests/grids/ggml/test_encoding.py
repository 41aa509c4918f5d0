"""What every type has in common: sizes, refusals, dtypes, and bytes that the gguf package decodes to the weights."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGML_QUANT_SIZES

from qconv.errors import UsageError
from qconv.grids.ggml import GgmlType, encode
from tests.grids.ggml.conftest import SEARCHED, WITH_IMPORTANCE, bell_weights, column_importance, decode, squared_error

every_type = pytest.mark.parametrize("type", list(GgmlType), ids=lambda type: type.name)

# Signal to noise of bell-shaped weights in dB, about 6 a bit: measured, less half a dB. A confusion of bits or of
# sub-blocks never reaches it.
LEAST_SNR_DB = {
    "F32": math.inf,
    "F16": 72.0,
    "BF16": 54.0,
    "Q8_0": 41.5,
    "Q6_K": 32.1,
    "Q5_K": 26.8,
    "Q5_1": 26.1,
    "Q5_0": 22.9,
    "Q4_K": 20.2,
    "IQ4_XS": 19.2,
    "IQ4_NL": 19.3,
    "Q4_1": 19.7,
    "Q4_0": 17.0,
    "MXFP4": 17.1,
    "Q3_K": 14.0,
    "TQ2_0": 0.3,  # the largest of 256 is the magnitude of all that are not zero
    "TQ1_0": 0.3,
    "IQ1_M": 5.7,
    "IQ1_S": 4.5,
    "Q2_K": 9.5,
    "IQ3_S": 15.1,
    "IQ3_XXS": 13.3,
    "IQ2_S": 9.2,
    "IQ2_XS": 8.6,
    "IQ2_XXS": 7.2,
}


@every_type
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("both_encoders")
def test_the_gguf_package_reads_the_weights_back(type: GgmlType, weighted: bool) -> None:
    weight = bell_weights(rows=6, columns=768)
    encoded = encode(weight, type, column_importance(768, spread=0.3) if weighted else None)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (6, 768 // type.block_elements * type.block_bytes)
    noise = (decode(encoded, type).double() - weight.double()).square().sum(1)
    snr = 10.0 * torch.log10(weight.double().square().sum(1) / noise)
    assert float(snr.min()) >= LEAST_SNR_DB[type.name], snr.tolist()


@every_type
def test_ids_and_sizes_are_those_of_gguf(type: GgmlType) -> None:
    assert GGML_QUANT_SIZES[type.value] == (type.block_elements, type.block_bytes)
    assert type.value.name == type.name
    assert type.id == type.value.value


@pytest.mark.parametrize(
    ("type", "bits"),
    [("Q4_K", 4.5), ("Q6_K", 6.5625), ("Q2_K", 2.625), ("IQ4_XS", 4.25), ("MXFP4", 4.25), ("BF16", 16.0)],
)
def test_bits_per_weight(type: str, bits: float) -> None:
    assert GgmlType[type].bits_per_weight == bits


@pytest.mark.parametrize(
    ("type", "columns", "instead"),
    [
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"),
        ("TQ1_0", 96, "Q4_0"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("Q4_K", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("MXFP4", 1, "F16"),
    ],
)
@pytest.mark.usefixtures("both_encoders")
def test_rows_that_are_no_whole_blocks_are_refused_with_a_remedy(type: str, columns: int, instead: str) -> None:
    with pytest.raises(UsageError, match=f"{type} holds blocks of .*rows of {columns}.*as {instead}"):
        encode(torch.ones(2, columns), GgmlType[type])


@every_type
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("both_encoders")
def test_what_is_not_a_number_is_refused(type: GgmlType, value: float) -> None:
    weight = bell_weights(4, 256)
    weight[3, 77] = value
    with pytest.raises(UsageError, match="NaN or infinite"):
        encode(weight, type)


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_what_float16_scales_cannot_hold_is_refused(type: GgmlType) -> None:
    weight = bell_weights(4, 256)
    weight[2, 5] = 65504.0
    assert bool(torch.isfinite(decode(encode(weight, type), type)).all())
    weight[2, 5] = -65536.0
    if type.name in ("F32", "BF16", "MXFP4"):
        assert bool(torch.isfinite(decode(encode(weight, type), type)).all())
    else:
        with pytest.raises(UsageError, match=r"65536 is beyond float16.*BF16 or F32"):
            encode(weight, type)


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_dtype_layout_and_ownership_of_the_weight(type: GgmlType) -> None:
    weight = bell_weights(6, 256).bfloat16()
    expected = encode(weight.float(), type)
    before = weight.clone()
    importance = column_importance(256)
    kept = importance.clone()
    assert torch.equal(encode(weight, type), expected)
    encode(weight, type, importance)
    assert torch.equal(weight, before)
    assert torch.equal(importance, kept)
    assert torch.equal(encode(weight.double(), type), expected)
    assert torch.equal(encode(weight.t().contiguous().t(), type), expected)
    assert torch.equal(encode(torch.cat([weight, weight], dim=1)[:, 256:], type), expected)


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_nothing_encodes_to_nothing(type: GgmlType) -> None:
    assert encode(torch.empty(0, 512), type).shape == (0, type.row_bytes(512))
    assert encode(torch.empty(3, 0), type).shape == (3, 0)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "MXFP4"])
@pytest.mark.usefixtures("both_encoders")
def test_importance_changes_nothing_where_nothing_is_searched(type: str) -> None:
    weight = bell_weights(4, 256)
    assert torch.equal(encode(weight, GgmlType[type], column_importance(256)), encode(weight, GgmlType[type]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weighted", [False, True])
@every_type
def test_a_gpu_encodes_as_well(type: GgmlType, weighted: bool) -> None:
    weight = bell_weights(rows=64)
    importance = column_importance(512) if weighted else None
    here = encode(weight, type, importance)
    there = encode(weight.cuda(), type, importance)
    assert there.is_cuda
    if type in WITH_IMPORTANCE and (weighted or type in SEARCHED):
        # Sums are added in another order, so a search may end elsewhere, but not worse.
        found, expected = (float(squared_error(weight, e, type, importance).sum()) for e in (there.cpu(), here))
        assert found < expected * 1.01
    else:
        assert torch.equal(there.cpu(), here)
