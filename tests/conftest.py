"""What several tests share: small random checkpoints of every family, builds of them, and a disk that can be filled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from qconv.building.output import Outcome
from qconv.building.pipeline import quantize
from qconv.core.qtensor import Grid, QTensor
from qconv.planning.recipe import Recipe, parse_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = REPOSITORY / "evals/models/tiny-coder-moe"
VOCABULARY = 2048  # of the bundled model's tokenizer, which the random checkpoints borrow

# Deadlines fail on a busy machine. Forty examples each keep the whole suite within minutes.
hypothesis.settings.register_profile("qconv", deadline=None, max_examples=40)
hypothesis.settings.load_profile("qconv")

# Sizes as small as groups of 32 allow. heads * head_dim differs from hidden_size, and o's input from v's output, so
# that a confusion of the two shows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS | {"num_experts": 6},
    "qwen2_moe": EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3": {},
    "llama": {},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small operations only wait for each other on a shared machine."""
    torch.set_num_threads(1)


def random_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model in float32: its weights are bf16 numbers, its norms and biases not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | FAMILIES.get(model_type, {}) | changes)
    config._attn_implementation = "eager" if model_type == "gpt_oss" else "sdpa"  # of sinks sdpa knows nothing
    generator = torch.Generator().manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        corrections = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("_bias"))
        for name, parameter in (*model.named_parameters(), *corrections):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("layernorm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
                parameter[5::23] *= 8.0  # outlier channels, as trained models have them: what AWQ lives on
            elif name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith(("_bias", ".bias")):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))  # attention far from uniform, experts apart
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def save_model(model: Any, folder: Path, max_shard_size: str = "300KB") -> Path:
    """Save as a bf16 checkpoint of several shards, with the bundled model's tokenizer."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


def small_recipe(method: str = "rtn", output_format: str = "w4a16", **changes: Any) -> Recipe:
    """A recipe that suits the random checkpoints: groups of 32, few tokens, the least search that is allowed."""
    values: dict[str, Any] = {
        "format": output_format,
        "method": method,
        "grid": {"group_size": 32},
        "clip": {"steps": 2},
        "awq": {"search_tokens": 16},
        "calibration": {"tokens": 128, "sequence_length": 32, "shrinkage_tokens": 16},
    }
    for key, value in changes.items():
        section = values.get(key)
        values[key] = {**section, **value} if isinstance(section, dict) else value
    return parse_recipe(values)


GRIDS: dict[str, dict[str, Any]] = {
    "fp8": {"bits": 8, "group_size": 128},
    "fp8_dynamic": {"bits": 8, "group_size": -1},
    "fp8_static": {"bits": 8, "group_size": -1},
    "gpt_oss": {"bits": 4, "group_size": 32},
    "mlx": {"bits": 4, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32},
    "mxfp8": {"bits": 8, "group_size": 32},
    "nvfp4": {"bits": 4, "group_size": 16},
    "nvfp4_modelopt": {"bits": 4, "group_size": 16},
    "nvfp4_w4a4": {"bits": 4, "group_size": 16},
    "w4a8": {"group_size": 128},
    "w4afp8": {"bits": 8, "group_size": 128},
    "w8a8": {"bits": 8, "group_size": -1},
}
"""The grid of formats that hold no int4 in groups of 32."""


def build(model: Path, out: Path, recipe: Recipe, **options: Any) -> Outcome:
    """Quantize without progress and log."""
    options = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    return quantize(model, out, recipe, **options)


def random_qtensor(grid: Grid, out_features: int, in_features: int, seed: int) -> QTensor:
    """Random codes, scales and zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, grid.levels, shape, generator=generator, dtype=torch.uint8)

    groups = grid.groups(in_features)
    scales = (0.01 + torch.rand(out_features, groups, generator=generator)).to(grid.scale_dtype)
    zero_points = None if grid.symmetric else codes(out_features, groups)
    return QTensor(grid, codes(out_features, in_features), scales, zero_points)


def random_float_qtensor(grid: Grid, out_features: int, in_features: int, seed: int) -> QTensor:
    """The same on a float grid: every finite E4M3 number can occur."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8) << 7
    scales = 0.01 + torch.rand(grid.scale_shape(out_features, in_features), generator=generator)
    input_scale = torch.rand((), generator=generator) + 0.01 if grid.activations == "static" else None
    return QTensor(grid, codes.view(torch.float8_e4m3fn), scales.to(grid.scale_dtype), None, input_scale=input_scale)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model; do not write to it."""
    return BUNDLED


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe checkpoint of two layers in several shards; do not write to it."""
    return save_model(random_model("qwen3_moe"), tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture
def moe_copy(moe: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(moe, tmp_path / "model"))


@pytest.fixture(scope="session")
def rtn_build(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` rounded to w4a16; do not write to it."""
    return build(moe, tmp_path_factory.mktemp("rtn") / "build", small_recipe()).out


@pytest.fixture(scope="session")
def awq_build(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` with AWQ's method and format; do not write to it."""
    return build(moe, tmp_path_factory.mktemp("awq") / "build", small_recipe("awq", "awq")).out


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Replaces keys of a JSON object in a file; None removes one."""

    def edit(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting needs root")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "qconv", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
