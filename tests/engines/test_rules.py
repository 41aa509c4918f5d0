"""Every rule: a minimal build that breaks it, and the same one unbroken, which it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qconv.engines.rule import Effect, Verdict, judge
from qconv.engines.subject import Deployment, Stored, Subject
from qconv.engines.table import ENGINES
from qconv.formats import formats
from tests.engines import builds
from tests.engines.builds import DOWN, GATE, ROUTER, UP, Change, Draft, K, Q

Make = Callable[[], Draft]
ONE, EIGHT = Deployment(), Deployment(8, 1)
JOINED = "model.layers.0.mlp.experts"


def section(**changes: Any) -> Change:
    """With other keys of the quantization_config; None leaves one out."""

    def change(draft: Draft) -> None:
        assert draft.section is not None
        draft.section = {key: value for key, value in (draft.section | changes).items() if value is not None}

    return change


def weights(**changes: Any) -> Change:
    """With other words about weights in every config group."""

    def change(draft: Draft) -> None:
        assert draft.section is not None
        for group in draft.section["config_groups"].values():
            group["weights"] = group["weights"] | changes

    return change


def config(**changes: Any) -> Change:
    """With other keys of config.json."""

    def change(draft: Draft) -> None:
        draft.config = {key: value for key, value in (draft.config | changes).items() if value is not None}

    return change


def values(**changes: float) -> Change:
    """With numbers in tensors, by module and leaf joined by two underscores."""

    def change(draft: Draft) -> None:
        for key, value in changes.items():
            module, _, leaf = key.partition("__")
            draft.values[f"model.layers.0.self_attn.{module}_proj.{leaf}"] = torch.tensor([value])

    return change


def drop(*names: str) -> Change:
    """Without tensors."""
    return lambda draft: draft.drop(*names)


def unlisted(draft: Draft) -> None:
    """Without a router in the list of exceptions."""
    assert draft.section is not None
    for key in ("ignore", "modules_to_not_convert"):
        if key in draft.section:
            draft.section[key] = [name for name in draft.section[key] if name != ROUTER]


def listed(entry: str) -> Change:
    """With one more exception."""

    def change(draft: Draft) -> None:
        assert draft.section is not None
        for key in ("ignore", "modules_to_not_convert"):
            if key in draft.section:
                draft.section[key] = [*draft.section[key], entry]

    return change


def groups_of(second: dict[str, Any]) -> Change:
    """With a second config group for the experts of layer 0."""

    def change(draft: Draft) -> None:
        assert draft.section is not None
        first = draft.section["config_groups"]["group_0"]
        other = first | {"targets": [r"re:.*layers\.0\.mlp\.experts.*"], "weights": first["weights"] | second}
        draft.section["config_groups"] = {"group_0": first, "group_1": other}

    return change


def first_group(**changes: Any) -> Change:
    """With other keys of the first config group."""

    def change(draft: Draft) -> None:
        assert draft.section is not None
        draft.section["config_groups"]["group_0"].update(changes)

    return change


def idle_group(draft: Draft) -> None:
    """With a config group that targets nothing."""
    assert draft.section is not None
    draft.section["config_groups"]["group_2"] = {"targets": ["nothing"], "weights": {}}


def expert_apart(draft: Draft) -> None:
    """With one expert of a layer in a group of its own."""
    assert draft.section is not None
    first = draft.section["config_groups"]["group_0"]
    other = first | {"targets": [GATE, UP, DOWN], "weights": first["weights"] | {"group_size": 64}}
    draft.section["config_groups"] = {"group_0": first, "group_1": other}


def every(leaf: str, stored: Stored) -> Change:
    """With a tensor more beside each linear that is quantized."""

    def change(draft: Draft) -> None:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in draft.tensors if "_proj." in name)
        draft.tensors |= {f"{module}.{leaf}": stored for module in modules}

    return change


def renamed(old: str, new: str) -> Change:
    """With another last name of tensors."""

    def change(draft: Draft) -> None:
        draft.tensors = {
            name.removesuffix(old) + new if name.endswith(f".{old}") else name: one
            for name, one in draft.tensors.items()
        }

    return change


def with_cache_scales(draft: Draft) -> None:
    """With stored scales of an FP8 cache."""
    for layer in range(builds.LAYERS):
        for leaf in ("k_scale", "v_scale"):
            draft.tensors[f"model.layers.{layer}.self_attn.{leaf}"] = Stored("BF16", (1,))


def attribute(name: str, value: Any) -> Change:
    """With another attribute of the draft."""
    return lambda draft: setattr(draft, name, value)


def plain(*modules: str) -> Change:
    """With modules that are not quantized."""
    return lambda draft: draft.plain(*modules)


def one_expert(draft: Draft) -> None:
    """With an expert's own blocks and scales in the place of those of all."""
    draft.drop(f"{JOINED}.down_proj_blocks", f"{JOINED}.down_proj_scales")
    draft.tensors[f"{JOINED}.0.down_proj.weight_blocks"] = Stored("U8", (builds.HIDDEN, builds.WIDTH // 32, 16))
    draft.tensors[f"{JOINED}.0.down_proj.weight_scales"] = Stored("U8", (builds.HIDDEN, builds.WIDTH // 32))


def w4a8() -> Draft:
    """int4 weights whose inputs become FP8."""
    draft = builds.w4a16()
    assert draft.section is not None
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    draft.section["config_groups"]["group_0"]["input_activations"] = inputs
    return draft


def static() -> Draft:
    """FP8 with stored scales."""
    return builds.float8("tensor", "tensor")


def dynamic() -> Draft:
    """FP8 by row and token."""
    return builds.float8("channel", "token")


def latent() -> Draft:
    """Draft layers are promised and there."""
    draft = builds.fp8()
    draft.config["num_nextn_predict_layers"] = 1
    draft.tensors["model.layers.2.eh_proj.weight"] = builds.dense(512, 1024)
    assert draft.section is not None
    draft.section["modules_to_not_convert"].append("model.layers.2.eh_proj")
    return draft


def fp8_with_experts_listed() -> Draft:
    """FP8 attention beside plain experts, listed as transformers asks for them."""
    draft = builds.fp8()
    modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in builds.SIZES if "experts" in name]
    draft.plain(*modules)
    assert draft.section is not None
    draft.section["modules_to_not_convert"] += [*modules, *(f"model.layers.{layer}.mlp.experts" for layer in range(2))]
    return draft


def _without_block(draft: Draft) -> None:
    assert draft.section is not None
    names = draft.section["modules_to_not_convert"]
    draft.section["modules_to_not_convert"] = [name for name in names if not name.endswith(".experts")]


BREACHES: tuple[tuple[str, Make, Change, Deployment], ...] = (
    (
        "vllm/expert-missing",
        builds.awq,
        drop(*(f"{one}.{leaf}" for one in (GATE, UP, DOWN) for leaf in ("qweight", "qzeros", "scales"))),
        ONE,
    ),
    ("vllm/expert-part-missing", builds.w4a16, drop(f"{DOWN}.weight_packed"), ONE),
    ("vllm/attention-part-missing", builds.w4a16, drop(f"{Q}.weight_scale"), ONE),
    ("vllm/attention-part-missing", builds.fp8, drop(f"{K}.weight", f"{K}.weight_scale_inv"), ONE),
    ("vllm/expert-missing", builds.fp8, drop(f"{UP}.weight", f"{UP}.weight_scale_inv"), ONE),
    ("vllm/expert-shape", builds.w4a16, lambda draft: draft.reshape(f"{GATE}.weight_packed", 256, 32), ONE),
    ("vllm/fp8-unlisted", builds.fp8, unlisted, ONE),
    (
        "vllm/gptq-zeros",
        builds.gptq,
        lambda draft: draft.values.update({f"{Q}.qzeros": torch.tensor([0x88888888 - 2**32])}),
        ONE,
    ),
    ("vllm/experts-apart", builds.w4a16, expert_apart, ONE),
    ("vllm/nvfp4-global-scale", builds.nvfp4, values(q__weight_global_scale=2.0), ONE),
    ("vllm/modelopt-global-scale", builds.modelopt, values(v__weight_scale_2=2.0), ONE),
    ("vllm/modelopt-input-scale", builds.modelopt, drop(f"{DOWN}.input_scale"), ONE),
    ("vllm/unlisted", builds.w4a16, unlisted, ONE),
    ("vllm/listed", builds.w4a16, listed(K), ONE),
    ("vllm/awq-listed", builds.awq, listed("gate"), ONE),
    ("vllm/fused-apart", builds.w4a16, plain(K), ONE),
    (
        "vllm/expert-leaf",
        builds.w4a16,
        lambda draft: draft.tensors.update({f"{GATE}.weight_extra": Stored("F32", (1,))}),
        ONE,
    ),
    ("vllm/method", builds.fp8, section(quant_method="w4afp8"), ONE),
    ("vllm/fp8-scale-name", builds.fp8, renamed("weight_scale_inv", "weight_scale"), ONE),
    ("vllm/no-format", builds.w4a16, section(format=None), ONE),
    ("vllm/act-order", builds.gptq, section(desc_act=True), ONE),
    ("vllm/gptq-zero-points", builds.gptq, section(sym=False), ONE),
    ("vllm/gptq-bits", builds.gptq, section(bits=3), ONE),
    ("vllm/groups", builds.w4a16, weights(group_size=48), ONE),
    ("vllm/experts-8-bits-zero-points", builds.w4a16, weights(num_bits=8, symmetric=False), ONE),
    ("vllm/tp-heads", builds.awq, config(num_attention_heads=6), Deployment(4, 4)),
    ("vllm/input-scales-apart", static, values(k__input_scale=3.0), ONE),
    ("vllm/w4a8-scales", builds.w4a16, first_group(input_activations={"num_bits": 8, "type": "float"}), ONE),
    ("vllm/draft-layers", latent, drop("model.layers.2.eh_proj.weight"), ONE),
    ("vllm/generation-config", builds.awq, attribute("generation", None), ONE),
    ("vllm/chat-template", builds.awq, attribute("template", None), ONE),
    ("sglang/ignore-parent", builds.w4a16, listed("model.layers.0.mlp.experts.0"), ONE),
    ("sglang/w4a8-groups", w4a8, weights(group_size=64), ONE),
    ("sglang/w4afp8-groups", builds.w4afp8, section(group_size=64), ONE),
    (
        "sglang/w4afp8-exceptions",
        builds.w4afp8,
        plain(*(f"model.layers.1.self_attn.{one}_proj" for one in "qkvo")),
        ONE,
    ),
    ("sglang/cache-scales", builds.fp8, with_cache_scales, ONE),
    ("sglang/experts-zero-points", builds.w4a16, weights(symmetric=False), ONE),
    ("sglang/fp8-unlisted", builds.fp8, unlisted, ONE),
    ("sglang/unlisted", builds.w4a16, unlisted, ONE),
    ("sglang/gptq-experts", builds.gptq, section(bits=2), ONE),
    ("sglang/groups", builds.w4a16, weights(group_size=48), ONE),
    ("sglang/fp8-columns", builds.fp8, lambda draft: draft.reshape(f"{DOWN}.weight", 512, 200), ONE),
    ("sglang/fused-apart", builds.w4a16, plain(UP), ONE),
    ("sglang/tp-heads", builds.awq, config(num_key_value_heads=3), Deployment(2, 2)),
    ("sglang/mixture", builds.w4a16, section(format="mixed-precision"), ONE),
    (
        "sglang/no-linear-target",
        builds.w4a16,
        first_group(targets=["re:.*_proj$"]),
        ONE,
    ),
    ("sglang/draft-layers", latent, drop("model.layers.2.eh_proj.weight"), ONE),
    ("sglang/generation-config", builds.awq, attribute("generation", None), ONE),
    ("sglang/chat-template", builds.awq, attribute("template", None), ONE),
    ("tensorrt-llm/int8", dynamic, weights(type="int"), ONE),
    (
        "tensorrt-llm/two-configs",
        builds.modelopt,
        attribute("quantization_file", {"quantization": {"quant_algo": "FP8"}}),
        ONE,
    ),
    ("tensorrt-llm/cache-scales", builds.fp8, section(kv_cache_scheme={"num_bits": 8, "type": "float"}), ONE),
    (
        "tensorrt-llm/weights-alone",
        dynamic,
        first_group(input_activations=None),
        ONE,
    ),
    ("tensorrt-llm/int4", dynamic, weights(num_bits=4, type="int"), ONE),
    ("tensorrt-llm/strategy", dynamic, weights(strategy="tensor"), ONE),
    ("tensorrt-llm/block", builds.fp8, section(weight_block_size=[64, 128]), ONE),
    ("tensorrt-llm/group", builds.nvfp4, weights(group_size=32), ONE),
    ("tensorrt-llm/class-target", dynamic, groups_of({}), ONE),
    (
        "tensorrt-llm/unmatched-target",
        builds.mixture,
        idle_group,
        ONE,
    ),
    ("tensorrt-llm/method", builds.fp8, section(quant_method="awq"), ONE),
    ("tensorrt-llm/cache", dynamic, section(kv_cache_scheme={"num_bits": 4, "type": "int"}), ONE),
    ("tensorrt-llm/generation-config", builds.fp8, attribute("generation", None), ONE),
    ("transformers/experts-in-words", builds.awq, lambda draft: None, ONE),
    ("transformers/static-experts", dynamic, every("input_scale", Stored("F32", (1,))), ONE),
    ("transformers/zero-points", builds.w4a16, every("weight_zero_point", Stored("I32", (64, 4))), ONE),
    ("transformers/blocks", dynamic, weights(strategy="block", block_structure=[128, 128]), ONE),
    ("transformers/layers-apart", builds.w4a16, groups_of({"group_size": 64}), ONE),
    ("transformers/int8-experts", builds.w8a8, lambda draft: None, ONE),
    ("transformers/nvfp4-experts", builds.nvfp4, lambda draft: None, ONE),
    ("transformers/mxfp8-experts", builds.w8a8, section(format="mxfp8-quantized"), ONE),
    ("transformers/method", builds.fp8, section(quant_method="w4afp8"), ONE),
    ("transformers/ragged", builds.fp8, lambda draft: draft.reshape(f"{DOWN}.weight", 500, 256), ONE),
    ("transformers/fp8-head", builds.fp8, section(modules_to_not_convert=builds.routers()[1:]), ONE),
    ("transformers/fp8-experts", fp8_with_experts_listed, _without_block, ONE),
    (
        "transformers/draft-layers",
        builds.fp8,
        lambda draft: draft.tensors.update({"mtp.fc.weight": builds.dense(8, 8)}),
        ONE,
    ),
    ("transformers/mxfp4-experts", builds.gpt_oss, one_expert, ONE),
    ("transformers/mxfp4-bias", builds.gpt_oss, drop(f"{JOINED}.down_proj_bias"), ONE),
    ("transformers/mxfp4-scales", builds.gpt_oss, drop(f"{JOINED}.gate_up_proj_scales"), ONE),
    (
        "transformers/mxfp4-shape",
        builds.gpt_oss,
        lambda draft: draft.reshape(f"{JOINED}.down_proj_blocks", builds.EXPERTS, builds.HIDDEN, builds.WIDTH // 2),
        ONE,
    ),
    ("vllm/mxfp4-experts", builds.gpt_oss, one_expert, ONE),
    ("vllm/mxfp4-parts", builds.gpt_oss, drop(f"{JOINED}.down_proj_scales"), ONE),
    ("vllm/mxfp4-parts", builds.gpt_oss, drop(f"{JOINED}.gate_up_proj_bias"), ONE),
    ("transformers/chat-template", builds.fp8, attribute("template", None), ONE),
    ("mlx/scaled-rope", builds.fp8, config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ONE),
    ("mlx/override", builds.mlx, section(**{"language_model.model.layers.0.self_attn.q_proj": {"bits": 8}}), ONE),
    ("mlx/head-dim", lambda: _other_type(builds.mlx(), "mixtral"), config(head_dim=96), ONE),
    ("mlx/head-dim", lambda: _other_type(builds.w4a16(32), "qwen2_moe"), config(head_dim=32), ONE),
    ("mlx/groups", lambda: builds.w4a16(32), weights(group_size=128), ONE),
    ("mlx/experts", lambda: _other_type(builds.w4a16(32)), config(model_type="qwen3_moe"), ONE),
    ("mlx/gptq", builds.awq, section(quant_method="gptq"), ONE),
    ("mlx/awq-bits", builds.awq, section(bits=8), ONE),
    ("mlx/fp8", lambda: _other_type(builds.fp8()), config(model_type="qwen3_moe"), ONE),
    ("mlx/flat-keys", builds.fp8, config(rope_theta=None), ONE),
    ("mlx/file-names", builds.fp8, attribute("files", {"weights-00001.safetensors"}), ONE),
    ("mlx/no-section", builds.mlx, attribute("section", None), ONE),
    ("mlx/method", builds.fp8, section(quant_method="w4afp8"), ONE),
    ("mlx/chat-template", builds.fp8, attribute("template", None), ONE),
)


def _other_type(draft: Draft, kind: str = "deepseek_v3") -> Draft:
    draft.config["model_type"] = kind
    return draft


RANKS: tuple[tuple[str, Make, Deployment], ...] = (
    ("vllm/tp-blocks", builds.fp8, Deployment(4, 1)),
    ("sglang/tp-blocks", builds.fp8, Deployment(4, 1)),
    ("tensorrt-llm/tp-blocks", builds.fp8, Deployment(4, 1)),
    ("vllm/tp-groups", builds.w4a16, Deployment(4, 1)),
    ("sglang/tp-groups", builds.w4a16, Deployment(4, 1)),
)
FILES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llamacpp/rope-base", {"own__rope__freq_base": None}),
    ("llamacpp/pre-tokenizer", {"tokenizer__ggml__pre": None}),
    ("llamacpp/end", {"tokenizer__ggml__eos_token_id": None}),
    ("llamacpp/nul", {"tokenizer__ggml__tokens": ["a", "b\0", "ab", "<end>"]}),
    ("llamacpp/half-yarn", {"own__rope__scaling__type": "yarn", "own__rope__scaling__factor": 4.0}),
    ("llamacpp/experts-used", {"own__expert_used_count": None}),
    ("llamacpp/epsilon", {"own__attention__layer_norm_rms_epsilon": None}),
    ("llamacpp/key-length", {"own__attention__key_length": None}),
    ("llamacpp/expert-width", {"own__expert_feed_forward_length": None}),
    ("llamacpp/merges", {"tokenizer__ggml__merges": None}),
    ("llamacpp/rows", {"tokenizer__ggml__tokens": ["a", "b"]}),
    ("llamacpp/duplicate-token", {"tokenizer__ggml__tokens": ["a", "a", "b", "c"]}),
    ("llamacpp/architecture", {"arch": "no_such"}),
    ("llamacpp/chat-template", {"tokenizer__chat_template": None}),
)


def findings(key: str, subject: Subject, deployment: Deployment = ONE) -> list[str]:
    """What a rule finds."""
    rule = next(rule for rule in ENGINES[key.partition("/")[0]].rules if rule.key == key)
    return list(rule.breaches(subject, deployment))


@pytest.mark.parametrize(("key", "make", "change", "deployment"), BREACHES, ids=[one[0] for one in BREACHES])
def test_rule_finds_what_breaks_it_and_nothing_else(
    key: str, make: Make, change: Change, deployment: Deployment
) -> None:
    broken = make()
    change(broken)
    found = findings(key, broken.subject(), deployment)
    assert found
    assert all(found)
    if not (
        key.startswith("transformers/") and key.endswith(("-words", "int8-experts", "nvfp4-experts"))
    ):  # always broken
        assert findings(key, make().subject(), deployment) == []


@pytest.mark.parametrize(("key", "make", "deployment"), RANKS, ids=[one[0] for one in RANKS])
def test_ranks_that_own_parts_of_blocks_or_groups_are_found(key: str, make: Make, deployment: Deployment) -> None:
    subject = make().subject()
    assert any(DOWN in one for one in findings(key, subject, deployment))
    assert findings(key, subject, Deployment(2, 1)) == []
    assert not any("experts" in one for one in findings(key, subject, Deployment(4, 4)))  # each expert stays whole


@pytest.mark.parametrize(("key", "changes"), FILES, ids=[one[0] for one in FILES])
def test_rule_about_files_for_llama_cpp(key: str, changes: dict[str, Any]) -> None:
    assert findings(key, builds.gguf(**changes))
    whole = {"own__attention__key_length": 80} if key == "llamacpp/key-length" else {}
    assert findings(key, builds.gguf(**whole)) == []


@pytest.mark.parametrize("key", ["tensorrt-llm/gguf", "mlx/gguf", "vllm/gguf"])
def test_gguf_is_told_from_safetensors(key: str) -> None:
    assert findings(key, builds.gguf())
    assert findings(key, builds.awq().subject()) == []
    assert findings("llamacpp/safetensors", builds.awq().subject())
    assert findings("llamacpp/safetensors", builds.gguf()) == []


def test_latent_attention_in_gguf_is_wrong_in_vllm() -> None:
    sound = builds.gguf()
    broken = Subject({}, None, {**sound.tensors, "blk.0.attn_kv_a_mqa.weight": Stored("Q8_0", (8, 8))}, keys=sound.keys)
    assert findings("vllm/gguf-latent", broken)
    assert findings("vllm/gguf-latent", sound) == []
    assert judge(ENGINES["vllm"], broken, ONE).verdict is Verdict.WRONG


def test_every_rule_is_tested_and_there_are_enough() -> None:
    rules = [rule for engine in ENGINES.values() for rule in engine.rules]
    keys = [rule.key for rule in rules]
    assert len(set(keys)) == len(keys) >= 40
    assert sum(rule.effect is Effect.WRONG for rule in rules) >= 10
    assert all(len(engine.rules) >= 5 for engine in ENGINES.values())
    tested = {one[0] for one in (*BREACHES, *RANKS, *FILES)}
    tested |= {"tensorrt-llm/gguf", "mlx/gguf", "vllm/gguf", "vllm/gguf-latent", "llamacpp/safetensors"}
    assert set(keys) == tested
    for name, engine in ENGINES.items():
        assert all(rule.key.startswith(f"{name}/") for rule in engine.rules)
    for rule in rules:
        assert rule.source
        assert rule.what
        assert rule.remedy


@pytest.mark.parametrize(
    "make", [builds.awq, builds.gptq, builds.w4a16, builds.fp8, dynamic, builds.nvfp4], ids=lambda make: make.__name__
)
def test_sound_builds_are_right_in_vllm(make: Make) -> None:
    judged = judge(ENGINES["vllm"], make().subject(), ONE)
    assert judged.verdict is Verdict.RIGHT, judged.findings


def test_what_is_refused_is_not_called_wrong_and_what_nobody_knows_is_unknown() -> None:
    both = builds.fp8()
    unlisted(both)
    both.plain(K)
    assert judge(ENGINES["vllm"], both.subject(), ONE).verdict is Verdict.REFUSED
    odd = builds.fp8()
    section(quant_method="quark")(odd)
    assert judge(ENGINES["sglang"], odd.subject(), ONE).verdict is Verdict.UNKNOWN


def test_a_finding_names_the_first_places_and_counts_the_rest() -> None:
    draft = builds.w4a16()
    weights(group_size=48)(draft)
    found = next(one for one in judge(ENGINES["vllm"], draft.subject(), ONE).findings if one.rule.key == "vllm/groups")
    assert len(found.where) == 3
    assert found.count == len(builds.SIZES) * builds.LAYERS


def test_remedies_name_formats_and_layouts_that_there_are() -> None:
    known = {name.replace("_", "-") for name in formats()} | {"gguf", "bf16", "compressed-tensors"}
    for engine in ENGINES.values():
        for rule in engine.rules:
            named = re.findall(r"--(?:fmt|to) ([a-z0-9-]+)", rule.remedy)
            assert set(named) <= known, rule.key
