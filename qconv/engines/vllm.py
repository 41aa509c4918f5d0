"""vLLM: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.core.qtensor import CHANNEL
from qconv.engines import common, mxfp4
from qconv.engines.common import FP8, IGNORE, is_compressed, is_expert, of_layout
from qconv.engines.names import by_part, exactly
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import GGUF, Deployment, Subject

VERSION = "vLLM 0.32.0"
KERNEL_GROUPS = (32, 64, 128)
_RAW_ZEROS = {4: 0x88888888, 8: 0x80808080}
"""GPTQ's words of zero points where they are stored as they are; the older form stores one less."""
_BESIDE_EXPERTS = frozenset(
    (
        *("weight", "bias", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("weight_scale_inv", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale"),
        *("qweight", "qzeros", "scales", "g_idx"),
    )
)


def _raw_zeros(subject: Subject, deployment: Deployment) -> Iterator[str]:
    section = subject.section or {}
    if section.get("checkpoint_format") == "gptq_v2" or subject.read is None or section.get("sym") is False:
        return
    for module, leaves in subject.quantized.items():
        raw = _RAW_ZEROS.get(subject.bits(module))
        if raw is not None and "qzeros" in leaves:
            first = subject.first(f"{module}.qzeros") if leaves["qzeros"].dtype == "I32" else None
            if first is not None and int(first) & 0xFFFFFFFF == raw:
                yield f"{module}.qzeros"
            return  # a writer stores all of a build's one way


def _foreign_leaf(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, leaves in subject.modules.items():
        if is_expert(module):
            yield from (f"{module}.{leaf}" for leaf in leaves if leaf not in _BESIDE_EXPERTS)


def _other_scale_name(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, leaves in subject.quantized.items():
        if "weight_scale_inv" not in leaves and "weight_scale" in leaves and _has_blocks(subject):
            yield f"{module}.weight_scale"


def _has_blocks(subject: Subject) -> bool:
    return isinstance((subject.section or {}).get("weight_block_size"), list)


def _no_format(subject: Subject, deployment: Deployment) -> Iterator[str]:
    section = subject.section or {}
    if is_compressed(subject) and not section.get("format"):
        yield "quantization_config.format"
    groups = section.get("config_groups")
    if is_compressed(subject) and section.get("format") == "mixed-precision" and isinstance(groups, dict):
        yield from (
            f"quantization_config.config_groups.{name}.format"
            for name, group in groups.items()
            if isinstance(group, dict) and not group.get("format")
        )


def _act_order(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if (subject.section or {}).get("desc_act") is True and subject.number("group_size") != CHANNEL:
        yield "quantization_config.desc_act is true"


def _zero_points(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if (subject.section or {}).get("sym") is False:
        yield "quantization_config.sym is false"


def _few_bits(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.number("bits") not in (4, 8):
        yield f"quantization_config.bits is {subject.number('bits')}"


def _eight_bits_with_zero_points(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, weights in common.integers(subject):
        if is_expert(module) and weights.get("num_bits") == 8 and weights.get("symmetric") is False:
            yield module


def _w4a8(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, weights in common.integers(subject):
        if weights.get("num_bits") == 4 and subject.groups.get(module, {}).get("input_activations"):
            yield module


def _no_input_scale(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (f"{module}.input_scale" for module, leaves in subject.quantized.items() if "input_scale" not in leaves)


def _latent_gguf(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if any("attn_kv_a" in name for name in subject.tensors):
        yield "latent attention in GGUF"


_REFERENCE = "loaded on CPU with tiny builds of qwen3_moe"
_EP = "serve with --enable-expert-parallel, fewer ranks, or smaller groups"
RULES = (
    Rule(
        "vllm/expert-missing",
        Effect.WRONG,
        "run",
        _REFERENCE,
        "loads, and computes an expert that is not there from what happens to lie in memory",
        "build again, or download the missing shard: qconv verify names every tensor",
        common.missing_experts,
    ),
    Rule(
        "vllm/expert-part-missing",
        Effect.WRONG,
        "run",
        _REFERENCE,
        "loads an expert that lacks its codes or a scale without a word",
        "build again: qconv verify names every tensor",
        common.missing_of(experts=True),
    ),
    Rule(
        "vllm/attention-part-missing",
        Effect.WRONG,
        "run",
        _REFERENCE,
        "loads attention that lacks a tensor without a word",
        "build again: qconv verify names every tensor",
        common.missing_attention,
    ),
    Rule(
        "vllm/expert-shape",
        Effect.WRONG,
        "run",
        _REFERENCE,
        "takes an expert's tensor of half the width without a word; perplexity may even look normal",
        "build again: qconv verify names every tensor",
        common.misshapen,
    ),
    Rule(
        "vllm/fp8-unlisted",
        Effect.WRONG,
        "run",
        f"{_REFERENCE}; names are matched whole (is_layer_skipped in quant_utils.py)",
        "reads a router or linear that is not listed as FP8, and computes garbage or NaN",
        "name each of them in full in modules_to_not_convert",
        of_layout(FP8, "w4afp8")(common.unlisted(exactly, *IGNORE)),
    ),
    Rule(
        "vllm/gptq-zeros",
        Effect.WRONG,
        "run",
        f"{_REFERENCE}; vLLM #26343, PR #38966",
        "adds one to zero points that are stored as they are, and every weight is off by one step",
        'set checkpoint_format to "gptq_v2", or store one less (qconv does)',
        of_layout("gptq")(_raw_zeros),
    ),
    Rule(
        "vllm/experts-apart",
        Effect.WRONG,
        "read",
        "compressed_tensors_moe.py: FusedMoE takes the scheme of a layer's first expert",
        "takes all experts of a layer to be on the first one's grid",
        "give a layer's experts one grid",
        common.experts_apart,
    ),
    Rule(
        "vllm/nvfp4-global-scale",
        Effect.WRONG,
        "read",
        "compressed_tensors_w4a4_nvfp4.py and modelopt.py warn and take the largest",
        "takes one scale of the whole weight for linears that it holds as one, and others decode wrongly",
        "share it among q, k, v and among gate, up (qconv does)",
        common.unshared("weight_global_scale"),
    ),
    Rule(
        "vllm/modelopt-global-scale",
        Effect.WRONG,
        "read",
        "modelopt.py warns and takes the largest weight_scale_2",
        "takes one scale of the whole weight for linears that it holds as one, and others decode wrongly",
        "share it among q, k, v and among gate, up (qconv does)",
        common.unshared("weight_scale_2"),
    ),
    Rule(
        "vllm/modelopt-input-scale",
        Effect.WRONG,
        "thread",
        "reports of NVFP4 builds without input_scale",
        "computes W4A4 without a stored scale of inputs from what happens to lie in memory",
        "calibrate one (qconv does), or build nvfp4, whose inputs stay 16 bits",
        of_layout("modelopt NVFP4")(_no_input_scale),
    ),
    Rule(
        "vllm/gguf-latent",
        Effect.WRONG,
        "thread",
        "vLLM RFC #39583",
        "runs GGUF with latent attention (DeepSeek, Kimi, GLM-5) with garbled output",
        "serve GGUF with llama.cpp",
        of_layout(GGUF)(_latent_gguf),
    ),
    Rule(
        "vllm/gguf",
        Effect.NOTICE,
        "thread",
        "vLLM RFC #39583",
        "means to drop GGUF, and runs mixtures of experts in it slowly",
        "serve GGUF with llama.cpp",
        of_layout(GGUF)(lambda *_: ("the build is GGUF",)),
    ),
    Rule(
        "vllm/unlisted",
        Effect.REFUSED,
        "run",
        f"{_REFERENCE}; compressed_tensors/utils.py matches names whole",
        "takes a router or linear that is not in ignore to be quantized, and finds no codes",
        "name each of them in full in ignore",
        lambda subject, deployment: (
            common.unlisted(exactly, "ignore")(subject, deployment) if is_compressed(subject) else ()
        ),
    ),
    Rule(
        "vllm/listed",
        Effect.REFUSED,
        "read",
        "compressed_tensors/utils.py, fp8.py: what is ignored has a plain weight",
        "finds codes where the list of exceptions says that there is a plain weight",
        "list only what is not quantized",
        lambda subject, deployment: (
            common.listed(exactly, *IGNORE)(subject, deployment)
            if is_compressed(subject) or subject.layout == FP8
            else ()
        ),
    ),
    Rule(
        "vllm/awq-listed",
        Effect.REFUSED,
        "run",
        "awq_marlin.py: is_layer_skipped with parts of names",
        "leaves alone every linear whose name holds an entry: `gate` drops gate_proj, too",
        "name the router mlp.gate (qconv does)",
        of_layout("awq")(common.listed(by_part, *IGNORE)),
    ),
    Rule(
        "vllm/fused-apart",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses q, k, v or gate, up of one layer in different precision",
        "give them one grid, or leave all of them alone",
        common.fused_apart,
    ),
    Rule(
        "vllm/expert-leaf",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses a tensor beside an expert's that it does not know",
        "remove it",
        _foreign_leaf,
    ),
    Rule(
        "vllm/method",
        Effect.REFUSED,
        "run",
        f"{_REFERENCE}; vLLM PR #53848 is open",
        "does not know quant_method w4afp8",
        "take w4a8, or serve with SGLang",
        of_layout("w4afp8")(lambda *_: ("quantization_config.quant_method is w4afp8",)),
    ),
    Rule(
        "vllm/fp8-scale-name",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "wants the scales of blocks under weight_scale_inv",
        "qconv convert --to fp8",
        of_layout(FP8)(_other_scale_name),
    ),
    Rule(
        "vllm/no-format",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses compressed-tensors without format, and mixed groups without one each",
        "write quantization_config.format, of a mixture in every group",
        _no_format,
    ),
    Rule(
        "vllm/act-order",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses desc_act",
        "gptq.ordering static needs none and is about as good",
        of_layout("gptq")(_act_order),
    ),
    Rule(
        "vllm/gptq-zero-points",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses GPTQ with zero points",
        "take symmetric, or format awq",
        of_layout("gptq")(_zero_points),
    ),
    Rule(
        "vllm/gptq-bits",
        Effect.REFUSED,
        "run",
        _REFERENCE,
        "refuses GPTQ of 2 and 3 bits",
        "take 4 or 8",
        of_layout("gptq")(_few_bits),
    ),
    Rule(
        "vllm/groups",
        Effect.REFUSED,
        "read",
        "compressed_tensors_wNa16.py and its kernels",
        "has no kernel for such groups",
        "take 32, 64, 128 or -1",
        lambda subject, _: common.odd_groups(subject, KERNEL_GROUPS),
    ),
    Rule(
        "vllm/experts-8-bits-zero-points",
        Effect.REFUSED,
        "read",
        "compressed_tensors_moe.py",
        "has no kernel for experts of 8 bits with zero points",
        "take symmetric",
        _eight_bits_with_zero_points,
    ),
    *common.of_ranks(
        "vllm",
        _EP,
        blocks=("thread", "vLLM #17604, #17569, #54178: not divisible by weight quantization block_n"),
        groups=("thread", "vLLM #17604; gptq_marlin.py and compressed_tensors_wNa16.py require whole groups of a rank"),
        heads=("read", "models/qwen3_moe.py asserts both"),
    ),
    Rule(
        "vllm/input-scales-apart",
        Effect.NOTICE,
        "read",
        "w8a8_utils.py takes the largest of fused linears",
        "takes the largest stored scale of inputs for linears that it holds as one",
        "store one for all of them (qconv does)",
        common.unshared("input_scale"),
    ),
    Rule(
        "vllm/w4a8-scales",
        Effect.NOTICE,
        "read",
        "convert_bf16_scales_to_fp8 in quant_utils.py",
        "rounds the scales of groups to E4M3, one scale a row, before it computes W4A8 on Hopper",
        "measure it there; w4a16 keeps its scales",
        _w4a8,
    ),
    Rule(
        "vllm/draft-layers",
        Effect.NOTICE,
        "thread",
        "vLLM #53387, #49552",
        "cannot draft: the config promises layers that predict further tokens, and none are stored",
        "build from a source that holds them (qconv copies them), or serve without speculative decoding",
        common.promised_draft,
    ),
    *mxfp4.VLLM,
    common.no_generation_config("vllm", "thread", "GPTQModel #1291"),
    common.no_template("vllm", "read", "chat_utils.py", "refuses chat requests"),
)
ENGINE = Engine(
    "vllm",
    VERSION,
    {
        "awq": "run",
        "gptq": "run",
        "fp8": "run",
        "pack-quantized": "run",
        "float-quantized": "run",
        "int-quantized": "run",
        "mixed-precision": "run",
        "nvfp4-pack-quantized": "read",
        "mxfp4-pack-quantized": "read",
        "mxfp8-quantized": "read",
        "modelopt NVFP4": "read",
        "mxfp4": "read",
        "dense": "read",
    },
    RULES,
)
