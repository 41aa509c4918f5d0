"""Builds that others' code made run as that code's own dequantization of them.

Each client quantizes small random models and answers what its own unpacking makes of every weight. Our packed weights
must stand for the same numbers, bit for bit; the model must compute what transformers computes with them, in float32,
and continue a prompt with the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qconv
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import Checkpoint
from qconv.errors import CheckpointError
from qconv.runtime.activations import InputRounding
from qconv.runtime.files import open_files
from qconv.runtime.modules import PackedExperts, PackedLinear
from qconv.runtime.packed import DenseWeight
from qconv.verification.build import verify
from tests.conftest import random_model, save_model
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

IDS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "qwen3": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": True},
    # AutoAWQ's clipping wants rows in multiples of 64.
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
}
GPTQ: dict[str, dict[str, Any]] = {
    "v1": {"sym": True, "desc_act": False},
    "v1-desc_act": {"sym": True, "desc_act": True, "act_group_aware": False},
    "v1-asymmetric": {"sym": False, "desc_act": False},
    "v2": {"sym": True, "desc_act": False, "format": "gptq_v2"},
    "v2-asymmetric-desc_act": {"sym": False, "desc_act": True, "act_group_aware": False, "format": "gptq_v2"},
    "8-channel": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "3": {"bits": 3},
    "2-asymmetric": {"bits": 2, "sym": False, "format": "gptq_v2"},
    "awq": {"method": "awq"},
    "awq-asymmetric": {"method": "awq", "sym": False},
    "without-down": {"dynamic": {r"-:.*\.down_proj$": {}}},
    "down-in-8": {"dynamic": {r"+:.*\.down_proj$": {"bits": 8}}},
    "head": {"lm_head": True},
}
ROUTERS = ["lm_head", r"re:.*mlp\.gate$"]
COMPRESSED: dict[str, dict[str, Any]] = {
    "w4a16": {"scheme": "W4A16", "weights": {"group_size": 32}, "ignore": ROUTERS},
    "w4a16-asymmetric": {"scheme": "W4A16_ASYM", "weights": {"group_size": 32}, "ignore": ROUTERS},
    "w8a16": {"scheme": "W8A16", "weights": {"group_size": 32}, "ignore": [*ROUTERS, r"re:.*\.down_proj"]},
    "int8": {"scheme": "INT8", "weights": {}, "ignore": ROUTERS},
    "w4afp8": {"scheme": "W4AFP8", "weights": {"group_size": 32}, "ignore": ROUTERS},
    "fp8": {"scheme": "FP8", "weights": {}, "ignore": ROUTERS},
    "fp8-dynamic": {"scheme": "FP8_DYNAMIC", "weights": {}, "ignore": ROUTERS},
    "fp8-block": {"scheme": "FP8_BLOCK", "weights": {"block_structure": [32, 32]}, "ignore": ROUTERS},
    "w4a16-head": {"scheme": "W4A16", "weights": {"group_size": 32}, "ignore": ROUTERS[1:]},
    "mixed": {
        "scheme": "W4A16",
        "weights": {"group_size": 32},
        "ignore": ROUTERS,
        "others": {
            "FP8_DYNAMIC": [r"re:.*self_attn\.[qkv]_proj$"],
            "INT8": ["model.layers.0.self_attn.o_proj"],
            "W8A16": ["re:.*layers.1.self_attn.o_proj"],
        },
    },
    "nvfp4a16": {"scheme": "NVFP4A16", "weights": {}, "ignore": ROUTERS},
    "nvfp4": {"scheme": "NVFP4", "weights": {}, "ignore": ROUTERS},
    "mxfp4a16": {"scheme": "MXFP4A16", "weights": {}, "ignore": ROUTERS},
    "mxfp8": {"scheme": "MXFP8", "weights": {}, "ignore": ROUTERS},
    "nvfp4-fp8": {
        "scheme": "NVFP4A16",
        "weights": {},
        "ignore": ROUTERS,
        "others": {"FP8_DYNAMIC": [r"re:.*self_attn\..*_proj$"]},
    },
    "w3a16": {"scheme": "W3A16", "weights": {"group_size": 32}, "ignore": ROUTERS},
}
ROUNDED_INPUTS = {"int8": InputRounding(number="int"), "w4afp8": InputRounding(), "w4a16": None}
REFUSED = {
    "down-in-8": r"config\.json: quantization_config\.dynamic has the rule .*down_proj.* Only rules that leave",
    "head": r"config\.json: quantization_config\.lm_head is True; GPTQ is read with false.* quantize the original",
    "w3a16": r"config\.json: quantization_config\.weights is 3-bit int; .* Quantize the original",
    "gemv": r"config\.json: quantization_config says AWQ of version 'gemv' with 4 bits.* save it so",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family, whose config.json old and new versions of transformers read."""
    folder = tmp_path_factory.mktemp("sources")

    def make(family: str) -> Path:
        path = folder / family
        if not path.exists():
            save_model(random_model(family, **SIZES[family]), path)
            config = json.loads((path / "config.json").read_text())
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
            if "num_local_experts" in config:
                config["num_experts"] = config.pop("num_local_experts")
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def dense_model(build: Path, weights: Mapping[str, Tensor], scratch: Path) -> Any:
    """transformers' model of the build's plain tensors and the weights given, in float32."""
    from transformers import AutoModelForCausalLM

    files, stored = open_files(build), Checkpoint.open(build)
    tensors = {
        name: weights[name] if name in weights else stored.read(name).float()
        for name, _ in files.architecture.tensors()
    }
    scratch.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / "model.safetensors")
    (scratch / "config.json").write_text(json.dumps(files.config | {"dtype": "float32"}))
    loaded: Any = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def assert_runs(build: Path, scratch: Path, quantized: int) -> None:
    """Hold a build against the dequantization that lies beside it.

    Args:
        build: Its folder.
        scratch: A folder to make.
        quantized: How many linears are.
    """
    theirs = load_file(build.with_name(f"{build.name}.dense"))
    assert len(theirs) == quantized
    files = open_files(build)
    linears = [linear for layer in files.architecture.layers for linear in layer.linears()]
    head = files.architecture.lm_head
    for linear in [*linears, *([] if head is None else [head])]:
        ours = files.weight(linear)
        assert isinstance(ours, DenseWeight) == (linear.weight not in theirs), linear.name
        if linear.weight in theirs:
            assert torch.equal(ours.dequantize(torch.float32), theirs[linear.weight].float()), linear.name
    wanted, model = dense_model(build, theirs, scratch), qconv.load(build, dtype=torch.float32)
    assert_same(model, wanted)


