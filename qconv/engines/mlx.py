"""mlx-lm: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.engines import common
from qconv.engines.common import FP8, is_compressed, of_layout
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import MODELOPT, Deployment, Subject

VERSION = "mlx-lm main of 2026-09"
_LOAD = "mlx_lm/utils.py: load_model"
_TYPES = "mlx_lm/models/qwen3_moe.py"
_PLAIN_STACK = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
"""Types whose sanitize stacks experts by their plain weights alone, before any other words are translated."""
_BASE_ALONE = ("qwen3_moe",)
"""Types whose rotary embedding is made from rope_theta and nothing else."""
_DIVIDED = ("mixtral", "qwen2", "qwen2_moe")
"""Types whose heads are the hidden size over their number, whatever head_dim says."""
_FLAT_KEYS = {"qwen3_moe": ("rope_theta", "num_experts"), "qwen3": ("rope_theta",)}
"""Keys that a type's arguments have no default for, and that transformers 5 writes elsewhere."""


def _head_dim(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Heads of another size than the hidden size over their number, of types that know no other."""
    hidden, heads, size = (subject.text.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if subject.model_type not in _DIVIDED or not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    if size not in (None, hidden // heads):
        yield f"head_dim is {size}, hidden_size over num_attention_heads {hidden // heads}"


def _file_names(subject: Subject, deployment: Deployment) -> Iterator[str]:
    shards = [name for name in subject.files or () if name.endswith(".safetensors")]
    yield from (name for name in shards if not name.startswith("model"))


def _groups(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, weights in common.integers(subject):
        if weights.get("num_bits") != 4 or weights.get("group_size") != 32:
            yield f"{module}: {weights.get('num_bits')} bits in groups of {weights.get('group_size')}"


def _integers_of_experts(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.model_type in _PLAIN_STACK and (is_compressed(subject) or subject.layout == "awq"):
        yield from (names[0] for names in subject.experts.values() if names[0] in subject.quantized)


def _gptq(subject: Subject, deployment: Deployment) -> Iterator[str]:
    first = next(iter(subject.quantized), None)
    if first is not None:
        yield f"{first}.g_idx" if "g_idx" in subject.quantized[first] else f"{first}.qweight"


def _awq_bits(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.number("bits") not in (None, 4):
        yield f"quantization_config.bits is {subject.number('bits')}"


def _fp8(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.model_type in (*_PLAIN_STACK, *_FLAT_KEYS, "llama"):
        yield from (f"{name}.weight_scale_inv" for name in subject.quantized)


def _flat_keys(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (key for key in _FLAT_KEYS.get(subject.model_type, ()) if subject.text.get(key) is None)


def _scaled_rope(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.model_type not in _BASE_ALONE:
        return
    for key in ("rope_scaling", "rope_parameters"):
        told = subject.text.get(key)
        kind = (told.get("rope_type") or told.get("type")) if isinstance(told, dict) else None
        if kind not in (None, "default"):
            yield f"{key} is {kind}"
            return


def _no_section(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.section is None:
        yield from (f"{name}.scales" for name, leaves in subject.modules.items() if "scales" in leaves)


def _override(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Exceptions of MLX's own layout that name no module: these fall back to the common grid."""
    if subject.layout == "mlx":
        for key, value in (subject.section or {}).items():
            if isinstance(value, dict) and key not in subject.modules:
                yield key


RULES = (
    Rule(
        "mlx/scaled-rope",
        Effect.WRONG,
        "read",
        f"{_TYPES}: nn.RoPE with base alone",
        "takes rope_theta and drops YaRN or another scaling without a word",
        "serve contexts up to the original length, or with another engine",
        _scaled_rope,
    ),
    Rule(
        "mlx/override",
        Effect.WRONG,
        "read",
        f"{_LOAD}: class_predicate looks modules up by their own path; mlx-vlm PR #1728",
        "decodes a module on the common grid where its exception is written under another path",
        "name modules as mlx-lm does, after its sanitize",
        _override,
    ),
    Rule(
        "mlx/head-dim",
        Effect.REFUSED,
        "run",
        "mlx-lm 0.32.2: tiny builds of mixtral, qwen2 and qwen2_moe, whose attention is made without head_dim",
        "makes attention of other shapes than the build's",
        "serve with another engine",
        _head_dim,
    ),
    Rule(
        "mlx/groups",
        Effect.REFUSED,
        "read",
        f"{_LOAD}: takes 4 bits in groups of 32 for compressed-tensors, whatever the config says",
        "expects other shapes of scales",
        "take int4 in groups of 32; or qconv convert --to bf16, then mlx_lm.convert",
        lambda subject, deployment: _groups(subject, deployment) if is_compressed(subject) else (),
    ),
    Rule(
        "mlx/experts",
        Effect.REFUSED,
        "read",
        f"{_TYPES}: sanitize runs first and stacks plain weights alone",
        "finds experts' codes under names that it does not know",
        "qconv convert --to bf16, then mlx_lm.convert",
        _integers_of_experts,
    ),
    Rule(
        "mlx/gptq",
        Effect.REFUSED,
        "read",
        "mlx_lm/utils.py: _transform_awq_weights refuses g_idx and unpacks along the output, as AutoAWQ packs",
        "does not read GPTQ's words",
        "qconv convert --to bf16, then mlx_lm.convert",
        of_layout("gptq")(_gptq),
    ),
    Rule(
        "mlx/awq-bits",
        Effect.REFUSED,
        "read",
        "mlx_lm/utils.py: Only bits=4 is supported",
        "reads AutoAWQ of 4 bits alone",
        "take 4 bits",
        of_layout("awq")(_awq_bits),
    ),
    Rule(
        "mlx/fp8",
        Effect.REFUSED,
        "read",
        f"{_LOAD} is strict, and this type's sanitize knows no weight_scale_inv",
        "finds scales that it has no place for",
        "qconv convert --to bf16, then mlx_lm.convert",
        of_layout(FP8)(_fp8),
    ),
    Rule(
        "mlx/flat-keys",
        Effect.REFUSED,
        "thread",
        "mlx-lm #1563, PR #1898",
        "asks for keys of config.json that transformers 5 writes elsewhere",
        "write both (qconv does)",
        _flat_keys,
    ),
    Rule(
        "mlx/file-names",
        Effect.REFUSED,
        "read",
        f"{_LOAD}: model*.safetensors",
        "reads files that are called so alone",
        "rename the shards, and their names in the index",
        _file_names,
    ),
    Rule(
        "mlx/no-section",
        Effect.REFUSED,
        "read",
        f"{_LOAD}: quantizes only where config.json says quantization",
        "has no place for scales where config.json says nothing of quantization",
        "write quantization into config.json",
        _no_section,
    ),
    Rule(
        "mlx/method",
        Effect.REFUSED,
        "read",
        f"{_LOAD} has no branch for it",
        "does not know this way of storing",
        "qconv convert --to bf16, then mlx_lm.convert",
        lambda subject, _: (
            (f"quant_method is {(subject.section or {}).get('quant_method')}",)
            if subject.layout.startswith(MODELOPT) or subject.layout == "w4afp8"
            else ()
        ),
    ),
    common.not_gguf("mlx", _LOAD),
    common.no_template("mlx", "read", "mlx_lm/tokenizer_utils.py", "generates from the prompt as it is"),
)
ENGINE = Engine(
    "mlx",
    VERSION,
    {
        "awq": "read",
        "pack-quantized": "read",
        "nvfp4-pack-quantized": "read",
        "mxfp4": "read",
        "mlx": "run",
        "dense": "read",
    },
    RULES,
)
