"""verify of GGUF files: checksums beside them, values, experts and rows, and the keys that decide what is computed."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME
from qconv.formats.gguf.reader import GgufModel
from qconv.grids.ggml import GgmlType, encode
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.verification.blocks import HALVES, decoded, finite_blocks, is_known
from qconv.verification.checksums import build_files, render_checksums
from qconv.verification.gguf import verify_gguf
from tests.conftest import random_model, save_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256: among so many a row is not like another by chance."""
    model = random_model("qwen3_moe", norm_topk_prob=True, hidden_size=256, moe_intermediate_size=256)
    return save_model(model, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as Q8_0; do not write to it."""
    out = tmp_path_factory.mktemp("gguf") / "build"
    recipe = parse_gguf_recipe({"format": "gguf", "type": "Q8_0"})
    quantize_gguf(source, out, recipe, threads=2, progress=lambda *_: None, log=lambda _: None)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "build"))


@pytest.fixture
def file(copy: Path) -> Path:
    return next(copy.glob("*.gguf"))


@pytest.fixture
def alone(file: Path, tmp_path: Path) -> Path:
    """The file without anything beside it."""
    (tmp_path / "alone").mkdir()
    return Path(shutil.copyfile(file, tmp_path / "alone" / "m.gguf"))


def reseal(folder: Path) -> None:
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in build_files(folder)}
    (folder / CHECKSUMS_NAME).write_text(render_checksums(sums))


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as target:
        target.seek(offset)
        target.write(data)


def swap(file: Path, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Exchange two ranges of equal length, each an offset and a number of bytes."""
    content = bytearray(file.read_bytes())
    (a, size), (b, _) = first, second
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    file.write_bytes(content)


def problems(path: Path, against: Path | None = None) -> str:
    return "; ".join(verify_gguf(path, against).problems)


def test_a_sound_build_and_a_sound_file(copy: Path, file: Path, alone: Path, source: Path) -> None:
    for path in (copy, file, alone):
        assert problems(path) == ""
        assert problems(path, source) == ""
    assert "sha256 of 1 files" in verify_gguf(file).checked


def test_a_file_is_held_against_the_checksums_beside_it(copy: Path, file: Path, source: Path) -> None:
    position = file.stat().st_size - 5000
    overwrite(file, position, bytes([file.read_bytes()[position] ^ 16]))
    for path in (file, copy):
        for against in (None, source):
            assert f"{file.name}: its sha256 is not the one" in problems(path, against)
    reseal(copy)
    sums = (copy / CHECKSUMS_NAME).read_text().splitlines(keepends=True)
    (copy / CHECKSUMS_NAME).write_text("".join(line for line in sums if file.name not in line))
    for path in (file, copy):
        assert f"{file.name}: not listed in {CHECKSUMS_NAME}" in problems(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_found_without_a_source(alone: Path, value: float) -> None:
    made = GgufModel.open(alone)
    entry = made.entry("blk.1.ffn_down_exps.weight")
    row_bytes = entry.nbytes // (6 * 256)  # of six experts with 256 outputs
    overwrite(alone, entry.offset + 70 * row_bytes, struct.pack("<e", value))
    assert problems(alone) == "blk.1.ffn_down_exps.weight: 1 blocks of Q8_0 are not finite, the first in row 70"


def test_a_norm_that_is_not_a_number_is_found_without_a_source(alone: Path) -> None:
    entry = GgufModel.open(alone).entry("blk.0.attn_norm.weight")
    overwrite(alone, entry.offset + 8, struct.pack("<f", float("nan")))
    assert "blk.0.attn_norm.weight: 1 blocks of F32 are not finite" in problems(alone)


def test_one_expert_of_a_merged_tensor_is_found(alone: Path, source: Path) -> None:
    entry = GgufModel.open(alone).entry("blk.0.ffn_down_exps.weight")
    size = entry.nbytes // 6
    sound = alone.read_bytes()
    overwrite(alone, entry.offset + 4 * size, bytes(size))
    assert "blk.0.ffn_down_exps.weight, expert 4: " in problems(alone, source)
    alone.write_bytes(sound)
    swap(alone, (entry.offset + size, size), (entry.offset + 3 * size, size))
    found = problems(alone, source)
    assert "expert 1: " in found
    assert "expert 3: " in found
    assert "expert 2: " not in found


def test_one_row_and_a_shifted_block_of_rows_are_found(alone: Path, source: Path) -> None:
    entry = GgufModel.open(alone).entry("token_embd.weight")
    size = entry.nbytes // entry.shape[0]
    sound = alone.read_bytes()
    swap(alone, (entry.offset + 100 * size, size), (entry.offset + 2000 * size, size))
    assert "token_embd.weight: " in problems(alone, source)
    alone.write_bytes(sound)
    block = sound[entry.offset + 40 * size : entry.offset + 56 * size]
    overwrite(alone, entry.offset + 41 * size, block)
    assert "token_embd.weight: " in problems(alone, source)


@pytest.mark.parametrize(
    ("key", "form", "value"),
    [
        ("rope.freq_base", "<f", 12345.0),
        ("expert_used_count", "<I", 1),
        ("attention.layer_norm_rms_epsilon", "<f", 0.1),
        ("context_length", "<I", 7),
    ],
)
def test_a_changed_key_is_named(copy: Path, file: Path, source: Path, key: str, form: str, value: float) -> None:
    name = f"qwen3moe.{key}".encode()
    content = file.read_bytes()
    place = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    overwrite(file, place, struct.pack(form, value))
    reseal(copy)
    assert problems(copy) == ""
    assert f"qwen3moe.{key} is {value:g}, " in problems(copy, source)


def test_a_changed_token_and_template_are_named(copy: Path, file: Path, source: Path) -> None:
    content = file.read_bytes()
    overwrite(file, content.index(b"<|im_start|>") + 2, b"I")
    reseal(copy)
    assert "tokenizer.ggml.tokens is 2048 values" in problems(copy, source)
    file.write_bytes(content)
    place = content.index(b"tokenizer.chat_template") + len(b"tokenizer.chat_template") + 12
    overwrite(file, place, b"EVIL")
    reseal(copy)
    assert 'tokenizer.chat_template is "EVIL' in problems(copy, source)


def test_the_types_are_those_of_the_report(copy: Path) -> None:
    report = copy / REPORT_NAME
    before, _, after = report.read_text().rpartition('"Q8_0"')
    report.write_text(f'{before}"Q4_K"{after}')
    reseal(copy)
    assert "is Q8_0; the build's report says Q4_K" in problems(copy)
    report.write_text("{}")
    reseal(copy)
    assert "qconv-report.json: damaged" in problems(copy)


def test_several_models_in_a_folder_are_all_checked(copy: Path, file: Path) -> None:
    other = Path(shutil.copyfile(file, copy / "other.GGUF"))
    (copy / CHECKSUMS_NAME).unlink()
    (copy / REPORT_NAME).unlink()
    assert problems(copy) == ""
    entry = GgufModel.open(other).entry("output_norm.weight")
    overwrite(other, entry.offset, struct.pack("<f", float("nan")))
    assert "output_norm.weight" in problems(copy)


@pytest.mark.parametrize("type", [type for type in T if is_known(type) and type.name in GgmlType.__members__])
def test_where_scales_are_is_where_the_encoder_puts_them(type: T) -> None:
    """An infinity in each of the places makes the block's values no numbers; sound blocks are finite."""
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    data = encode(values, GgmlType(type), None)
    assert bool(finite_blocks(data, type).all())
    for offset in HALVES.get(type, ()):
        damaged = data.clone()
        damaged[2, offset : offset + 2] = torch.tensor([float("inf")]).half().view(torch.uint8)
        bad = torch.nonzero(~finite_blocks(damaged, type)).flatten()
        assert len(bad) == 1


def test_the_scale_of_iq1_m_is_found_among_the_scales_of_its_parts() -> None:
    """Four bits of it stand in each of four words."""
    weights = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    data = encode(weights, GgmlType.IQ1_M, None)
    for row, bits in ((1, 0x7C00), (3, 0xFC00), (4, 0x7E01)):  # infinities and a NaN
        for word in range(4):
            at = 49 + 2 * word
            data[row, at] = (data[row, at] & 15) | (bits >> 4 * word & 15) << 4
    data[6, 55], data[6, 53] = 0x70, 0x80  # the largest exponents below
    data[7, 55], data[7, 53] = 0x60, 0xF0
    assert torch.nonzero(~finite_blocks(data, T.IQ1_M)).flatten().tolist() == [1, 3, 4]
    assert torch.equal(finite_blocks(data, T.IQ1_M), torch.isfinite(decoded(data, T.IQ1_M)).all(1))
