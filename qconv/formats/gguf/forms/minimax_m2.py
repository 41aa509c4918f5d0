"""MiniMax-M2: norms of all of q and k, part of each head is rotated, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Values


def _rotated(config: Values) -> float:
    """Published checkpoints say how many channels of a head are."""
    return float(config["rotary_dim"]) / float(config["head_dim"]) if config.get("rotary_dim") else 1.0


FORM = Form(
    architecture="minimax-m2",
    model_class="MiniMaxM2ForCausalLM",
    tied=False,
    rotated=_rotated,
    experts=Experts(width=None, gating=ExpertGatingFuncType.SIGMOID),
    fixed=(Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM),),
)
