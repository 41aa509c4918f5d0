"""Importance matrices: both of llama.cpp's forms, merging, and what becomes of experts that saw nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.imatrix import Entry, Imatrix, merge, read_imatrix, write_imatrix

EXPERTS = "blk.0.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"


def entry(sums: list[list[float]], counts: list[float]) -> Entry:
    return Entry(torch.tensor(sums), torch.tensor(counts, dtype=torch.float64))


def means(one: Entry, shrinkage_tokens: float) -> Tensor:
    found = one.mean_squares(shrinkage_tokens)
    assert found is not None
    return found


MATRIX = Imatrix(
    {EXPERTS: entry([[8.0, 2.0], [0.0, 0.0], [3.0, 9.0]], [4.0, 0.0, 1.0]), DENSE: entry([[1.0, 2.0, 3.0]], [1030.0])},
    ("code.txt", "prose.txt"),
    512,
)


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return content + tail


def test_the_gguf_form_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", MATRIX)
    file = GGUFReader(tmp_path / "imatrix.gguf")
    fields = {key: file.fields[key].contents() for key in file.fields if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["code.txt", "prose.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    tensors = {one.name: one for one in file.tensors}
    assert list(tensors) == [f"{DENSE}.in_sum2", f"{DENSE}.counts", f"{EXPERTS}.in_sum2", f"{EXPERTS}.counts"]
    assert {one.tensor_type.name for one in file.tensors} == {"F32"}
    # ggml's order: [n_in, n_expert] and [1, n_expert].
    assert tensors[f"{EXPERTS}.in_sum2"].shape.tolist() == [2, 3]
    assert tensors[f"{EXPERTS}.counts"].shape.tolist() == [1, 3]
    assert tensors[f"{EXPERTS}.in_sum2"].data.tolist() == [[8.0, 2.0], [0.0, 0.0], [3.0, 9.0]]


def test_the_gguf_form_is_read_back(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", MATRIX)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert (found.datasets, found.chunk_size, found.chunk_count) == (("code.txt", "prose.txt"), 512, 2)
    for name, expected in MATRIX.entries.items():
        assert torch.equal(found.entries[name].sums, expected.sums)
        assert torch.equal(found.entries[name].counts, expected.counts)


def test_a_file_of_llama_cpp_with_sums_of_inputs_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    for name, values in (("in_sum2", [[4.0, 6.0]]), ("in_sum", [[-1.0, 1.0]]), ("counts", [[2.0]])):
        writer.add_tensor(f"{DENSE}.{name}", np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert found.entries.keys() == {DENSE}
    assert means(found.entries[DENSE], 8.0).tolist() == [[2.0, 3.0]]


def test_the_legacy_form_gives_means(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 3, 4) + b"data"
    # Stored are mean squares times the number of calls.
    path.write_bytes(legacy({DENSE: (3, [6.0, 1.5, 0.0]), EXPERTS: (2, [2.0, 4.0, 0.0, 0.0, 8.0, 6.0])}, tail))
    found = read_imatrix(path)
    assert found.datasets == ("data",)
    dense = found.entry(DENSE, 1, 3)
    experts = found.entry(EXPERTS, 3, 2)
    assert dense is not None
    assert experts is not None
    assert means(dense, 8.0).tolist() == [[2.0, 0.5, 0.0]]
    # The second expert saw nothing and gets the layer's mean.
    assert means(experts, 0.0).tolist() == [[1.0, 2.0], [2.5, 2.5], [4.0, 3.0]]


def test_the_legacy_form_without_a_tail_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({DENSE: (1, [1.0])}))
    assert read_imatrix(path).datasets == ()


def test_ones_stand_for_an_expert_that_saw_nothing(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({EXPERTS: (7, [14.0, 28.0, 7.0, 7.0])}))
    experts = read_imatrix(path).entry(EXPERTS, 2, 2)
    assert experts is not None
    assert experts.seen.tolist() == [7 * 512.0, 0.0]
    assert means(experts, 8.0).tolist() == [[2.0, 4.0], [2.0, 4.0]]


def test_experts_are_shrunk_toward_their_layer() -> None:
    one = entry([[10.0, 30.0], [0.0, 0.0], [90.0, 10.0]], [10.0, 0.0, 30.0])
    layer = [100.0 / 40.0, 40.0 / 40.0]
    found = means(one, 10.0)
    # (n H_e + k H_layer) / (n + k) with n = k = 10: half its own, [1, 3], and half the layer's.
    assert found[0].tolist() == pytest.approx([(1.0 + layer[0]) / 2, (3.0 + layer[1]) / 2])
    assert found[1].tolist() == pytest.approx(layer)
    assert found[2].tolist() == pytest.approx([(90.0 + 10 * layer[0]) / 40, (10.0 + 10 * layer[1]) / 40])


def test_without_shrinkage_experts_are_their_own_but_never_nothing() -> None:
    found = means(entry([[10.0, 30.0], [0.0, 0.0]], [10.0, 0.0]), 0.0)
    assert found.tolist() == [[1.0, 3.0], [1.0, 3.0]]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any), st.floats(0.0, 100.0), st.integers(0, 2**31))
def test_no_expert_is_ever_without_importance(counts: list[int], shrinkage: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(counts, dtype=torch.float64)
    sums = (torch.rand(len(counts), 8, generator=generator) + 0.1) * tokens[:, None].float()
    found = means(Entry(sums, tokens), shrinkage)
    assert bool((found > 0.0).all())
    # Between an expert's own mean and the layer's.
    layer = sums.double().sum(0) / tokens.sum()
    for row, own, count in zip(found, sums.double(), counts, strict=True):
        low, high = torch.minimum(own / max(count, 1), layer), torch.maximum(own / max(count, 1), layer)
        low = layer if count == 0 else low
        assert bool(((row >= low - 1e-9) & (row <= high + 1e-9)).all())


def test_a_layer_that_saw_nothing_has_no_importance() -> None:
    assert entry([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]).mean_squares(8.0) is None


def test_sums_without_counts_are_nothing() -> None:
    one = entry([[5.0, 5.0], [4.0, 8.0]], [0.0, 4.0])
    assert means(one, 1.0).tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_merging_is_seeing_all_tokens_at_once() -> None:
    other = Imatrix({DENSE: entry([[9.0, 8.0, 7.0]], [10.0])}, ("prose.txt", "more.txt"), 512)
    merged = merge([MATRIX, other])
    assert merged.entries[DENSE].sums.tolist() == [[10.0, 10.0, 10.0]]
    assert merged.entries[DENSE].counts.tolist() == [1040.0]
    assert torch.equal(merged.entries[EXPERTS].sums, MATRIX.entries[EXPERTS].sums)
    assert merged.datasets == ("code.txt", "prose.txt", "more.txt")


def test_the_legacy_form_merges_with_the_new_one() -> None:
    old = Imatrix({EXPERTS: entry([[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]], [2.0])}, ("old.txt",))
    for merged in (merge([MATRIX, old]), merge([old, MATRIX])):
        assert merged.entries[EXPERTS].sums.tolist() == [[9.0, 3.0], [2.0, 2.0], [6.0, 12.0]]
        assert merged.entries[EXPERTS].counts.tolist() == [6.0, 2.0, 3.0]


def test_matrices_of_different_models_do_not_merge() -> None:
    with pytest.raises(UsageError, match="different models"):
        merge([MATRIX, Imatrix({DENSE: entry([[1.0, 2.0]], [1.0])}, ("x",))])
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])


def test_an_entry_of_another_shape_is_refused() -> None:
    assert MATRIX.entry("blk.0.attn_k.weight", 1, 3) is None
    with pytest.raises(UsageError, match=r"has \[1, 3\] sums, the model needs \[1, 4\]"):
        MATRIX.entry(DENSE, 1, 4)


def test_a_matrix_says_what_it_was_collected_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not said on what"):
        write_imatrix(tmp_path / "imatrix.gguf", Imatrix(MATRIX.entries, ()))


def gguf_file(path: Path, kind: str = "imatrix", **tensors: list[list[float]]) -> Path:
    writer = GGUFWriter(path, "")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", "."), np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_broken_gguf_forms_are_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Path, str]] = {
        "model": (gguf_file(tmp_path / "1.gguf", kind="model", a__in_sum2=[[1.0]]), "general.type is 'model'"),
        "counts": (gguf_file(tmp_path / "2.gguf", a__in_sum2=[[1.0]]), "a lacks its counts"),
        "sums": (gguf_file(tmp_path / "3.gguf", a__counts=[[1.0]]), "a lacks its sums"),
        "rows": (
            gguf_file(tmp_path / "4.gguf", a__in_sum2=[[1.0]] * 3, a__counts=[[1.0]] * 2),
            "3 rows of sums and 2 counts",
        ),
        "negative": (gguf_file(tmp_path / "5.gguf", a__in_sum2=[[-1.0]], a__counts=[[1.0]]), "negative or not finite"),
        "nan": (gguf_file(tmp_path / "6.gguf", a__in_sum2=[[float("nan")]], a__counts=[[1.0]]), "not finite"),
        "empty": (gguf_file(tmp_path / "7.gguf", other=[[1.0]]), "no entries"),
    }
    for path, what in cases.values():
        with pytest.raises(CheckpointError, match=what) as caught:
            read_imatrix(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<i", 0),
        struct.pack("<i", -1),
        struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, -5),
        legacy({DENSE: (1, [1.0, 2.0])})[:-3],
        legacy({DENSE: (0, [1.0])}),
        legacy({DENSE: (1, [])}),
        legacy({DENSE: (1, [float("inf")])}),
        legacy({DENSE: (1, [1.0])}, struct.pack("<ii", 1, 10**6)),
        struct.pack("<i", 2) + legacy({DENSE: (1, [1.0])})[4:] * 2,
    ],
)
def test_broken_legacy_forms_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"imatrix\.dat"):
        read_imatrix(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read: No such file"):
        read_imatrix(tmp_path / "imatrix.gguf")
