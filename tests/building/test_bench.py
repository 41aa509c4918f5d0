"""Random slices: true shapes, readable by transformers, every tensor its own, nothing overwritten."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qconv.building import bench
from qconv.building.bench import SliceShape, write_slice
from qconv.calibration.corpus import build_tokens
from qconv.core.architecture import Moe
from qconv.core.settings import CalibrationSettings
from qconv.errors import OutputError, ResourceError, StaleJournalError, UsageError
from qconv.models import architecture
from tests.conftest import folder_bytes

TINY = SliceShape(hidden_size=64, expert_width=32, heads=6, kv_heads=2, head_dim=16, vocab_size=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "slice"
    write_slice(out, layers=2, experts=4, shape=TINY, shard_size=40_000)
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            loaded |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return loaded


def test_default_shapes_are_those_of_the_480b() -> None:
    whole = architecture(SliceShape().config(layers=62, experts=160))
    layer = whole.layers[61]
    assert isinstance(layer.mlp, Moe)
    assert (layer.heads.q.out_features, layer.heads.k.out_features) == (12288, 1024)
    assert (layer.mlp.experts[159].down.out_features, layer.mlp.experts[159].down.in_features) == (6144, 2560)
    assert layer.mlp.top_k == 8
    parameters = sum(torch.Size(size).numel() for _, size in whole.tensors())
    assert round(parameters / 1e9) == 480
    experts = sum(linear.numel for expert in layer.mlp.experts for linear in expert.linears())
    assert round(2 * experts / 1e9, 1) == 15.1  # GB of bf16, the layer of the scale test


def test_shards_and_index_hold_every_tensor_once(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tiny.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert {name: tuple(tensor.shape) for name, tensor in tensors(tiny).items()} == dict(architecture(config).tensors())
    for name, shard in index["weight_map"].items():
        with safe_open(tiny / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tiny).values())
    assert not list(tiny.glob("*.partial"))


def test_no_two_weights_are_equal_and_all_have_the_announced_spread(tiny: Path) -> None:
    weights = {name: tensor.float() for name, tensor in tensors(tiny).items() if tensor.ndim == 2}
    assert len({tensor.numpy().tobytes() for tensor in weights.values()}) == len(weights)
    for name, tensor in weights.items():
        if tensor.numel() > 1000:  # where the estimate of the spread is good to 10 %
            assert 0.7 < tensor.std().item() / bench.WEIGHT_STD < 1.4, name


def test_layer_norms_have_the_same_few_outlier_channels(tiny: Path) -> None:
    norms = {name: tensor.float() for name, tensor in tensors(tiny).items() if tensor.ndim == 1}
    outliers = {
        tuple(torch.nonzero(norm > 5).flatten().tolist()) for name, norm in norms.items() if "layernorm" in name
    }
    assert [len(channels) for channels in outliers] == [1]
    assert all((norm > 0).all() for norm in norms.values())
    assert all(norm.max() < 5 for name, norm in norms.items() if "layernorm" not in name)


def test_a_tensor_larger_than_a_block_is_not_one_block_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_BLOCK", 1024)  # a divisor of the pool
    write_slice(tmp_path / "slice", layers=1, experts=1, shape=TINY)
    flat = tensors(tmp_path / "slice")["model.embed_tokens.weight"].flatten()
    rows = flat[: 18 * 1024].view(torch.int16).view(18, 1024)  # of 300 x 64 elements
    assert len({row.numpy().tobytes() for row in rows}) == 18


def test_seed_decides_every_byte(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        write_slice(tmp_path / name, layers=2, experts=4, shape=TINY, shard_size=40_000, seed=seed)
    files = sorted(path.name for path in tiny.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((tiny / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    first, other = tensors(tiny), tensors(tmp_path / "other")
    assert not [name for name in first if torch.equal(first[name], other[name])]


def test_transformers_loads_it_and_activations_stay_sane(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = build_tokens(CalibrationSettings(tokens=64, sequence_length=32), tiny).ids.long()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert all(state.isfinite().all() for state in states)
    assert max(state.std().item() for state in states) < 10


def test_tokenizer_has_a_token_for_every_byte_and_a_chat_template(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    text = "naïve 數 \x00\t\n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat).input_ids[0] == 258
    assert len(tokenizer) == 260  # 256 bytes, a merge and three special tokens


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_slice(tmp_path / "slice", layers=1, experts=1, shape=TINY, progress=lambda *args: seen.append(args))
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert {total for _, _, total in seen} == {done[-1]}


def test_top_k_does_not_exceed_the_experts() -> None:
    assert SliceShape().config(layers=1, experts=3)["num_experts_per_tok"] == 3


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(OutputError, match="not an empty folder"):
            write_slice(out, layers=1, experts=1, shape=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 10**6))
    with pytest.raises(ResourceError, match=r"needs 19\.2 GB of disk and 0\.0 GB are free"):
        write_slice(tmp_path / "new" / "slice", layers=1, experts=160)
    assert not list(tmp_path.iterdir())


class Killed(Exception):
    """The process died here."""


def test_a_killed_slice_goes_on_and_ends_with_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"layers": 2, "experts": 4, "shape": TINY, "shard_size": 40_000}
    real, made = Path.rename, 0
    while True:  # killed before each of its renames in turn, it goes on in one folder
        renames = iter(range(made + 1))
        with monkeypatch.context() as patch:

            def rename(self: Path, target: Path, renames: Iterator[int] = renames) -> Path:
                if next(renames, None) is None:
                    raise Killed
                return real(self, target)

            patch.setattr(Path, "rename", rename)
            try:
                write_slice(tmp_path / "out", **arguments)
            except Killed:
                made = 0 if made else 1
            else:
                break
    assert folder_bytes(tmp_path / "out") == folder_bytes(tiny)
    with pytest.raises(OutputError, match="not an empty folder"):
        write_slice(tmp_path / "out", **arguments)


@pytest.mark.parametrize("name", ["a shard", "config.json", "tokenizer.json"])
def test_a_slice_replaces_nothing_that_it_did_not_write(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"layers": 2, "experts": 4, "shape": TINY, "shard_size": 40_000}
    if name == "a shard":
        name = sorted(tiny.glob("*.safetensors"))[1].name

    def kill(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        write_slice(tmp_path / "out", **arguments, progress=kill)
    with pytest.raises(StaleJournalError, match="slice changed"):
        write_slice(tmp_path / "out", **arguments | {"seed": 1})
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(OutputError, match=name):
        write_slice(tmp_path / "out", **arguments)
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (-1, 4)])
def test_impossible_counts_are_usage_errors(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(UsageError):
        write_slice(tmp_path / "slice", layers=counts[0], experts=counts[1], shape=TINY)


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 1), (3, 7)])
def test_the_size_is_known_without_the_model(layers: int, experts: int) -> None:
    described = architecture(TINY.config(layers, experts))
    assert TINY.nbytes(layers, experts) == 2 * sum(torch.Size(shape).numel() for _, shape in described.tensors())


@pytest.mark.parametrize(("layers", "experts"), [(10**9, 160), (62, 10**9), (2**63 - 1, 2**63 - 1)])
def test_more_than_the_disk_holds_is_refused_before_it_is_described(
    tmp_path: Path, layers: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[int] = []

    def describe(config: dict[str, Any]) -> Any:
        described.append(config["num_hidden_layers"] * config["num_experts"])
        return architecture(config)

    monkeypatch.setattr(bench, "architecture", describe)
    with pytest.raises(ResourceError, match="GB of disk"):
        write_slice(tmp_path / "out", layers=layers, experts=experts)
    assert max(described) == 2  # what a layer adds, and an expert
    assert not (tmp_path / "out").exists()


def test_more_than_a_config_may_say_is_refused_though_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 10**30))
    with pytest.raises(UsageError, match="not plausible"):
        write_slice(tmp_path / "out", layers=10**9, experts=1, shape=TINY)
    assert not (tmp_path / "out").exists()
