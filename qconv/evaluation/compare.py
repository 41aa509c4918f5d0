"""Two runs side by side: on the units that both measured, paired; what is common to both cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qconv.errors import UsageError
from qconv.evaluation.judging import paired
from qconv.evaluation.metrics import column
from qconv.evaluation.record import Item, Run, Task
from qconv.evaluation.statistics import (
    Floats,
    detectable_flips,
    detectable_mean,
    holm,
    mcnemar_p,
    ratio_interval,
    ratio_standard_error,
    upper_tail,
)

ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of the second run against the first.

    Attributes:
        task: Where it was measured.
        metric: Its name.
        first: Its value in the first run, over the units in common.
        second: In the second.
        value: The difference, or of perplexity the ratio.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Two-sided, adjusted by Holm's method over all differences.
        detectable: The least true difference that would probably have been found.
        units: How many units.
        lost: Problems that only the first solved.
        gained: Problems that only the second solved.
    """

    task: str
    metric: str
    first: float
    second: float
    value: float
    low: float
    high: float
    p_value: float
    detectable: float
    units: int
    lost: tuple[str, ...] = ()
    gained: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """What to say of it."""
        if self.p_value >= ALPHA:
            return "not distinguishable"
        worse = self.value > (1.0 if self.metric == "ppl.ratio" else 0.0)
        return "worse" if worse == (self.metric != "pass@1") else "better"


def compare(first: Run, second: Run) -> list[Difference]:
    """Every metric of every task that both runs have.

    Raises:
        UsageError: the runs share no units.
    """
    found = []
    for task in second.tasks:
        before = first.task(task.name)
        if before is None:
            continue
        items, theirs = paired(task, before, least=2)
        if items:
            found += list(_differences(task, items, theirs))
    if not found:
        raise UsageError(
            "the runs share no documents, windows or problems.", hint="Evaluate both with the same suite and seed."
        )
    adjusted = holm([one.p_value for one in found])
    return [replace(one, p_value=p_value) for one, p_value in zip(found, adjusted, strict=True)]


def not_compared(first: Run, second: Run) -> dict[str, str]:
    """Tasks that one of the runs could not measure, with the reason."""
    told = [("the first", one) for one in first.unmeasured] + [("the second", one) for one in second.unmeasured]
    found: dict[str, str] = {}
    for which, one in told:
        found.setdefault(one.name, f"{which} did not measure it: {one.sentence}")
    return found


def _differences(task: Task, items: Sequence[Item], theirs: Sequence[Item]) -> list[Difference]:
    if all("passed" in item.values for item in (*items, *theirs)):
        return [_passes(task, items, theirs)]
    found = []
    for metric, name in (("kld.mean", "kl"), ("top1.flips", "flips")):
        if all(name in item.values for item in (*items, *theirs)):
            found.append(_means(task, metric, column(theirs, name), column(items, name), column(items, "tokens")))
    found.append(
        _means(task, "ppl.ratio", column(theirs, "nll"), column(items, "nll"), column(items, "tokens"), np.exp)
    )
    return found


def _means(
    task: Task,
    metric: str,
    first: Floats,
    second: Floats,
    tokens: Floats,
    transform: Callable[[Floats], Floats] = lambda mean: mean,
) -> Difference:
    difference = second - first
    interval = ratio_interval(difference, tokens, transform=transform)
    error = ratio_standard_error(difference, tokens)
    mean = float(difference.sum() / tokens.sum())
    detectable = detectable_mean(error, len(tokens), ALPHA / 2.0)
    first_value, second_value = (float(transform(np.array([one.sum() / tokens.sum()]))[0]) for one in (first, second))
    return Difference(
        task=task.name,
        metric=metric,
        first=first_value,
        second=second_value,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=min(1.0, 2.0 * upper_tail(abs(mean), error, len(tokens))),
        detectable=math.expm1(min(detectable, 700.0)) if metric == "ppl.ratio" else detectable,
        units=len(tokens),
    )


def _passes(task: Task, items: Sequence[Item], theirs: Sequence[Item]) -> Difference:
    ours, known = (column(one, "passed") / column(one, "samples") for one in (items, theirs))
    difference = ours - known
    ones = np.ones(len(items))
    interval = ratio_interval(difference, ones)
    lost = tuple(item.name for item, change in zip(items, difference, strict=True) if change < 0)
    gained = tuple(item.name for item, change in zip(items, difference, strict=True) if change > 0)
    if np.all(np.isin(np.abs(difference), (0.0, 1.0))):
        p_value = mcnemar_p(len(lost), len(gained))
        detectable = detectable_flips(len(items), len(gained), ALPHA)
    else:
        error = ratio_standard_error(difference, ones)
        p_value = min(1.0, 2.0 * upper_tail(abs(float(difference.mean())), error, len(items)))
        detectable = detectable_mean(error, len(items), ALPHA / 2.0)
    return Difference(
        task=task.name,
        metric="pass@1",
        first=float(known.mean()),
        second=float(ours.mean()),
        value=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=p_value,
        detectable=detectable,
        units=len(items),
        lost=lost,
        gained=gained,
    )
