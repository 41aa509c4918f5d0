"""transformers: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.engines import common, mxfp4
from qconv.engines.common import FP8, is_compressed, is_expert, of_layout
from qconv.engines.names import within
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import MODELOPT, Deployment, Subject

VERSION = "transformers 5.23.0"
_SKIP = "modules_to_not_convert"
_RUN = "loaded with tiny builds of qwen3_moe"
_UNKNOWN = (MODELOPT, "w4afp8", "mlx", "exl3")


def _experts_in_words(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.layout in ("awq", "gptq"):
        yield from (names[0] for names in subject.experts.values() if names[0] in subject.quantized)


def _static_experts(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (name for name, leaves in subject.quantized.items() if is_expert(name) and "input_scale" in leaves)


def _zero_points(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (name for name, leaves in subject.quantized.items() if "weight_zero_point" in leaves)


def _blocks(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if is_compressed(subject):
        yield from (name for name in subject.quantized if subject.weights(name).get("strategy") == "block")


def _layers_apart(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if not is_compressed(subject):
        return
    kinds: dict[str, str] = {}
    for names in subject.experts.values():
        for name in names:
            kinds.setdefault(repr(subject.weights(name)), name)
    if len(kinds) > 1:
        yield from kinds.values()


def _quantized_experts(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (names[0] for names in subject.experts.values() if names[0] in subject.quantized)


def _method(subject: Subject, deployment: Deployment) -> Iterator[str]:
    method = (subject.section or {}).get("quant_method")
    if method in _UNKNOWN:
        yield f"quantization_config.quant_method is {method}"


def _ragged(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for name in subject.quantized:
        size, block = subject.size(name), subject.block(name)
        if size is not None and block[0] > 1 and (size[0] % block[0] or (block[1] and size[1] % block[1])):
            yield f"{name}: {size[0]} x {size[1]}"


def _head(subject: Subject, deployment: Deployment) -> Iterator[str]:
    entries = (subject.section or {}).get(_SKIP)
    if isinstance(entries, list) and not within("lm_head", [one for one in entries if isinstance(one, str)]):
        yield f"{_SKIP} does not name lm_head"


def _experts_listed(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Layers' experts that stay plain, and whose block, which transformers asks for, is not listed."""
    entries = subject.names(_SKIP)
    for block, names in subject.experts.items():
        if names[0] in subject.dense and not within(block, entries):
            yield block


RULES = (
    Rule(
        "transformers/experts-in-words",
        Effect.WRONG,
        "run",
        _RUN,
        "holds a layer's experts as one tensor and loads AutoAWQ's and GPTQ's without an error and with random experts",
        "load with GPTQModel or vLLM, or build w4a16",
        _experts_in_words,
    ),
    Rule(
        "transformers/nvfp4-experts",
        Effect.WRONG,
        "run",
        _RUN,
        "drops the scale of all scales of NVFP4 experts, and every weight of theirs is off by it",
        "load with vLLM or SGLang, or take mxfp4",
        of_layout("nvfp4-pack-quantized")(_quantized_experts),
    ),
    Rule(
        "transformers/mxfp8-experts",
        Effect.REFUSED,
        "run",
        _RUN,
        "cannot load experts of MXFP8",
        "load with vLLM",
        of_layout("mxfp8-quantized")(_quantized_experts),
    ),
    Rule(
        "transformers/static-experts",
        Effect.WRONG,
        "run",
        _RUN,
        "computes experts without the stored scales of their inputs",
        "vLLM and SGLang use them; or take fp8-dynamic",
        _static_experts,
    ),
    Rule(
        "transformers/zero-points",
        Effect.REFUSED,
        "run",
        f"{_RUN}; transformers PR #47430",
        "fails on zero points of compressed-tensors",
        "take symmetric",
        _zero_points,
    ),
    Rule(
        "transformers/blocks",
        Effect.REFUSED,
        "run",
        _RUN,
        "fails on blocks in compressed-tensors' layout",
        "--fmt fp8 has the same blocks",
        _blocks,
    ),
    Rule(
        "transformers/layers-apart",
        Effect.REFUSED,
        "run",
        _RUN,
        "takes one grid for the experts of all layers and fails to load others",
        "--rule 'mlp.experts.*=int4-g128' gives them one",
        _layers_apart,
    ),
    Rule(
        "transformers/int8-experts",
        Effect.REFUSED,
        "run",
        _RUN,
        "cannot load experts of int-quantized weights",
        "take w4a16 of 8 bits, or load with vLLM",
        of_layout("int-quantized")(_quantized_experts),
    ),
    Rule(
        "transformers/method",
        Effect.REFUSED,
        "read",
        "quantizers/auto.py: unknown methods are skipped with a warning, and shapes then differ",
        "does not know this way of storing",
        "build in another format",
        _method,
    ),
    Rule(
        "transformers/ragged",
        Effect.REFUSED,
        "run",
        _RUN,
        "refuses or misreads linears that are not whole blocks",
        "leave them alone, or take fp8-dynamic",
        _ragged,
    ),
    Rule(
        "transformers/fp8-head",
        Effect.REFUSED,
        "run",
        "integrations/finegrained_fp8.py: without a list the head is left alone; with one that lacks it, it is not",
        "takes a head that is not listed to be FP8, and finds no scales",
        "name lm_head in modules_to_not_convert (qconv does)",
        of_layout(FP8)(_head),
    ),
    Rule(
        "transformers/fp8-experts",
        Effect.REFUSED,
        "read",
        "integrations/finegrained_fp8.py asks for a layer's experts as one module",
        "takes plain experts to be FP8 unless the module that holds them is listed",
        "name mlp.experts of the layer, too (qconv does)",
        of_layout(FP8)(_experts_listed),
    ),
    Rule(
        "transformers/draft-layers",
        Effect.NOTICE,
        "run",
        "modeling_utils.py: keys that a class ignores",
        "drops layers that predict further tokens, and loses them when it saves",
        "keep the original build",
        lambda subject, _: (name for name in subject.tensors if name.startswith("mtp.")),
    ),
    *mxfp4.TRANSFORMERS,
    common.no_template("transformers", "run", "apply_chat_template raises", "refuses apply_chat_template"),
)
ENGINE = Engine(
    "transformers",
    VERSION,
    {
        "fp8": "run",
        "pack-quantized": "run",
        "float-quantized": "run",
        "int-quantized": "read",
        "mxfp4-pack-quantized": "run",
        "nvfp4-pack-quantized": "read",
        "mxfp4": "run",
        "dense": "run",
    },
    RULES,
)
