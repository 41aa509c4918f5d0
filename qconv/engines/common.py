"""What several engines ask of a build alike: rules that each of them names with its own source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qconv.engines.rule import Effect, Known, Rule
from qconv.engines.subject import COMPRESSED, GGUF, Deployment, Subject, most_frequent, odd_ones, odd_shapes
from qconv.engines.topology import Part, uneven

Breaches = Callable[[Subject, Deployment], Iterable[str]]
FP8 = "fp8"
IGNORE = ("ignore", "modules_to_not_convert")
ROW, COLUMN = ("o_proj", "down_proj", "w2", "out_proj"), ("gate_proj", "up_proj", "w1", "w3", "q_proj")
"""Linears that tensor parallelism splits along their input and along their output, by their last names."""
SPLIT_KV = ("k_proj", "v_proj")


def is_compressed(subject: Subject) -> bool:
    """Whether it is in compressed-tensors' words."""
    return (subject.section or {}).get("quant_method") == COMPRESSED


def of_layout(*layouts: str) -> Callable[[Breaches], Breaches]:
    """Breaches of builds of some layouts alone."""

    def only(breaches: Breaches) -> Breaches:
        def found(subject: Subject, deployment: Deployment) -> Iterable[str]:
            return breaches(subject, deployment) if subject.layout in layouts else ()

        return found

    return only


def integers(subject: Subject) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The linears on integers in compressed-tensors' words, with what the config says of their weights."""
    for module in subject.quantized:
        weights = subject.weights(module)
        if weights.get("type", "int") == "int" and weights:
            yield module, weights


def odd_groups(subject: Subject, sizes: tuple[int, ...]) -> Iterator[str]:
    """Linears on integers of compressed-tensors in groups of none of these sizes."""
    for module, weights in integers(subject):
        if weights.get("strategy") == "group" and weights.get("group_size") not in sizes:
            yield f"{module}: groups of {weights.get('group_size')}"


def is_expert(module: str) -> bool:
    """Whether a linear is of a routed expert."""
    return ".experts." in module


def missing_of(*, experts: bool) -> Breaches:
    """Tensors that a module lacks which its siblings have."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        for names in subject.siblings:
            if is_expert(names[0]) == experts:
                yield from (f"{name}.{leaf}" for name, leaf in odd_ones(subject, names))

    return found


def missing_attention(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """What a layer's attention lacks that others of its kind have: a whole linear, or a tensor of one."""
    for parents in subject.attentions:
        usual = most_frequent([frozenset(leaves) for leaves in parents.values()])
        yield from (f"{parent}.{leaf}" for parent, leaves in parents.items() for leaf in sorted(usual - leaves))
    yield from missing_of(experts=False)(subject, deployment)


