"""TensorRT-LLM's PyTorch backend: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qconv.engines import common
from qconv.engines.common import FP8, is_compressed, of_layout
from qconv.engines.names import is_class
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import MODELOPT, Deployment, Subject, targets_of

VERSION = "TensorRT-LLM main of 2026-09"
_WORDS = "models/quant_config_utils.py"
_CONFIG = "_torch/model_config.py: load_hf_quant_config"
_KNOWN = ("fp8", "mxfp4", "mxfp8", "compressed-tensors", "nvfp4", MODELOPT)


def _groups(subject: Subject) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any] | None, str]]:
    """Each config group: its name, weights, inputs and format."""
    section = subject.section or {}
    groups = section.get("config_groups")
    if not is_compressed(subject) or not isinstance(groups, dict):
        return
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            inputs = group.get("input_activations")
            yield name, weights, inputs if isinstance(inputs, dict) else None, str(group.get("format", ""))


def _is_mxfp4(weights: Mapping[str, Any], form: str) -> bool:
    return form == "mxfp4-pack-quantized" or (weights.get("type") == "float" and weights.get("strategy") == "group")


def _weights_alone(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name, weights, inputs, form in _groups(subject):
        if inputs is None and not _is_mxfp4(weights, form):
            yield f"config_groups.{name}: {weights.get('num_bits')}-bit {weights.get('type')}, inputs as they are"


def _int8(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name, weights, inputs, _ in _groups(subject):
        if inputs is not None and weights.get("num_bits") == 8 and weights.get("type") == "int":
            yield f"config_groups.{name}"


def _int4(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name, weights, inputs, _ in _groups(subject):
        if inputs is not None and weights.get("num_bits") == 4 and weights.get("type", "int") == "int":
            yield f"config_groups.{name}"


def _by_tensor(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name, weights, inputs, _ in _groups(subject):
        if inputs is None or weights.get("num_bits") != 8 or weights.get("type") != "float":
            continue
        pair = weights.get("strategy"), inputs.get("strategy")
        if pair not in (("channel", "token"), ("block", "group")):
            yield f"config_groups.{name}: weights by {pair[0]}, inputs by {pair[1]}"


def _odd_block(subject: Subject, deployment: Deployment) -> Iterator[str]:
    block = (subject.section or {}).get("weight_block_size")
    if block is not None and block != [128, 128]:
        yield f"quantization_config.weight_block_size is {block}"


def _odd_group(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name, weights, _, form in _groups(subject):
        wanted = 32 if _is_mxfp4(weights, form) else 16
        if weights.get("num_bits") == 4 and weights.get("type") == "float" and weights.get("group_size") != wanted:
            yield f"config_groups.{name}: groups of {weights.get('group_size')}, not {wanted}"


def _class_targets(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if not is_compressed(subject) or len(subject.config_groups) < 2:
        return
    for name, group in subject.config_groups.items():
        targets = targets_of(group)
        if not targets or any(map(is_class, targets)):
            yield f"config_groups.{name} targets {group.get('targets')}"


def _unmatched_target(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if not is_compressed(subject) or len(subject.config_groups) < 2:
        return
    owned = {id(group) for group in subject.groups.values()}
    yield from (f"config_groups.{name}" for name, group in subject.config_groups.items() if id(group) not in owned)


def _unknown_method(subject: Subject, deployment: Deployment) -> Iterator[str]:
    method = (subject.section or {}).get("quant_method")
    if subject.section is not None and method not in _KNOWN:
        yield f"quantization_config.quant_method is {method}"


def _cache(subject: Subject, deployment: Deployment) -> Iterator[str]:
    scheme = (subject.section or {}).get("kv_cache_scheme")
    if isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
        yield f"kv_cache_scheme: {scheme.get('num_bits')}-bit {scheme.get('type')}"


def _cache_without_scales(subject: Subject, deployment: Deployment) -> Iterator[str]:
    section, file = subject.section or {}, subject.quantization_file or {}
    inner = file.get("quantization")
    told = isinstance(section.get("kv_cache_scheme"), dict) or (
        isinstance(inner, dict) and inner.get("kv_cache_quant_algo") == "FP8"
    )
    if told and not common.cache_scales(subject):
        yield "the config tells of an FP8 cache"


def _two_configs(subject: Subject, deployment: Deployment) -> Iterator[str]:
    inner = (subject.quantization_file or {}).get("quantization")
    if not isinstance(inner, dict) or subject.section is None:
        return
    for key, other in (("quant_algo", "quant_algo"), ("kv_cache_quant_algo", "kv_cache_quant_algo")):
        ours, theirs = subject.section.get(key), inner.get(other)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"{key}: {ours} in config.json, {theirs} in hf_quant_config.json"


RULES = (
    Rule(
        "tensorrt-llm/int8",
        Effect.WRONG,
        "read",
        f"{_WORDS}: looks at num_bits and strategy, not at type",
        "takes int8 weights for FP8",
        "take fp8-dynamic",
        _int8,
    ),
    Rule(
        "tensorrt-llm/two-configs",
        Effect.WRONG,
        "read",
        "_torch/model_config.py: warn_if_inline_diverges",
        "believes hf_quant_config.json where config.json says something else, and only warns",
        "make both say the same",
        _two_configs,
    ),
    Rule(
        "tensorrt-llm/cache-scales",
        Effect.WRONG,
        "thread",
        "TensorRT-LLM #16916: 22 points lost",
        "takes scales of 1.0 for an FP8 cache whose scales are not there",
        "calibrate them, or leave the cache alone",
        _cache_without_scales,
    ),
    Rule(
        "tensorrt-llm/weights-alone",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: asks for the strategy of input_activations, which is null",
        "fails on compressed-tensors whose inputs are not quantized, but for MXFP4",
        "take fp8, fp8-dynamic or nvfp4-w4a4",
        _weights_alone,
    ),
    Rule(
        "tensorrt-llm/int4",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: Unsupported quant_bits",
        "reads no integers of 4 bits in compressed-tensors",
        "take nvfp4-w4a4, or w4afp8",
        _int4,
    ),
    Rule(
        "tensorrt-llm/strategy",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: Unsupported weights_quant_strategy",
        "reads FP8 of compressed-tensors by channel and token, or block and group, alone",
        "take fp8-dynamic or fp8",
        _by_tensor,
    ),
    Rule(
        "tensorrt-llm/block",
        Effect.REFUSED,
        "read",
        f"{_CONFIG}: FP8_BLOCK_SCALES only supports block_size=(128,128)",
        "reads blocks of 128 x 128 alone",
        "take those",
        of_layout(FP8)(_odd_block),
    ),
    Rule(
        "tensorrt-llm/group",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: Unsupported group_size",
        "reads NVFP4 in groups of 16 and MXFP4 in groups of 32 alone",
        "take those",
        _odd_group,
    ),
    Rule(
        "tensorrt-llm/class-target",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: targets that select modules by class name are not supported",
        "refuses classes as targets where there are several groups",
        "name linears by regular expressions (qconv does)",
        _class_targets,
    ),
    Rule(
        "tensorrt-llm/unmatched-target",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: config_groups targets matched no checkpoint module",
        "refuses a group that targets nothing, where there are several",
        "leave the group out",
        _unmatched_target,
    ),
    Rule(
        "tensorrt-llm/method",
        Effect.REFUSED,
        "read",
        f"{_CONFIG} has no branch for it: takes the model to be dense",
        "reads no AutoAWQ, GPTQ or other words, and finds no plain weights",
        "take fp8, fp8-dynamic or nvfp4-modelopt",
        _unknown_method,
    ),
    Rule(
        "tensorrt-llm/cache",
        Effect.REFUSED,
        "read",
        f"{_WORDS}: Unsupported kv_cache_scheme",
        "reads an FP8 cache alone",
        "take kv_cache_scheme of 8-bit floats",
        _cache,
    ),
    *common.of_ranks(
        "tensorrt-llm",
        "serve with expert parallelism, or fewer ranks",
        blocks=("read", "_torch/modules/linear.py asserts whole blocks of a rank"),
    ),
    common.not_gguf("tensorrt-llm", _CONFIG),
    common.no_generation_config("tensorrt-llm", "read", "llmapi/llm_utils.py"),
)
ENGINE = Engine(
    "tensorrt-llm",
    VERSION,
    {
        "fp8": "read",
        "float-quantized": "read",
        "nvfp4-pack-quantized": "read",
        "mxfp4-pack-quantized": "read",
        "mixed-precision": "read",
        "modelopt NVFP4": "read",
        "modelopt FP8": "read",
        "mxfp4": "read",
        "dense": "read",
    },
    RULES,
)
