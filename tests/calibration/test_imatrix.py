"""Importance matrices that are collected here, against sums over what transformers' own modules see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qconv.artifacts.source import Source
from qconv.building.imatrix_pipeline import ImatrixTarget
from qconv.building.run import make_builds
from qconv.calibration import layer as layer_module
from qconv.calibration import squares
from qconv.calibration.corpus import build_tokens
from qconv.calibration.imatrix import IMATRIX_NAME
from qconv.calibration.stream import LayerStream
from qconv.core.architecture import Mlp, Moe
from qconv.core.settings import TextSettings
from qconv.errors import VerificationError
from qconv.folders.journal import WORK_FOLDER
from qconv.formats.gguf.imatrix import Entry, Imatrix, read_imatrix
from qconv.verification.outcome import Progress
from tests.calibration.test_forward import Float32File
from tests.conftest import BUNDLED, folder_bytes, random_model, save_model

TEXT = TextSettings(tokens=128, sequence_length=32)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"head_dim": 16, "num_experts_per_tok": 3}),
    ("mixtral", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
]


def collect(
    model: Path, out: Path, text: TextSettings = TEXT, threads: int = 2, progress: Progress = lambda *_: None
) -> Path:
    """The matrix of a model, also of one that llama.cpp could not run; a run that was stopped goes on."""
    source = Source.open(model)
    target = ImatrixTarget(source, text, out)
    make_builds(source, [target], out, restart=False, threads=threads, progress=progress, log=lambda _: None)
    return out / IMATRIX_NAME


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations between layers in float32, as transformers holds them."""
    monkeypatch.setattr(layer_module, "ActivationFile", Float32File)