def assert_source(build: Path) -> None:
    """As a source a build reads as what compressed-tensors makes of it, rounded once."""
    theirs, source = load_file(build.with_name(f"{build.name}.dense")), Source.open(build)
    for name, weight in theirs.items():
        assert torch.equal(source.read(name), weight.float().bfloat16()), name


def assert_same(model: Any, wanted: Any) -> None:
    """Logits equal but for the order of sums in float32, and the same tokens."""
    with torch.no_grad():
        logits = wanted(IDS).logits
        assert float((model(IDS).logits - logits).abs().max()) < 1e-5 * float(logits.abs().max())
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    assert torch.equal(
        model.generate(IDS, attention_mask=mask, **options), wanted.generate(IDS, attention_mask=mask, **options)
    )


def assert_refused(name: str, build: Path) -> None:
    """With the file, the key and a remedy."""
    with pytest.raises(CheckpointError, match=REFUSED[name]) as refusal:
        qconv.load(build)
    assert str(build) in str(refusal.value)


def test_gptqmodel(source: Callable[[str], Path], client: Client, tmp_path: Path) -> None:
    client("gptqmodel", "gptqmodel_quantize", source("llama"), json.dumps(GPTQ), tmp_path)
    for name in GPTQ:
        if name in REFUSED:
            assert_refused(name, tmp_path / name)
        else:
            assert_runs(tmp_path / name, tmp_path / f"{name}-dense", 12 if name == "without-down" else 14)


def test_gptqmodel_of_experts(source: Callable[[str], Path], client: Client, tmp_path: Path) -> None:
    cases = {name: GPTQ[name] for name in ("v1", "v2-asymmetric-desc_act")}
    client("gptqmodel", "gptqmodel_quantize", source("qwen3_moe"), json.dumps(cases), tmp_path)
    for name in cases:
        assert_runs(tmp_path / name, tmp_path / f"{name}-dense", 2 * (4 + 6 * 3))
        assert_loads_in_transformers(tmp_path / name)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_compressed_tensors(source: Callable[[str], Path], client: Client, tmp_path: Path, family: str) -> None:
    script = "compressed_tensors_quantize"
    client("compressed-tensors", script, source(family), json.dumps(COMPRESSED), tmp_path)
    mlps = 6 if family == "qwen3_moe" else 1
    for name in COMPRESSED:
        if name in REFUSED:
            assert_refused(name, tmp_path / name)
            continue
        down = 0 if name == "w8a16" else 1
        assert_runs(tmp_path / name, tmp_path / f"{name}-dense", 2 * (4 + mlps * (2 + down)) + name.endswith("head"))
        assert_source(tmp_path / name)
        result = verify(tmp_path / name, source(family))
        assert (result.problems, result.not_checked) == ([], [])
        assert inspect(tmp_path / name).format is not None
        if name in ROUNDED_INPUTS:
            files = open_files(tmp_path / name)
            assert files.input_rounding(files.architecture.layers[1].heads.o) == ROUNDED_INPUTS[name]


@pytest.mark.parametrize("family", SIZES)
def test_autoawq(source: Callable[[str], Path], client: Client, tmp_path: Path, family: str) -> None:
    # Left to itself, AutoAWQ quantizes routers too.
    cases: dict[str, dict[str, Any]] = {"gemm": {"modules_to_not_convert": ["mlp.gate"]} if "moe" in family else {}}
    if family == "llama":
        cases["gemv"] = {"version": "GEMV"}
    client("autoawq", "autoawq_quantize", source(family), json.dumps(cases), tmp_path)
    assert_runs(tmp_path / "gemm", tmp_path / "dense", 2 * (4 + 6 * 3) if family == "qwen3_moe" else 14)
    assert_loads_in_transformers(tmp_path / "gemm")
    if family == "llama":
        assert_refused("gemv", tmp_path / "gemv")


def test_transformers_block_fp8(source: Callable[[str], Path], client: Client, tmp_path: Path) -> None:
    client(None, "transformers_fp8_quantize", source("llama"), tmp_path / "fp8", 32)
    assert_runs(tmp_path / "fp8", tmp_path / "dense", 14)


def assert_loads_in_transformers(build: Path) -> None:
    """``from_pretrained`` after ``import qconv`` gives the model that ``qconv.load`` gives, packed and complete."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(build, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())
    assert_same(model, qconv.load(build, dtype=torch.float32))