def missing_experts(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Experts' linears that are missing, of as many experts as the config says, or as their numbers do."""
    count = next(
        (
            value
            for key in ("num_experts", "num_local_experts", "n_routed_experts")
            if isinstance(value := subject.text.get(key), int)
        ),
        None,
    )
    for block, names in subject.experts.items():
        places = [name[len(block) + 1 :].partition(".") for name in names]
        there, leaves = set(names), sorted({leaf for _, _, leaf in places})
        wanted = range(count if count is not None else max(int(number) for number, _, _ in places) + 1)
        every = (f"{block}.{number}.{leaf}" for number in wanted for leaf in leaves)
        yield from (name for name in every if name not in there)


def misshapen(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Experts' tensors of another shape or dtype than those of their siblings."""
    for names in subject.siblings:
        if is_expert(names[0]):
            yield from odd_shapes(subject, names)


def unlisted(fits: Callable[[str, Iterable[str]], bool], *keys: str) -> Breaches:
    """Linears that are stored as plain weights though the config, as the engine matches it, says quantized."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        entries = subject.names(*keys)
        for module in subject.dense:
            if fits(module, entries):
                continue
            if is_compressed(subject) and module not in subject.groups:
                continue
            if module.rpartition(".")[2] == "lm_head" and not is_compressed(subject):
                continue
            yield module

    return found


def listed(fits: Callable[[str, Iterable[str]], bool], *keys: str) -> Breaches:
    """Linears that are stored quantized though the config, as the engine matches it, says left alone."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        entries = subject.names(*keys)
        yield from (module for module in subject.quantized if entries and fits(module, entries))

    return found


def fused_apart(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Linears that engines hold as one, on different grids or not all of them quantized."""
    for names in subject.fused:
        kinds = {(name in subject.quantized, _scheme(subject, name)) for name in names}
        if len(kinds) > 1:
            yield " and ".join(names)


def experts_apart(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Layers whose experts are not all on one grid."""
    for block, names in subject.experts.items():
        if len({(name in subject.quantized, _scheme(subject, name)) for name in names}) > 1:
            yield block


def _scheme(subject: Subject, module: str) -> str:
    group = subject.groups.get(module)
    if group is not None:
        return repr((group.get("weights"), group.get("input_activations"), group.get("format")))
    return repr(sorted((leaf, one.dtype) for leaf, one in subject.modules[module].items()))


def splits(subject: Subject, deployment: Deployment, *, blocks: bool) -> Iterator[str]:
    """Linears whose part on a tensor-parallel rank is not whole scales.

    Args:
        subject: The build.
        deployment: Its ranks.
        blocks: Those whose scales cover blocks of rows; else those in groups along the input.
    """
    heads = subject.text.get("num_key_value_heads")
    for module in subject.quantized:
        leaf, size, block = module.rpartition(".")[2], subject.size(module), subject.block(module)
        if size is None or (block[0] > 1) != blocks or deployment.tp == 1:
            continue
        ranks = deployment.expert_ranks if is_expert(module) else deployment.tp
        part = None
        if leaf in ROW:
            part = Part(size[1], ranks, block[1], "input features")
        elif leaf in COLUMN:
            part = Part(size[0], ranks, block[0], "output features")
        elif leaf in SPLIT_KV:
            owners = min(ranks, heads) if isinstance(heads, int) and heads > 0 else ranks
            part = Part(size[0], owners, block[0], "output features")
        if part is not None and uneven(part) is not None:
            yield f"{module}: {uneven(part)}"


def heads_do_not_split(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Attention heads that do not divide over the ranks."""
    heads, cached = subject.text.get("num_attention_heads"), subject.text.get("num_key_value_heads")
    if isinstance(heads, int) and heads % deployment.tp:
        yield f"{heads} attention heads over {deployment.tp} ranks"
    if isinstance(cached, int) and cached % deployment.tp and deployment.tp % max(1, cached):
        yield f"{cached} key-value heads over {deployment.tp} ranks"


Told = tuple[Known, str]
"""How something is known, and where."""


def of_ranks(
    engine: str, remedy: str, *, blocks: Told, groups: Told | None = None, heads: Told | None = None
) -> tuple[Rule, ...]:
    """The rules about tensor parallelism: blocks, groups and heads that a rank owns in part."""
    whole = "refuses {} that a rank owns in part"
    said: tuple[tuple[str, Told | None, str, str, Breaches], ...] = (
        ("tp-blocks", blocks, whole.format("blocks"), remedy, lambda one, of: splits(one, of, blocks=True)),
        ("tp-groups", groups, whole.format("groups"), remedy, lambda one, of: splits(one, of, blocks=False)),
        ("tp-heads", heads, whole.format("heads"), "serve on another number of ranks", heads_do_not_split),
    )
    return tuple(
        Rule(f"{engine}/{key}", Effect.REFUSED, *told, what, instead, breaches)
        for key, told, what, instead, breaches in said
        if told is not None
    )


def unshared(leaf: str) -> Breaches:
    """Fused linears with different stored numbers where they must share one: a scale of weights or of inputs."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        if subject.read is None or not any(leaf in leaves for leaves in subject.quantized.values()):
            return
        for names in subject.fused:
            stored = [f"{name}.{leaf}" for name in names]
            values = {subject.first(one) for one in stored}
            if None not in values and len(values) > 1:
                yield " and ".join(stored)

    return found


def cache_scales(subject: Subject) -> list[str]:
    """The stored scales of a quantized cache."""
    return [name for name in subject.tensors if name.endswith((".k_scale", ".v_scale"))]


def no_generation_config(engine: str, known: Known, source: str) -> Rule:
    """The notice of a build without generation_config.json."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        if subject.files is not None and subject.generation is None and subject.layout != GGUF:
            yield "generation_config.json is not there"

    return Rule(
        f"{engine}/generation-config",
        Effect.NOTICE,
        known,
        source,
        "samples with its own defaults and ends at config.json's eos alone",
        "copy generation_config.json from the source",
        found,
    )


def no_template(engine: str, known: Known, source: str, what: str) -> Rule:
    """The notice of a build without a chat template."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        if subject.template is None:
            yield "no chat template"

    return Rule(
        f"{engine}/chat-template",
        Effect.NOTICE,
        known,
        source,
        what,
        "copy chat_template.jinja from the source, or write the template into the file",
        found,
    )


PREDICTED = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def promised_draft(subject: Subject, deployment: Deployment) -> Iterator[str]:
    """Layers that predict further tokens, in the config and not in the file."""
    key = next((key for key in PREDICTED if isinstance(subject.text.get(key), int) and subject.text[key] > 0), None)
    layers = subject.text.get("num_hidden_layers")
    if key is None or not isinstance(layers, int):
        return
    marks = ("mtp", *(f"layers.{layers + extra}." for extra in range(int(subject.text[key]))))
    if not any(mark in name for name in subject.tensors for mark in marks):
        yield f"{key} is {subject.text[key]}"


def not_gguf(engine: str, source: str) -> Rule:
    """The refusal of a GGUF file."""
    return Rule(
        f"{engine}/gguf",
        Effect.REFUSED,
        "read",
        source,
        "reads no GGUF",
        "build in another format",
        of_layout(GGUF)(lambda *_: ("the build is GGUF",)),
    )
