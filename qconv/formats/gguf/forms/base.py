"""What a family's form in GGUF declares.

llama.cpp hard-codes much of an architecture that a config.json can vary, and reads the rest from keys of its own. A
:class:`Form` says which is which, so that one file a family gives the keys of a GGUF file, what must be refused, and
the config.json that a file stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, Keys

from qconv.core.architecture import Architecture

if TYPE_CHECKING:
    from qconv.formats.gguf.changes import Change
    from qconv.formats.gguf.keys import ModelKeys

Values: TypeAlias = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True, slots=True)
class Stated:
    """A value that a key of the file states as a key of config.json does.

    Attributes:
        key: The file's, such as :data:`gguf.Keys.LLM.EXPERT_WEIGHTS_SCALE`.
        config: config.json's.
        default: What transformers takes where config.json lacks it; its type, bool, int or float, is the value's.
        absent: What llama.cpp takes where the file lacks it. Counts are positive unless it is 0.
    """

    key: str
    config: str
    default: bool | int | float
    absent: bool | int | float


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that llama.cpp has for all models of the architecture.

    Attributes:
        config: The key of config.json that says otherwise where it has another value; None where none does.
        value: The only one.
        because: What llama.cpp does, for the message.
        default: What transformers takes where config.json lacks it.
        key: The key of a file that may say it too.
        stated: Whether a file must say it, since llama.cpp takes the other value where it does not.
    """

    config: str | None
    value: Any
    because: str = ""
    default: Any = None
    key: str | None = None
    stated: bool = False


