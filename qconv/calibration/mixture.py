"""Which calibration sequence comes from which corpus, where several are mixed by weight.

Whole sequences are given out, one by one, to the corpus that is furthest behind its weight: any beginning of the
sequences has about the mixture's proportions, and each corpus gives the sequences that it gives alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qconv.boundary.printable import markdown_text
from qconv.core.devices import CPU
from qconv.core.settings import CorpusShare, TextSettings
from qconv.errors import UsageError

BY_CORPUS = "tokens_by_corpus"
"""Of an expert's record: how many tokens of each corpus the router sent it, in the mixture's order."""


def origins(settings: TextSettings) -> Tensor:
    """The number of the corpus of each sequence, int64 [sequences].

    Raises:
        UsageError: a weight is so small that its corpus gives no sequence.
    """
    return _origins(settings.shares, settings.tokens // settings.sequence_length)


@lru_cache(maxsize=8)  # every expert's record asks
def _origins(shares: tuple[CorpusShare, ...], count: int) -> Tensor:
    total = sum(share.weight for share in shares)
    given = [0] * len(shares)
    found = []
    for index in range(count):
        behind = [share.weight / total * (index + 1) - had for share, had in zip(shares, given, strict=True)]
        chosen = behind.index(max(behind))
        given[chosen] += 1
        found.append(chosen)
    for share, had in zip(shares, given, strict=True):
        if not had:
            raise UsageError(
                f"calibration.corpus: {share.corpus}, of weight {share.weight:g}, gives none of {count} sequences.",
                hint="Give it more weight, or ask for more tokens.",
            )
    return torch.tensor(found, dtype=torch.int64, device=CPU)


def parts(settings: TextSettings) -> list[TextSettings]:
    """What is asked of each corpus alone, in the mixture's order.

    Raises:
        UsageError: as :func:`origins`.
    """
    shares = settings.shares
    if len(shares) == 1:
        return [settings]
    counts = torch.bincount(origins(settings), minlength=len(shares)).tolist()
    length = settings.sequence_length
    return [
        settings.model_copy(update={"corpus": share.corpus, "tokens": count * length})
        for share, count in zip(shares, counts, strict=True)
    ]


def part_of(settings: TextSettings, corpus: str) -> TextSettings | None:
    """What is asked of one corpus; None if it is none of the mixture's."""
    return next((one for one in parts(settings) if one.corpus == corpus), None)


def seen_by_corpus(settings: TextSettings, tokens: Tensor) -> dict[str, list[int]]:
    """For an expert's record: how many of its tokens, int64 [n], are of each corpus; empty where there is one."""
    if len(settings.shares) == 1:
        return {}
    of = origins(settings)[tokens.cpu() // settings.sequence_length]
    return {BY_CORPUS: torch.bincount(of, minlength=len(settings.shares)).tolist()}


def corpus_coverage(settings: TextSettings, experts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says of the tokens per expert by corpus, from the experts' records; empty where there is one.

    Args:
        settings: The calibration's.
        experts: Records of routed experts.
    """
    shares = settings.shares
    counts = [one[BY_CORPUS] for one in experts if BY_CORPUS in one]
    if len(shares) == 1 or not counts:
        return {}
    rows = []
    for share, seen in zip(shares, zip(*counts, strict=True), strict=True):
        values = {"least": min(seen), "median": int(median(seen)), "most": max(seen)}
        without = sum(not one for one in seen)
        rows.append({"corpus": share.corpus, "weight": share.weight, **values, "without_tokens": without})
    return {"by_corpus": rows}


def corpus_lines(coverage: Mapping[str, Any]) -> list[str]:
    """The same as a table of a card, if there is more than one corpus."""
    rows = [f"| {markdown_text(name)} | {' | '.join(cells)} |" for name, *cells in corpus_rows(coverage)]
    head = ["| corpus | weight | least tokens of an expert | median | most | experts without |", "|" + " --- |" * 6]
    return ["\n".join([*head, *rows])] if rows else []


def corpus_rows(coverage: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """Rows of a table of that: corpus, weight, least, median and most tokens of an expert, experts without."""
    return [
        (
            str(one["corpus"]),
            f"{one['weight']:g}",
            *(f"{one[name]:,}" for name in ("least", "median", "most")),
            f"{one['without_tokens']:,}",
        )
        for one in coverage.get("by_corpus", ())
    ]
