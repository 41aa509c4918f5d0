"""SGLang: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.engines import common
from qconv.engines.common import FP8, IGNORE, is_compressed, is_expert, of_layout
from qconv.engines.names import by_part, is_class
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import Deployment, Subject, targets_of
from qconv.engines.vllm import KERNEL_GROUPS

VERSION = "SGLang 0.5.23"
_DROP_CACHE_SCALES = ("qwen3_moe", "qwen2", "qwen2_moe", "mixtral")
_EP = "serve with --ep-size as many as --tp-size, fewer ranks, or smaller groups"


def _around(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Entries that are no quantized linear's name, and a part of one's."""
    for entry in subject.names("ignore"):
        hit = next((name for name in subject.quantized if by_part(name, (entry,)) and name != entry), None)
        if hit is not None and not entry.startswith("re:"):
            yield f"{entry!r} is a part of {hit}"


def _odd_w4a8(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, weights in common.integers(subject):
        group = subject.groups.get(module, {})
        inputs = group.get("input_activations")
        if is_expert(module) and weights.get("num_bits") == 4 and inputs and weights.get("group_size") != 128:
            yield f"{module}: groups of {weights.get('group_size')}"


def _odd_w4afp8(subject: Subject, deployment: Deployment) -> Iterator[str]:
    size = subject.number("group_size")
    if size not in (None, 128):
        yield f"quantization_config.group_size is {size}"


def _unread_exceptions(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Attention that stays plain in a layout whose list of exceptions is not read."""
    yield from (module for module in subject.dense if "attn" in module)


def _dropped_cache_scales(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.model_type in _DROP_CACHE_SCALES:
        yield from common.cache_scales(subject)


def _experts_with_zero_points(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module, weights in common.integers(subject):
        if is_expert(module) and weights.get("symmetric") is False:
            yield module


def _gptq_experts(subject: Subject, deployment: Deployment) -> Iterator[str]:
    section = subject.section or {}
    if subject.experts and (subject.number("bits") not in (4, 8) or section.get("sym") is False):
        yield f"experts of {subject.number('bits')} bits, sym {section.get('sym')}"


def _odd_columns(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for module in subject.quantized:
        size, block = subject.size(module), subject.block(module)
        if size is not None and block[0] > 1 and block[1] and size[1] % block[1]:
            yield f"{module}: {size[1]} input features"


def _mixture(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.layout == "mixed-precision":
        yield "quantization_config.format is mixed-precision"


def _no_class_target(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if not is_compressed(subject) or not subject.experts:
        return
    targets = [one for group in subject.config_groups.values() for one in targets_of(group)]
    if targets and not any(map(is_class, targets)):
        yield "no config group targets Linear"


RULES = (
    Rule(
        "sglang/ignore-parent",
        Effect.WRONG,
        "thread",
        "SGLang PR #32736 (merged 2026-07-29): matched anywhere in a name before it",
        "leaves alone every linear whose name holds an entry of ignore, and loads it as 16 bits from nothing",
        "write leaf modules into ignore, never what holds them (qconv does)",
        lambda subject, deployment: _around(subject, deployment) if is_compressed(subject) else (),
    ),
    Rule(
        "sglang/w4a8-groups",
        Effect.WRONG,
        "thread",
        "SGLang #38573: cutlass_w4a8_moe.py has the number 128 at six calls",
        "decodes experts of 4 bits with FP8 inputs as if groups were of 128",
        "take groups of 128",
        _odd_w4a8,
    ),
    Rule(
        "sglang/w4afp8-groups",
        Effect.WRONG,
        "thread",
        "SGLang #38573, PR #38633",
        "decodes w4afp8's experts as if groups were of 128",
        "take groups of 128",
        of_layout("w4afp8")(_odd_w4afp8),
    ),
    Rule(
        "sglang/w4afp8-exceptions",
        Effect.WRONG,
        "read",
        "w4afp8.py: from_config takes no list of exceptions",
        "reads attention of w4afp8 as block FP8 though modules_to_not_convert names it",
        "quantize attention, too (qconv does by default)",
        of_layout("w4afp8")(_unread_exceptions),
    ),
    Rule(
        "sglang/cache-scales",
        Effect.WRONG,
        "thread",
        "SGLang #39942, PR #39943 (open 2026-09-17)",
        "drops the stored scales of an FP8 cache for this model type, and takes 1.0",
        "serve with --kv-cache-dtype auto, or with vLLM",
        _dropped_cache_scales,
    ),
    Rule(
        "sglang/experts-zero-points",
        Effect.WRONG,
        "thread",
        "SGLang PR #39510 (open 2026-09-15)",
        "computes experts of compressed-tensors without their zero points",
        "take symmetric",
        _experts_with_zero_points,
    ),
    Rule(
        "sglang/fp8-unlisted",
        Effect.WRONG,
        "read",
        "fp8.py as vLLM's, of which it is a copy",
        "reads a router or linear that is not listed as FP8",
        "name each of them in full in modules_to_not_convert",
        of_layout(FP8)(common.unlisted(by_part, *IGNORE)),
    ),
    Rule(
        "sglang/unlisted",
        Effect.REFUSED,
        "read",
        "compressed_tensors/utils.py",
        "takes a router or linear that is not in ignore to be quantized, and finds no codes",
        "name each of them in full in ignore",
        lambda subject, deployment: (
            common.unlisted(by_part, "ignore")(subject, deployment) if is_compressed(subject) else ()
        ),
    ),
    Rule(
        "sglang/gptq-experts",
        Effect.REFUSED,
        "read",
        "gptq.py, moe_wna16.py",
        "has experts in GPTQ of 4 and 8 bits without zero points alone",
        "take those, or format awq",
        of_layout("gptq")(_gptq_experts),
    ),
    Rule(
        "sglang/groups",
        Effect.REFUSED,
        "read",
        "compressed_tensors schemes and their kernels",
        "has no kernel for such groups",
        "take 32, 64, 128 or -1",
        lambda subject, _: common.odd_groups(subject, KERNEL_GROUPS),
    ),
    Rule(
        "sglang/fp8-columns",
        Effect.REFUSED,
        "read",
        "fp8.py: columns must divide by the block, rows need not",
        "refuses rows that are not whole blocks",
        "leave those linears alone, or take one scale a row (fp8-dynamic)",
        _odd_columns,
    ),
    Rule(
        "sglang/fused-apart",
        Effect.REFUSED,
        "read",
        "compressed_tensors/utils.py: should_ignore_layer",
        "refuses q, k, v or gate, up of one layer in different precision",
        "give them one grid, or leave all of them alone",
        common.fused_apart,
    ),
    *common.of_ranks(
        "sglang",
        _EP,
        blocks=("thread", "SGLang PR #8344, #10852, #26107, a shared expert among them"),
        groups=("read", "gptq.py, awq.py: input_size_per_partition % group_size"),
        heads=("read", "models/qwen3_moe.py asserts both"),
    ),
    Rule(
        "sglang/mixture",
        Effect.NOTICE,
        "thread",
        "SGLang PR #32736 (merged 2026-07-29)",
        "loads mixtures unquantized before that change",
        "serve with a release from August 2026 on",
        _mixture,
    ),
    Rule(
        "sglang/no-linear-target",
        Effect.NOTICE,
        "thread",
        "SGLang PR #29761 (merged)",
        "fails with KeyError 'Linear' on experts before that change where no group targets Linear",
        "serve with a release from July 2026 on",
        _no_class_target,
    ),
    Rule(
        "sglang/draft-layers",
        Effect.NOTICE,
        "thread",
        "SGLang #35797",
        "cannot draft: the config promises layers that predict further tokens, and none are stored",
        "build from a source that holds them (qconv copies them), or serve without speculative decoding",
        common.promised_draft,
    ),
    common.no_generation_config("sglang", "thread", "GPTQModel #1291"),
    common.no_template("sglang", "read", "template_manager.py", "falls back to a template of its own"),
)
ENGINE = Engine(
    "sglang",
    VERSION,
    {
        "awq": "read",
        "gptq": "read",
        "fp8": "read",
        "pack-quantized": "read",
        "float-quantized": "read",
        "int-quantized": "read",
        "mixed-precision": "thread",
        "nvfp4-pack-quantized": "read",
        "mxfp4-pack-quantized": "read",
        "modelopt NVFP4": "read",
        "w4afp8": "read",
        "mxfp4": "read",
        "dense": "read",
    },
    RULES,
)
