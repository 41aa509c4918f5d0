r"""What a token's two distributions have to do with each other: the reference's p and the build's q.

The reference is kept whole, or as its ``k`` most probable tokens with the mass P of the rest, the tail. The build's
distribution is always whole. Then of the divergence, sum p log(p/q), the tail's part is unknown, but bounded:

- From below, by the log-sum inequality, by P log(P / Q), Q being the build's mass on the same tokens: what is left if
  all tokens of the tail are counted as one.
- From above: the divergence is convex in p, so over all tails with mass P whose probabilities are at most p_k, the
  least of those kept, it is largest in a corner: p_k on the tokens of the tail that the build finds least probable, as
  many as P / p_k, the last of them in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.evaluation.engines.base import Logits

Floats: TypeAlias = NDArray[np.float64]
Floats32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's distributions of n tokens.

    Attributes:
        logprobs: float32 [n, vocabulary], or [n, k] of the most probable tokens, most probable first.
        ids: int32 [n, k]; None if the distributions are whole.
        tail: float32 [n]; mass of all other tokens; None if the distributions are whole.
        target: float32 [n]; log-probability of the token that follows.
    """

    logprobs: Floats32
    ids: NDArray[np.int32] | None
    tail: Floats32 | None
    target: Floats32

    @classmethod
    def of(cls, logits: Logits, targets: NDArray[np.int32], top: int | None) -> Reference:
        """From logits [n, vocabulary]; ``top``: how many tokens to keep, None for all."""
        logprobs = log_softmax(logits)
        target = logprobs.gather(1, _column(targets))[:, 0]
        if top is None or top >= logprobs.shape[1]:
            return cls(logprobs.numpy(), None, None, target.numpy())
        kept, ids = logprobs.topk(top, dim=1)
        rest = logprobs.scatter(1, ids, -torch.inf)
        # Summed over the tail itself: one minus the rest's sum would be rounding error where the tail is thin.
        tail = rest.double().exp().sum(1).float()
        return cls(kept.numpy(), ids.int().numpy(), tail.numpy(), target.numpy())

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens, None where only the most probable ones are known."""
        return self.logprobs.shape[1] if self.ids is None else None

    def rows(self, start: int, stop: int) -> Reference:
        """Some of the tokens."""
        ids = None if self.ids is None else self.ids[start:stop]
        tail = None if self.tail is None else self.tail[start:stop]
        return Reference(self.logprobs[start:stop], ids, tail, self.target[start:stop])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a file."""
        found: dict[str, NDArray[Any]] = {"logprobs": self.logprobs, "target": self.target}
        if self.ids is not None and self.tail is not None:
            found |= {"ids": self.ids, "tail": self.tail}
        return found


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of n tokens, one value each.

    Attributes:
        nll: float32; the build's negative log-likelihood, in nats.
        reference_nll: float32; the reference's.
        kl: float32; divergence of the build from the reference, in nats; a lower bound if tails are unknown.
        kl_high: float32; an upper bound; None where ``kl`` is exact.
        agree: bool; whether both find the same token most probable.
        confidence: float32; the reference's largest probability.
    """

    nll: Floats32
    reference_nll: Floats32
    kl: Floats32
    kl_high: Floats32 | None
    agree: NDArray[np.bool_]
    confidence: Floats32

    @property
    def delta_p(self) -> Floats:
        """The change of the following token's probability, float64."""
        return np.exp(-self.nll.astype(np.float64)) - np.exp(-self.reference_nll.astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By field name; fields that are None are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> TokenScores:
        """The inverse of :meth:`arrays`."""
        names = ("nll", "reference_nll", "kl", "agree", "confidence")
        return cls(kl_high=arrays.get("kl_high"), **{name: arrays[name] for name in names})

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """One after the other."""
        arrays = [part.arrays() for part in parts]
        return cls.from_arrays({name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]})


def log_softmax(logits: Logits) -> Tensor:
    """float32 [n, vocabulary]."""
    return torch.log_softmax(torch.from_numpy(np.ascontiguousarray(logits)), dim=-1)


def negative_log_likelihood(logits: Logits, targets: NDArray[np.int32]) -> Floats32:
    """Of each target, float32 [n]; infinite where the logits are not finite."""
    found = -log_softmax(logits).gather(1, _column(targets))[:, 0]
    return torch.nan_to_num(found, nan=torch.inf).numpy()


def token_scores(reference: Reference, logits: Logits, targets: NDArray[np.int32]) -> TokenScores:
    """Compare a build's logits [n, vocabulary] with the reference, token by token, in float32.

    Logits that are not finite give infinite values.
    """
    q = log_softmax(logits)
    p = torch.from_numpy(reference.logprobs)
    bad = ~torch.isfinite(q.amax(1))
    if reference.ids is None or reference.tail is None:
        kl, high = _divergence(p, q).float(), None
        best = p.argmax(1)
    else:
        ids = torch.from_numpy(reference.ids).long()
        kl, high = _bounds(p, ids, torch.from_numpy(reference.tail), q)
        best = ids[:, 0]
        high[bad] = torch.inf
    kl[bad] = torch.inf
    return TokenScores(
        nll=negative_log_likelihood(logits, targets),
        reference_nll=-reference.target,
        kl=kl.numpy(),
        kl_high=None if high is None else high.numpy(),
        agree=((q.argmax(1) == best) & ~bad).numpy(),
        confidence=p.amax(1).exp().numpy(),
    )


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p log(p/q) - p + q over each row, float64 [n].

    Over whole distributions p and q add nothing, but each term is then at least 0, and what rounding did to the
    normalization of either, which in float32 is as much as a small divergence, cancels.
    """
    p, difference = log_p.exp(), log_p - log_q
    # Near 0 as p (d + expm1(-d)), whose digits do not cancel; beyond, expm1 could overflow.
    near = p * (difference + torch.expm1(-difference.clamp(min=-20.0)))
    far = torch.where(p > 0, p * difference, 0.0) - p + log_q.exp()
    return torch.where((difference > -20.0) & (p > 0), near, far).sum(1, dtype=torch.float64)


def _bounds(p: Tensor, ids: Tensor, tail: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest divergence, float32 [n] each. See the module."""
    head = _divergence(p, q.gather(1, ids))
    rest = q.double().scatter(1, ids, -torch.inf)  # the build's log-probabilities on the tail
    low = head + _divergence(tail.double().log()[:, None], rest.logsumexp(1)[:, None])
    # The least probable tokens first; the kept ones, marked by minus infinity, are put behind them.
    ordered = torch.where(rest == -torch.inf, torch.inf, rest).sort(1).values
    in_tail = torch.isfinite(ordered)
    least = p[:, -1:].double()
    share = tail.double()[:, None] / least.exp() - torch.arange(ordered.shape[1])  # of p_k that each token gets
    worst = torch.where(in_tail, share.clamp(0.0, 1.0).log() + least, -torch.inf)
    high = head + _divergence(worst, torch.where(in_tail, ordered, -torch.inf))
    return low.float(), high.float()


def _column(targets: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(targets.astype(np.int64))[:, None]