def linear_inputs(model: Path, ids: Tensor, source: Source) -> dict[str, Tensor]:
    """What the modules of each layer see in transformers, float64 [tokens, in_features], by module name."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.eval()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, arguments, named: seen.update(
            {name: (arguments[0] if arguments else named["hidden_states"]).flatten(0, 1).double()}
        )

    for one in source.architecture.layers:
        module = loaded.model.layers[one.index]
        module.mlp.register_forward_pre_hook(keep(f"{one.index}.mlp"), with_kwargs=True)
        for name in ("q_proj", "o_proj"):
            projection = getattr(module.self_attn, name)
            projection.register_forward_pre_hook(keep(f"{one.index}.{name}"), with_kwargs=True)
    with torch.no_grad():
        loaded(ids.long())
    return seen


def inner(source: Source, mlp: Mlp, inputs: Tensor) -> Tensor:
    """What down sees, by the definition of a gated MLP, in float64."""

    def applied(linear: Any) -> Tensor:
        bias = source.read(f"{linear.name}.bias").double() if linear.bias else None
        return functional.linear(inputs, source.read(linear.weight).double(), bias)

    return functional.silu(applied(mlp.gate)) * applied(mlp.up)


def expected_entries(model: Path, text: TextSettings) -> dict[str, Entry]:
    """The matrix by its definition."""
    source = Source.open(model)
    seen = linear_inputs(model, build_tokens(text, model).ids, source)
    found: dict[str, Entry] = {}

    def put(name: str, *inputs: Tensor) -> None:
        sums = torch.stack([one.square().sum(0) for one in inputs]).float()
        found[f"blk.{name}.weight"] = Entry(sums, torch.tensor([float(len(one)) for one in inputs]).double())

    for one in source.architecture.layers:
        index = one.index
        for name in ("attn_q", "attn_k", "attn_v"):
            put(f"{index}.{name}", seen[f"{index}.q_proj"])
        put(f"{index}.attn_output", seen[f"{index}.o_proj"])
        inputs = seen[f"{index}.mlp"]
        if not isinstance(one.mlp, Moe):
            for name in ("ffn_gate", "ffn_up"):
                put(f"{index}.{name}", inputs)
            put(f"{index}.ffn_down", inner(source, one.mlp, inputs))
            continue
        put(f"{index}.ffn_gate_inp", inputs)
        scores = inputs @ source.read(one.mlp.router.weight).double().t()
        best = scores.topk(one.mlp.top_k).indices
        routed = [inputs[(best == expert).any(dim=1)] for expert in range(len(one.mlp.experts))]
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            put(f"{index}.{name}", *routed)
        downs = [inner(source, expert, mine) for expert, mine in zip(one.mlp.experts, routed, strict=True)]
        put(f"{index}.ffn_down_exps", *downs)
        if one.mlp.shared_expert is not None:
            for name in ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp"):
                put(f"{index}.{name}", inputs)
            put(f"{index}.ffn_down_shexp", inner(source, one.mlp.shared_expert, inputs))
    return found


def assert_same(found: Imatrix, expected: Mapping[str, Entry]) -> None:
    """Counts equal, sums up to the order of float32 sums."""
    assert found.entries.keys() == expected.keys()
    for name, entry in expected.items():
        assert torch.equal(found.entries[name].counts, entry.counts), name
        torch.testing.assert_close(
            found.entries[name].sums, entry.sums, rtol=2e-4, atol=1e-6 * float(entry.sums.max()), msg=name
        )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=lambda value: str(value))
def test_it_is_what_transformers_modules_see(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(random_model(model_type, **changes), tmp_path / "model")
    found = read_imatrix(collect(model, tmp_path / "out"))
    assert_same(found, expected_entries(model, TEXT))
    assert found.chunk_size == 32
    assert found.chunk_count == 4
    assert found.datasets[0].startswith("python-stdlib, seed 0: 4 x 32 tokens")


@pytest.mark.usefixtures("exact")
def test_it_is_what_transformers_modules_see_in_the_bundled_model(tmp_path: Path) -> None:
    text = TextSettings(tokens=2048, sequence_length=256)
    assert_same(read_imatrix(collect(BUNDLED, tmp_path / "out", text)), expected_entries(BUNDLED, text))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3"])
def test_bytes_do_not_depend_on_threads_or_on_how_experts_are_shared_out(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(random_model(model_type, **({"head_dim": 16} if model_type == "qwen2_moe" else {})), tmp_path)
    monkeypatch.setattr(squares, "WINDOW_TOKENS", 48)  # an MLP's tokens in several windows, a sequence in one
    one = collect(model, tmp_path / "1", threads=1).read_bytes()
    assert collect(model, tmp_path / "3", threads=3).read_bytes() == one
    monkeypatch.setattr(squares, "WHOLE_TOKENS", 5)  # every MLP is worked on window by window
    assert collect(model, tmp_path / "shared", threads=3).read_bytes() == one


def test_an_expert_without_tokens_has_no_sums_and_no_count(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", norm_topk_prob=True, num_experts_per_tok=1)
    for one in model.model.layers:
        with torch.no_grad():  # the mean of two others never wins
            one.mlp.gate.weight[3] = (one.mlp.gate.weight[0] + one.mlp.gate.weight[1]) / 2
    found = read_imatrix(collect(save_model(model, tmp_path / "model"), tmp_path / "out"))
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        entry = found.entries[name]
        assert entry.counts[3] == 0
        assert not bool(entry.sums[3].any())
        assert int(entry.counts.sum()) == TEXT.tokens
        shrunk = entry.mean_squares(16.0)
        assert shrunk is not None
        assert bool((shrunk > 0).all()), "it takes its layer's importance, never none"


class Stop(Exception):
    """The plug is pulled."""


def test_stopped_anywhere_and_resumed_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")
    whole = folder_bytes(collect(model, tmp_path / "whole").parent)
    shown: list[str] = []
    collect(model, tmp_path / "count", progress=lambda what, *_: shown.append(what))
    assert folder_bytes(tmp_path / "count") == whole
    assert shown[-1] == "finishing"
    for stop_at in range(0, len(shown), 3):
        out, left = tmp_path / str(stop_at), iter(range(stop_at))

        def progress(*_: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Stop

        with pytest.raises(Stop):
            collect(model, out, progress=progress)
        assert (out / IMATRIX_NAME).exists() == (shown[stop_at] == "finishing")
        collect(model, out)
        assert folder_bytes(out) == whole
        assert not (out / WORK_FOLDER).exists()


def test_a_crash_between_sums_and_outputs_repeats_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")
    whole = collect(model, tmp_path / "whole").read_bytes()

    def pull(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "advance", pull)
        with pytest.raises(Stop):
            collect(model, tmp_path / "out")
    assert (tmp_path / "out" / WORK_FOLDER / "imatrix-00000.gguf").exists()
    assert collect(model, tmp_path / "out").read_bytes() == whole


def test_sums_that_were_changed_are_not_used(tmp_path: Path) -> None:
    model = save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")

    def damage(what: str, done: int, total: int) -> None:
        if what == "imatrix layer 1" and done == total:
            path = tmp_path / "out" / WORK_FOLDER / "imatrix-00000.gguf"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    with pytest.raises(VerificationError, match=r"imatrix-00000\.gguf: was collected but is now missing or changed"):
        collect(model, tmp_path / "out", progress=damage)
    assert not (tmp_path / "out" / IMATRIX_NAME).exists()
