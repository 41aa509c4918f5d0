"""What names and shapes cannot say of a layer, shown by numbers: how its parts are put together.

Each part of transformers' model is copied off the meta device with stand-ins in the place of everything large, which
give random numbers and keep what they were given. So a layer of any size is run in no memory, and what comes out is
compared with what qconv computes in its place.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qconv.core.architecture import HEAD, Joined, Layer, Linear, Mlp, Moe, Norm
from qconv.models.calls import Call, Calls, final_norm_of, with_children
from qconv.models.discovery.expert_forms import ExpertForm, form_of, is_told
from qconv.models.discovery.stand_ins import (
    Nothing,
    StandIn,
    Unproved,
    first_that_runs,
    is_equal,
    require_equal,
    running,
    with_submodules,
)
from qconv.models.discovery.tracing import is_reader, settings_of

_TOKENS = 6
_BEYOND_LIMITS = 100.0
"""How large numbers are where models may limit them: to 7 or 10 in MLPs, to 8 in keys and values."""


class Proofs:
    """Of one model, which lies on the meta device; ``held`` are its names of what the checkpoint calls otherwise.

    Raises:
        Unproved: it has no embedding where it is looked for.
    """

    def __init__(self, model: nn.Module, held: Mapping[str, str]) -> None:
        self._model: Any = model
        self._names = held
        self._config: Any = self._model.config
        with running("the model around its layers"):
            inner: Any = self._model.model
            if not hasattr(inner, "embed_tokens"):
                raise Unproved("its embedding is not called embed_tokens")
            if getattr(inner, "rotary_emb", None) is not None:
                rotary: Any = type(inner.rotary_emb)
                inner = with_children(inner, {"rotary_emb": rotary(self._config)})
            self._calls = Calls(inner, inner.embed_tokens.embedding_dim)
        self._generator = torch.Generator().manual_seed(0)
        self._forms: dict[tuple[type[nn.Module], str], ExpertForm] = {}

    @property
    def hidden(self) -> int:
        """The width of what runs through the layers."""
        return self._calls.hidden

    @property
    def heads(self) -> int:
        """Attention heads.

        Raises:
            Unproved: there are none.
        """
        heads = int(self._config.num_attention_heads)
        if heads < 1:
            raise Unproved(f"it has {heads} attention heads")
        return heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, by the config; as many as heads where it has none."""
        return int(getattr(self._config, "num_key_value_heads", None) or self.heads)

    @property
    def final_norm(self) -> str:
        """What the norm after the last layer is called in the model."""
        return final_norm_of(self._model.model)

    def ends(self) -> None:
        """The embedding's rows go into the first layer, and the final norm's into the head, whose outputs are logits.

        Raises:
            Unproved: something is done to them.
        """
        with running("the model around its layers"):
            rows, normed = (self._random(1, _TOKENS, self.hidden) for _ in range(2))
            logits = self._random(1, _TOKENS, 5)
            norm, head = StandIn(normed), StandIn(logits)
            require_equal(self._embedded(rows[0]), rows, "the embedding is scaled")
            around = {"embed_tokens": StandIn(rows), "rotary_emb": StandIn(rows), "layers": nn.ModuleList()}
            inner = with_children(self._model.model, {**around, self.final_norm: norm})
            output = with_children(self._model, {"model": inner, HEAD: head})(
                input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False
            )
            require_equal(norm.seen[0], rows, "the embedding is scaled")
            require_equal(head.seen[0], normed, "the head does not read the final norm")
            require_equal(output.logits, logits, "logits are scaled")

    def _embedded(self, weight: Tensor) -> Tensor:
        """What the embedding makes of all rows of a small weight, [1, rows, hidden]."""
        empty: Any = self._model.model.embed_tokens
        module = with_children(empty, {})
        module.__dict__["_parameters"] = {"weight": nn.Parameter(weight)}
        module.__dict__["_buffers"] = {name: self._random(*one.shape) for name, one in empty.named_buffers()}
        made: Tensor = module(torch.arange(len(weight)).unsqueeze(0))
        return made

    def layer(self, layer: Layer) -> None:
        """A layer is what qconv computes in its place.

        Raises:
            Unproved: it is not; says where.
        """
        self._residuals(layer)
        if isinstance(layer.mlp, Moe):
            self._sparse(layer.mlp)
        for mlp in layer.mlps() if not isinstance(layer.mlp, Moe) else [layer.mlp.shared_expert]:
            if mlp is not None:
                self._mlp(mlp)

    def choice(self, block: str, router: str) -> tuple[int, bool]:
        """How many experts a token goes to, and whether their factors are on what they read.

        Args:
            block: transformers' name of a sparse block.
            router: Its router's.

        Raises:
            Unproved: to none.
        """
        with running(block):
            module, experts, hidden = self._block(block, router)
            scores: list[Any] = []
            module.get_submodule(router.removeprefix(f"{block}.")).register_forward_hook(
                lambda _, arguments, output: scores.append(output[0] if isinstance(output, tuple) else output)
            )
            if not is_told(self._model.get_submodule(f"{block}.experts")):
                experts.given = (torch.zeros(self._count(block) * _TOKENS, hidden),)
            module(self._random(1, _TOKENS, hidden))
            if len(experts.arguments) > 1:
                chosen, on_inputs = int(experts.arguments[1].shape[-1]), False
            else:
                chosen, on_inputs = int((scores[0] != 0).sum(-1).max()), True
        if chosen < 1:
            raise Unproved(f"{block} sends a token to no expert")
        return chosen, on_inputs

    def _count(self, block: str) -> int:
        """The number of a block's experts."""
        return int(next(self._model.get_submodule(f"{block}.experts").parameters()).shape[0])

    def offset(self, norm: str) -> float:
        """What a norm adds to its weight before it scales by it.

        Raises:
            Unproved: it does not scale what it gives by its weight.
        """
        with running(norm):
            module = self._real(self._held(norm), {})
            hidden = self._random(1, _TOKENS, module.weight.numel())
            for offset in (0.0, 1.0):
                module.weight.fill_(-offset)
                if not bool(module(hidden).any()):
                    return offset
        raise Unproved(f"the weight of {norm} does not scale what it gives")

    def _residuals(self, layer: Layer) -> None:
        hidden, attended, fed = (self._random(1, _TOKENS, layer.input_norm.size) for _ in range(3))
        mixer, first, second = (
            one.name.removeprefix(f"{layer.name}.")
            for one in (layer.attention, layer.input_norm, layer.post_attention_norm)
        )
        inside = layer.mlp.experts_name if isinstance(layer.mlp, Moe) else layer.mlp.gate.name
        block = self._held(inside).removeprefix(f"{layer.name}.").split(".")[0]
        with running("the model around its layers"):
            positional, named = self._calls.layer(layer.index, torch.zeros_like(hidden))

        def run(mixed: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Any, Tensor]:
            with running(layer.name):
                module = self._real(layer.name, {mixer: StandIn(*mixed), block: StandIn(*given)})
                output = module(hidden, *positional, **named)
                return module, output[0] if isinstance(output, tuple) else output

        # Some parts give something beside their output.
        none = torch.zeros(0)
        given = itertools.product(((attended, none), (attended,), (attended, none, none)), ((fed,), (fed, none)))
        module, output = first_that_runs(partial(run, *one) for one in given)
        with running(layer.name):
            middle = hidden + attended
            require_equal(output, middle + fed, "what attention and MLP give is not simply added")
            one, two = module.get_submodule(first), module.get_submodule(second)
            require_equal(module.get_submodule(mixer).seen[0], one(hidden), "attention does not read the first norm")
            require_equal(module.get_submodule(block).seen[0], two(middle), "the MLP does not read the second norm")
            for norm, offset in ((one, layer.input_norm.offset), (two, layer.post_attention_norm.offset)):
                before = norm(hidden)
                norm.weight.add_(offset).mul_(2.0).sub_(offset)
                require_equal(norm(hidden), 2.0 * before, "a norm's weight does not scale what it gives")

    def folding_groups(self, layer: Layer) -> tuple[bool, ...]:
        """For each group of a mixer's linears whether linears alone read what its norm gives; False without a norm.

        Raises:
            Unproved: the last linear does not give the mixer's output, or it does not run.
        """
        groups = layer.groups()
        last = groups[-1].linears[-1]
        with running(layer.attention.name):
            mixer = _RunningMixer.of(self, layer)
            read = [mixer.run(self._random(1, _TOKENS, self._calls.hidden)) for _ in range(2)]
            require_equal(mixer.output, mixer.linears[last.name].given[0], f"{last.name} does not give the output")
            found = [is_equal(read[1], read[0])]
            for norm in (group.producer for group in groups[1:]):
                read = []
                if isinstance(norm, Norm):
                    read = [mixer.with_norm(norm, self._random(1, _TOKENS, norm.size)) for _ in range(2)]
                found.append(len(read) == 2 and is_equal(read[1], read[0]))
        return tuple(found)

    def reads_by_heads(self, layer: Layer, v: Linear, o: Linear) -> bool:
        """Whether what ``o`` reads is linear in the outputs of ``v``, each head's in one key-value head's."""
        head_dim = o.in_features // self.heads
        if o.in_features % self.heads or v.out_features % head_dim:
            return False
        groups = v.out_features // head_dim
        if groups == 0 or self.heads % groups:
            return False
        scale = 0.5 + torch.rand(v.out_features, generator=self._generator)
        spread = scale.view(groups, 1, head_dim).expand(groups, self.heads // groups, head_dim).reshape(-1)
        hidden = self._random(1, _TOKENS, self._calls.hidden)
        with running(layer.attention.name):
            mixer = _RunningMixer.of(self, layer)
            values = mixer.linears[v.name]
            values.given = (_BEYOND_LIMITS * values.given[0],)
            before = mixer.run(hidden)
            values.given = (values.given[0] * scale,)
            return is_equal(mixer.run(hidden), before * spread)

    def _mlp(self, mlp: Mlp) -> None:
        name = self._held(mlp.gate.name).rpartition(".")[0]
        gate, up = (_BEYOND_LIMITS * self._random(1, _TOKENS, mlp.gate.out_features) for _ in range(2))
        down = StandIn(self._random(1, _TOKENS, mlp.down.out_features))
        with running(name):
            module = self._real(name, {"gate_proj": StandIn(gate), "up_proj": StandIn(up), "down_proj": down})
            module(self._random(1, _TOKENS, mlp.gate.in_features))
            require_equal(down.seen[0], self._activation(gate) * up, f"{name} is not gated as its config says")

    def _sparse(self, moe: Moe) -> None:
        """What experts give, and the shared expert times its gate's sigmoid, is added."""
        block = self._held(moe.experts_name).rpartition(".")[0]
        with running(block):
            module, experts, hidden = self._block(block, self._held(moe.router.name))
            shared = torch.zeros(1, _TOKENS, hidden)
            if moe.shared_expert is not None:
                shared = self._random(1, _TOKENS, hidden)
                shared_expert = self._held(moe.shared_expert.gate.name).rpartition(".")[0]
                module.register_module(_leaf(shared_expert), StandIn(shared[0]))
            if moe.shared_expert_gate is not None:
                gate = self._random(_TOKENS, 1)
                module.register_module(_leaf(self._held(moe.shared_expert_gate.name)), StandIn(gate))
                shared = shared * torch.sigmoid(gate)
            scores: list[Tensor] = []
            router: Any = module.get_submodule(self._held(moe.router.name).removeprefix(f"{block}."))
            if moe.scales_inputs:
                router.register_forward_hook(lambda _, __, output: scores.append(output[0]))
                experts.given = (self._random(len(moe.experts) * _TOKENS, hidden),)
            given = self._random(1, _TOKENS, hidden)
            output = module(given)
            output = output[0] if isinstance(output, tuple) else output
            if moe.scales_inputs:
                answers = experts.given[0].view(len(moe.experts), _TOKENS, -1).sum(0)
                read = given[0] * scores[0].t().unsqueeze(-1)
                require_equal(experts.seen[0].view_as(read), read, f"{block}.experts do not read scaled inputs")
            else:
                answers = experts.given[0]
                read = experts.seen[0].view(_TOKENS, -1)
                require_equal(read, given[0], f"{block}.experts do not read the block's input")
                if not experts.arguments[2].shape == experts.arguments[1].shape:
                    raise Unproved(f"{block}.experts get no factor for each expert")
            require_equal(output.view(_TOKENS, -1), (answers + shared).view(_TOKENS, -1), f"{block} is no plain sum")
            # Scales that fold into the norm before a router are multiplied into its columns.
            chosen = experts.arguments[1:]
            scale = torch.exp2(torch.randint(-3, 4, (hidden,), generator=self._generator).float())
            router.weight.mul_(scale)
            module(given / scale)
            again = [scores[1]] if moe.scales_inputs else experts.arguments[1:]
            for before, after in zip([scores[0]] if moe.scales_inputs else chosen, again, strict=True):
                require_equal(
                    after.float(), before.float(), f"{block}'s router looks at more than products with what it reads"
                )

    def experts(self, name: str, hidden: int) -> ExpertForm:
        """How transformers' experts of a name lie together, and what they make of the outputs of gate and up.

        Raises:
            Unproved: they are no gated experts, gate before up, whose outputs are added with their factors.
        """
        module = self._model.get_submodule(name)
        kind = type(module), settings_of(module)
        if kind not in self._forms:
            forms = itertools.product((False, True), (False, True))
            self._forms[kind] = first_that_runs(
                partial(form_of, module, name, hidden, self._config, self._random, *form) for form in forms
            )
        return self._forms[kind]

    def joined(self) -> Joined:
        """How experts lie in a tensor of all of a layer; as most do where there are none."""
        form = next(iter(self._forms.values()), None)
        return Joined() if form is None else Joined(transposed=form.transposed, interleaved=form.interleaved)

    def _block(self, block: str, router: str) -> tuple[nn.Module, StandIn, int]:
        """A sparse block with a random router, stand-ins for its experts, and the size of what it reads."""
        empty = self._model.get_submodule(block)
        hidden = self._calls.hidden
        experts = StandIn(self._random(_TOKENS, hidden))
        stand_ins: dict[str, nn.Module] = {"experts": experts}
        deciding = router.removeprefix(f"{block}.").split(".")[0]
        for name, child in empty.named_children():
            if name not in ("experts", deciding) and not is_reader(child):
                stand_ins[name] = StandIn(torch.zeros(_TOKENS, hidden))
        return self._real(block, stand_ins), experts, hidden

    def _real(self, name: str, stand_ins: dict[str, nn.Module]) -> Any:
        """A copy of a module off the meta device, with random numbers for its tensors and other modules for some."""
        nothing: dict[str, nn.Module] = {child: Nothing() for child in stand_ins}
        module = copy.deepcopy(with_submodules(self._model.get_submodule(name), nothing))
        for child, stand_in in stand_ins.items():
            parent, _, leaf = child.rpartition(".")
            module.get_submodule(parent).register_module(leaf, stand_in)
        module = module.to_empty(device="cpu").float()
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(self._random(*tensor.shape))
        return module.eval()

    def _held(self, name: str) -> str:
        return self._names.get(name, name)

    def _activation(self, gate: Tensor) -> Tensor:
        from transformers.activations import ACT2FN

        activation: Callable[[Tensor], Tensor] = ACT2FN[self._config.hidden_act]
        return activation(gate)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


@dataclass(slots=True)
class _RunningMixer:
    """A mixer with stand-ins for its linears, by their names in the checkpoint."""

    module: Any
    call: Call
    linears: dict[str, StandIn]
    last: str
    inputs: Tensor
    output: Tensor = field(init=False)

    @classmethod
    def of(cls, proofs: Proofs, layer: Layer) -> _RunningMixer:
        linears = [one for one in layer.attention.modules() if isinstance(one, Linear)]
        stand_ins = {one.name: StandIn(proofs._random(1, _TOKENS, one.out_features)) for one in linears}
        name = layer.attention.name
        module = proofs._real(name, {key.removeprefix(f"{name}."): one for key, one in stand_ins.items()})
        like = torch.zeros(1, _TOKENS, proofs._calls.hidden)
        call = proofs._calls.mixer(layer.index, name.removeprefix(f"{layer.name}."), like)
        return cls(module, call, stand_ins, layer.groups()[-1].linears[-1].name, like)

    def run(self, hidden: Tensor) -> Tensor:
        """What the last linear reads for that input; ``output`` is what comes out."""
        self.output = self.call(self.module, hidden)
        read: Tensor = self.linears[self.last].seen[-1]
        return read

    def with_norm(self, norm: Norm, given: Tensor) -> Tensor:
        """The same with a norm that gives this."""
        parent, _, leaf = norm.name.removeprefix(f"{self.last.rpartition('.')[0]}.").rpartition(".")
        self.module.get_submodule(parent).register_module(leaf, StandIn(given))
        return self.run(self.inputs)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
