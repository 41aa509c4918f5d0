"""GGUF builds end to end: what is written stands for the source, survives any stop, and is never mixed up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.build import REPORT_NAME
from qconv.errors import CheckpointError, OutputError, StaleJournalError, UsageError
from qconv.gguf.imatrix import Entry, Imatrix, write_imatrix
from qconv.gguf.reader import GgufModel
from qconv.gguf_pipeline import quantize_gguf
from qconv.gguf_verify import verify_gguf
from qconv.output import Outcome
from qconv.verify import CHECKSUMS_NAME
from tests.conftest import BUNDLED, folder_bytes, random_model, save_model

SPLIT = 60_000  # bytes: a handful of files for the random checkpoints
FILE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K", "IQ4_XS", "MXFP4_MOE")


class Stop(Exception):
    """The plug is pulled."""


def convert(model: Path, out: Path, file_type: str = "Q4_0", **options: Any) -> Outcome:
    """Write GGUF without progress and log."""
    values: dict[str, Any] = {"max_file_size": SPLIT, "threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    return quantize_gguf(model, out, file_type, **values | options)


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
    report = convert(BUNDLED, tmp_path / "out", file_type, max_file_size=10**9).report
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
    convert(sparse, tmp_path / "out", imatrix=imatrix, log=said.append)
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert report["imatrix"] == ["a test"]
    # Two layers of three merged tensors with six experts each.
    assert any("6 of 36 experts' saw no token" in line for line in said)
    assert verify_gguf(tmp_path / "out", sparse).problems == []
    ours, plain = GgufModel.open(tmp_path / "out"), GgufModel.open(made)
    for name, entry in ours.entries.items():
        values = torch.cat(list(ours.dequantized(name)))
        if name.endswith("_exps.weight"):
            assert bool(values.view(entry.shape)[2].any()), "a row of zeros in the imatrix must not erase an expert"
            assert not torch.equal(values, torch.cat(list(plain.dequantized(name))))


def test_an_imatrix_of_another_model_is_refused(sparse: Path, made: Path, tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": Entry(torch.ones(1, 48), torch.ones(1, dtype=torch.float64))}
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(entries, ("another",)))
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q"):
        convert(sparse, tmp_path / "out", imatrix=tmp_path / "imatrix.gguf")


def test_types_that_need_an_imatrix_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gguf:Q2_K_S: .* useless without an imatrix"):
        convert(BUNDLED, tmp_path / "out", "Q2_K_S")
