"""A whole build: what the plan says, what the files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from qconv.artifacts.gguf_tensors import encoded, importance_of
from qconv.artifacts.source import Source
from qconv.building.bench import SliceShape
from qconv.checkpoint import reader
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.imatrix import Entry, Imatrix
from qconv.formats.gguf.names import gguf_tensors
from qconv.formats.gguf.reader import GgufModel
from qconv.grids.ggml import GgmlType, encode
from qconv.models import architecture
from qconv.planning.gguf_plan import plan_gguf, write_file
from tests.formats.gguf.conftest import Write

T = GGMLQuantizationType


def test_the_plan_knows_the_size(write_gguf: Write) -> None:
    plan, files = write_gguf("Q4_K_M", max_split_size=100_000)
    assert plan.output_bytes == sum(file.stat().st_size for file in files)
    weights = sum(tensor.numel for tensor in plan.tensors.values())
    nbytes = sum(entry.nbytes for entry in GgufModel.open(files[0]).entries.values())
    assert plan.bits_per_weight == pytest.approx(8 * nbytes / weights)


def test_a_file_written_again_is_the_same(write_gguf: Write, expressible: Path) -> None:
    plan, files = write_gguf("Q4_K_M", max_split_size=100_000)
    before = files[1].read_bytes()
    files[1].unlink()
    write_file(files[1].parent, plan, plan.files[1], Source.open(expressible))
    assert files[1].read_bytes() == before


def test_splitting_changes_no_tensor(write_gguf: Write) -> None:
    _, (whole,) = write_gguf("Q5_K_M")
    _, files = write_gguf("Q5_K_M", "split", max_split_size=100_000)
    one, other = GgufModel.open(whole), GgufModel.open(files[0])
    for name in one.entries:
        assert torch.equal(torch.cat(list(one.blocks(name))), torch.cat(list(other.blocks(name)))), name


def test_blocks_of_rows_change_no_byte(write_gguf: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (whole,) = write_gguf("Q4_K_M")
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    _, (in_blocks,) = write_gguf("Q4_K_M", "blocks")
    assert in_blocks.read_bytes() == whole.read_bytes()


def test_overrides_reach_the_file(write_gguf: Write) -> None:
    _, (path,) = write_gguf("Q8_0", override=lambda tensor: T.F16 if "ffn_down" in tensor.name else None)
    assert GgufModel.open(path).entry("blk.0.ffn_down_exps.weight").type == T.F16


def test_a_type_without_encoder_is_refused_before_any_work(expressible: Path) -> None:
    with pytest.raises(UsageError, match="I8 has no encoder in qconv"):
        plan_gguf(Source.open(expressible), "Q8_0", "model", override=lambda tensor: T.I8)


def test_weights_that_are_not_finite_leave_no_file(
    expressible: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source.open(expressible)
    plan = plan_gguf(source, "F16", "model")

    def damaged(self: Any, name: str) -> Any:
        raise CheckpointError(f"{name}: not finite.")

    monkeypatch.setattr(type(source), "blocks", damaged)
    with pytest.raises(CheckpointError, match="not finite"):
        write_file(tmp_path, plan, plan.files[0], source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_each_expert_is_encoded_with_its_own_importance(exponent: float, expressible: Path) -> None:
    source = Source.open(expressible)
    plan = plan_gguf(source, "Q4_0", "model", importance=True)
    tensor = plan.tensors["blk.1.ffn_up_exps.weight"]
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(6, 64, generator=generator) * 100
    sums[2] = 0.0  # an expert that no token reached
    counts = torch.tensor([10.0, 20.0, 0.0, 5.0, 1.0, 40.0], dtype=torch.float64)
    entry = Entry(sums, counts)
    importance = importance_of(Imatrix({tensor.name: entry}, ("text",)), 8.0, exponent)
    rows = torch.cat(list(encoded(source, tensor, T.Q4_0, importance))).view(6, 32, -1)
    means = entry.mean_squares(8.0)
    assert means is not None
    for expert, name in enumerate(tensor.sources):
        assert torch.equal(rows[expert], encode(source.read(name), GgmlType.Q4_0, means[expert] ** exponent))
    # Not by chance: without importance the bytes are others, for the expert without tokens too.
    assert not torch.equal(rows[2], encode(source.read(tensor.sources[2]), GgmlType.Q4_0))
    assert bool(rows[2].any())


def test_an_imatrix_of_another_model_is_refused(expressible: Path) -> None:
    source = Source.open(expressible)
    tensor = plan_gguf(source, "Q4_0", "model").tensors["blk.0.attn_q.weight"]
    entry = Entry(torch.ones(1, 128), torch.ones(1, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q\.weight has \[1, 128\] sums, the model needs \[1, 64\]"):
        list(encoded(source, tensor, T.Q4_0, importance_of(Imatrix({tensor.name: entry}, ("text",)), 8.0)))


def test_tensors_of_the_480b_are_read_one_expert_at_a_time() -> None:
    """The largest piece of the checkpoint that is in memory at once is a source tensor's block, never a merged one."""
    read: list[str] = []

    class Reading:
        def blocks(self, name: str) -> Any:
            read.append(name)
            yield torch.zeros(2, 6144, dtype=torch.bfloat16)

    tensor = next(one for one in gguf_tensors(architecture(SliceShape().config(1, 160))) if "up_exps" in one.name)
    blocks = encoded(Reading(), tensor, T.Q8_0)  # type: ignore[arg-type]  # stands in for a Source: it only reads
    assert next(blocks).shape == (2, 6144 // 32 * 34)
    assert read == ["model.layers.0.mlp.experts.0.up_proj.weight"]