ATTENTION_BIAS = "attn_(q|k|v|output).bias"
"""Names of biases below a layer, for :attr:`Form.present`."""
ALWAYS_ONE = Fixed(
    "norm_topk_prob", True, "the chosen experts' weights always sum to one", False, Keys.LLM.EXPERT_WEIGHTS_NORM
)
NEVER_ONE = Fixed(
    "norm_topk_prob", False, "the chosen experts' weights never sum to one", False, Keys.LLM.EXPERT_WEIGHTS_NORM
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A sparse family's experts.

    Attributes:
        count: config.json's keys of their number.
        used: Its key of how many a token goes to.
        width: Its key of their intermediate size, None where that is ``intermediate_size``.
        shared_width: Its key of the shared expert's, None where it has none or others tell.
        gating: What makes weights of the router's outputs. Any but softmax is stated in the file.
        every: Its key of every how manyth layer has experts, None where all have but leading ones.
        dense_first: What config.json says of a number of leading dense layers, and of all; None where all are sparse.
    """

    count: tuple[str, ...] = ("num_local_experts", "num_experts")
    used: str = "num_experts_per_tok"
    width: str | None = "moe_intermediate_size"
    shared_width: str | None = None
    gating: ExpertGatingFuncType = ExpertGatingFuncType.SOFTMAX
    every: str | None = None
    dense_first: Callable[[int, int], dict[str, Any]] | None = None


def routing(
    scale: float, norm: bool, groups: int = 1, chosen: int = 1, shared: str = "n_shared_experts"
) -> tuple[Stated, ...]:
    """What routers after DeepSeek-V3's have in config.json and in the file; what transformers takes by default."""
    return (
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, shared, 1, 1),
        Stated(Keys.LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor", scale, 1.0),
        Stated(Keys.LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob", norm, False),
        Stated(Keys.LLM.EXPERT_GROUP_COUNT, "n_group", groups, 1),
        Stated(Keys.LLM.EXPERT_GROUP_USED_COUNT, "topk_group", chosen, 1),
    )


def by_period(layers: int, period: int) -> list[bool]:
    """Which layers attend to a window where all but each ``period``-th do."""
    return [(layer + 1) % period != 0 for layer in range(layers)]


def sliding_layers(config: Values, layers: int, period: int = 4) -> list[bool]:
    """Which layers attend to a window: by ``layer_types``, else all but each ``sliding_window_pattern``-th."""
    kinds, period = config.get("layer_types"), config.get("sliding_window_pattern", period)
    return [kind != "full_attention" for kind in kinds[:layers]] if kinds else by_period(layers, period)


@dataclass(frozen=True, slots=True)
class Windows:
    """Layers that attend to a window.

    Attributes:
        which: Which of so many layers do.
        period: Every how manyth layer attends to the whole text, where the file need not say it; None where it must.
        size: config.json's key of the window's size.
        kind: What ``layer_types`` calls such a layer.
        only: The one size that llama.cpp knows, which a file need not state; None where it knows all.
    """

    which: Callable[[Values, int], list[bool]]
    period: int | None = None
    size: str = "sliding_window"
    kind: str = "sliding_attention"
    only: int | None = None


def without_rotation(config: Values, model: Architecture) -> str | None:
    """How layers without rotary embeddings are others than llama.cpp's, every fourth; None where they are not."""
    layers, step = len(model.layers), config.get("no_rope_layer_interval", 4)
    given = config.get("no_rope_layers") or [int(one) for one in by_period(layers, step)]
    if given == [int(one) for one in by_period(layers, 4)]:
        return None
    return "no_rope_layers: every fourth layer, and no other, has no rotary embedding"


def _no_difference(config: Values, model: Architecture) -> str | None:
    return None


def _no_change(model: Architecture, name: str, shape: tuple[int, ...]) -> Change | None:
    return None


def _nothing_stated(config: Values, model: Architecture) -> Mapping[str, bool | int | float | list[int]]:
    return {}


def _nothing_restored(keys: ModelKeys) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How layers mix tokens.

    Attributes:
        latent: Whether keys and values are made of a latent vector, whose part that is rotated is a head of its own.
        mscale: Whether llama.cpp knows YaRN's ``mscale_all_dim``.
        changes: What a tensor of that name and shape becomes in the file, None for the same numbers.
        elsewhere: What one is in files that others write, where they may hold it in another way.
        states: What keys of the file say besides or instead.
        restores: What these keys say as keys of config.json.
        differs: What llama.cpp computes otherwise, or None.
    """

    latent: bool = False
    mscale: bool = False
    changes: Callable[[Architecture, str, tuple[int, ...]], Change | None] = _no_change
    elsewhere: Callable[[Architecture, str, tuple[int, ...]], Change | None] = _no_change
    states: Callable[[Values, Architecture], Mapping[str, bool | int | float | list[int]]] = _nothing_stated
    restores: Callable[[ModelKeys], dict[str, Any]] = _nothing_restored
    differs: Callable[[Values, Architecture], str | None] = _no_difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A family's form in GGUF.

    Attributes:
        architecture: llama.cpp's name.
        model_class: transformers' class for causal language modelling.
        names: Whose tensor names these are, where the ``gguf`` package does not know the architecture.
        read: Whether files of the architecture are read as this family; one of several that compute the same is.
        pairs: Whether llama.cpp rotates neighbours where transformers rotates halves, so that q and k are permuted.
        biases: Which of a layer's linears outside the experts may have one: of q, k, v, o, gate, up, down.
        grouped: Whether several query heads may share a key head.
        tied: Whether the head may be the embedding.
        heads_fill_hidden: Whether all heads together must be as wide as the model.
        windows: Layers that attend to a window, None where llama.cpp knows none.
        window: Whether ``sliding_window`` holds unless ``use_sliding_window`` says that it does not.
        theta: The base of the rotary frequencies where config.json may leave it out.
        alpha: Whether ``dynamic`` scaling with an ``alpha`` is a larger base, whatever the length of the text.
        rope_factors: Whether llama.cpp reads a tensor by which frequencies are divided.
        rotated: The share of a head that is rotated where config.json does not say it; None for whole heads always.
        experts: The experts, None of a dense family.
        stated: What the file states besides.
        fixed: What llama.cpp leaves no choice of.
        present: Keys of config.json that say whether layers have tensors of such names, as expressions.
        predicts: Whether a file may hold layers behind the last that only predict further tokens.
        mixing: How layers mix tokens, where that is not attention of q, k and v alone.
        differs: What else llama.cpp computes otherwise, or None.
    """

    architecture: str
    model_class: str
    names: MODEL_ARCH | None = None
    read: bool = True
    pairs: bool = False
    biases: tuple[str, ...] = ("q", "k", "v")
    grouped: bool = True
    tied: bool = True
    heads_fill_hidden: bool = False
    windows: Windows | None = None
    window: bool = False
    theta: float | None = None
    alpha: bool = False
    rope_factors: bool = False
    rotated: Callable[[Values], float] | None = None
    experts: Experts | None = None
    stated: tuple[Stated, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    present: Mapping[str, str] = field(default_factory=lambda: {"attention_bias": ATTENTION_BIAS})
    predicts: bool = False
    mixing: Mixing = field(default_factory=Mixing)
    differs: Callable[[Values, Architecture], str | None] = _no_difference

    @property
    def table(self) -> MODEL_ARCH:
        """The architecture in the ``gguf`` package's tables of names."""
        if self.names is not None:
            return self.names
        return next(one for one, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
