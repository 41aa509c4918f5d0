"""From token scores to numbers: sums by document or window, and over them metrics with intervals.

``ppl``, ``bits_per_byte``       of the build alone; per byte, builds with other tokenizers compare
``ppl.ratio``                    the build's perplexity over the reference's, on the same tokens
``kld.*``                        divergence from the reference, nats a token; ``kld.upper`` if the mean is a lower bound
``top1.flips``                   share of tokens where the two do not find the same token most probable
``delta_p.rms``                  root mean square of the change of the following token's probability
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.evaluation.divergence import Floats32, TokenScores
from qconv.evaluation.record import Item, Metric
from qconv.evaluation.statistics import Floats, finite, ratio_interval
from qconv.evaluation.windows import WindowedText

CONFIDENCES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Ends of the classes of reference confidence."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every scored token of a text.

    Attributes:
        nll: float32 [tokens]; the build's negative log-likelihood in nats.
        beside: The comparison with the reference; None where there is none.
    """

    nll: Floats32
    beside: TokenScores | None


def text_items(text: WindowedText, scores: Scores) -> tuple[Item, ...]:
    """Sums over each unit of a text."""
    unit = np.concatenate([window.units for window in text.windows])
    nbytes = np.concatenate([window.nbytes for window in text.windows])
    columns: dict[str, NDArray[np.generic]] = {"tokens": np.ones(len(unit)), "bytes": nbytes, "nll": scores.nll}
    beside = scores.beside
    if beside is not None:
        columns |= {"reference_nll": beside.reference_nll, "kl": beside.kl, "flips": ~beside.agree}
        columns["delta_p2"] = np.square(beside.delta_p)
        if beside.kl_high is not None:
            columns["kl_high"] = beside.kl_high
    sums = {
        name: np.bincount(unit, weights=values.astype(np.float64), minlength=len(text.units))
        for name, values in columns.items()
    }
    return tuple(
        Item(name=name, values={column: float(values[index]) for column, values in sums.items()})
        for index, name in enumerate(text.units)
    )


def column(items: Sequence[Item], name: str) -> Floats:
    """One value of every item, float64 [items]; infinite where the record could not hold it."""
    found = np.array([item.values[name] for item in items], dtype=np.float64)
    return np.where(np.isnan(found), np.inf, found)


def text_metrics(items: Sequence[Item], scores: Scores) -> dict[str, Metric]:
    """All metrics of a text task but the noise floor."""

    def per(
        name: str,
        numerator: Floats,
        denominator: str,
        transform: Callable[[Floats], Floats] = lambda one: one,
        *,
        unit: str,
        better: str = "lower",
    ) -> None:
        metrics[name] = _metric(numerator, column(items, denominator), transform, unit, better)

    metrics: dict[str, Metric] = {}
    nll = column(items, "nll")
    per("ppl", nll, "tokens", np.exp, unit="")
    per("bits_per_byte", nll / math.log(2.0), "bytes", unit="bits")
    beside = scores.beside
    if beside is None:
        return metrics
    reference_nll = column(items, "reference_nll")
    per("reference.ppl", reference_nll, "tokens", np.exp, unit="", better="neither")
    per("ppl.ratio", nll - reference_nll, "tokens", np.exp, unit="")
    per("kld.mean", column(items, "kl"), "tokens", unit="nats")
    if beside.kl_high is not None:
        per("kld.upper", column(items, "kl_high"), "tokens", unit="nats")
    per("top1.flips", column(items, "flips"), "tokens", unit="share")
    per("delta_p.rms", column(items, "delta_p2"), "tokens", np.sqrt, unit="")
    for name, quantile in (("median", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
        value = float(np.quantile(beside.kl, quantile, method="inverted_cdf"))
        metrics[f"kld.{name}"] = Metric(value=finite(value), unit="nats", better="lower", units=len(items))
    metrics["top1.agreement"] = Metric(
        value=float(beside.agree.mean()), unit="share", better="higher", units=len(items)
    )
    return metrics


def by_confidence(scores: Scores) -> list[JsonValue]:
    """Divergence and flips by classes of the reference's largest probability."""
    beside = scores.beside
    if beside is None:
        return []
    rows: list[JsonValue] = []
    classes = np.clip(np.digitize(beside.confidence, CONFIDENCES) - 1, 0, len(CONFIDENCES) - 2)
    for index in range(len(CONFIDENCES) - 1):
        chosen = classes == index
        count = int(chosen.sum())
        rows.append(
            {
                "from": CONFIDENCES[index],
                "to": CONFIDENCES[index + 1],
                "tokens": count,
                "kld.mean": finite(float(beside.kl[chosen].mean(dtype=np.float64))) if count else None,
                "top1.flips": float((~beside.agree[chosen]).mean()) if count else None,
            }
        )
    return rows


def _metric(
    numerator: Floats, denominator: Floats, transform: Callable[[Floats], Floats], unit: str, better: str
) -> Metric:
    count = len(numerator)
    values = {"unit": unit, "better": better, "units": count}
    if denominator.sum() == 0 or not np.all(np.isfinite(numerator)):
        return Metric.model_validate({"value": None, "note": "not finite", **values})
    with np.errstate(over="ignore"):
        interval = ratio_interval(numerator, denominator, transform=transform)
    low, high = finite(interval.low), finite(interval.high)
    return Metric.model_validate({"value": finite(interval.value), "low": low, "high": high, **values})
