"""Linears that stay in 16 bits whatever the recipe says, each with the reason."""

from __future__ import annotations

import re

_REASONS = {
    r"kv_b_proj": "engines absorb latent attention's kv_b into the query and output products",
    r"in_proj_(ba|a|b)": "decay and gate of a delta rule: a few outputs a head, fewer than kernels take, and sensitive",
    r"g_proj": "gates the outputs of heads: one output a head in some models, fewer than kernels take",
    r"indexer\..*": "decides which tokens are attended to at all",
    r"(dt_proj|x_proj)": "the step size of a state space: few outputs, and sensitive",
    r".*latent_proj": "a projection that all experts share: small, and sensitive",
}


def reason_to_keep(name: str) -> str | None:
    """Why a linear of a mixer stays unquantized, by its name within the mixer; None if it need not."""
    return next((reason for pattern, reason in _REASONS.items() if re.fullmatch(pattern, name)), None)
