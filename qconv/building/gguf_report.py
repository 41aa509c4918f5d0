"""What a GGUF build says of itself: ``qconv-report.json`` and the model card, and how far an imatrix covers a model.

Nothing in it depends on the time, the machine's name or on how often the run was interrupted.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from qconv.artifacts.bits import BITS, gguf_bits
from qconv.artifacts.verbatim import Verbatim, VerbatimPart, not_taken, part_values
from qconv.boundary.printable import markdown_block, markdown_code, markdown_text
from qconv.building.chosen import allocation_lines
from qconv.building.engine_lines import engine_lines, rope_lines
from qconv.calibration.mixture import corpus_lines
from qconv.errors import RecipeError, UsageError
from qconv.formats.gguf.imatrix import Imatrix
from qconv.formats.gguf.mixture import needs_importance
from qconv.formats.gguf.names import GgufTensor
from qconv.planning.gguf_plan import GgufPlan
from qconv.planning.gguf_recipe import GgufRecipe

WEAKEST = 10
"""Experts that a report names."""


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert of few tokens, and the share of its importance that is its layer's."""

    expert: str
    tokens: int
    shrinkage: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """How far an importance matrix speaks of a model.

    Attributes:
        weights: Matrices in the layers that a file type decides about, an expert's each counted as part of its layer's.
        covered: Those of them with an importance.
        experts: The experts with one, over all layers; the fields after it are about their tokens.
        mostly_shared: Experts that take at least half of their importance from their layer.
        weakest: The least covered of those that take a fifth or more from their layer.
    """

    weights: int
    covered: int
    experts: int
    least: int
    median: int
    most: int
    without_tokens: int
    mostly_shared: int
    weakest: tuple[Expert, ...]

    @classmethod
    def of(cls, matrix: Imatrix, tensors: Iterable[GgufTensor], shrinkage_tokens: float) -> Coverage:
        """Of a matrix over the tensors of a file.

        Raises:
            UsageError: the matrix is of another model.
        """
        subjects = [tensor for tensor in tensors if tensor.quantizable and tensor.layer is not None]
        covered = 0
        counts: dict[int, Tensor] = {}
        for tensor in subjects:
            entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
            if entry is None:
                continue
            seen = entry.seen
            covered += bool(seen.any())
            if len(tensor.sources) > 1 and tensor.layer is not None:
                counts[tensor.layer] = torch.minimum(counts.get(tensor.layer, seen), seen)
        if not covered:
            raise UsageError(
                f"imatrix: none of its {len(matrix.entries)} entries is of a weight of this model.",
                hint="The imatrix is of another model, or of none that llama.cpp knows.",
            )
        experts = [
            Expert(f"blk.{layer} expert {number}", round(count), _share(count, shrinkage_tokens))
            for layer, layer_counts in sorted(counts.items())
            for number, count in enumerate(layer_counts.tolist())
        ]
        tokens = sorted(expert.tokens for expert in experts) or [0]
        weakest = sorted((one for one in experts if one.shrinkage >= 0.2), key=lambda one: one.tokens)
        return cls(
            weights=len(subjects),
            covered=covered,
            experts=len(experts),
            least=tokens[0],
            median=int(statistics.median(tokens)),
            most=tokens[-1],
            without_tokens=sum(expert.tokens == 0 for expert in experts),
            mostly_shared=sum(expert.shrinkage >= 0.5 for expert in experts),
            weakest=tuple(weakest[:WEAKEST]),
        )

    def sentence(self) -> str:
        """In a few words."""
        said = f"{self.covered} of {self.weights} weights in layers have an importance"
        if self.experts:
            said += (
                f"; tokens per expert: least {self.least:,}, median {self.median:,}, most {self.most:,}; "
                f"{self.without_tokens} of {self.experts} experts saw no token and take their layer's"
            )
        return said

    def values(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def needing_importance(plan: GgufPlan) -> Iterator[GgufTensor]:
    """The tensors that are useless without an importance."""
    for tensor in plan.tensors.values():
        if needs_importance(plan.file_type, tensor, plan.types[tensor.name]):
            yield tensor


def require_compensated(plan: GgufPlan, recipe: GgufRecipe) -> None:
    """Check that a calibrated build leaves to the encoder alone nothing that needs an importance.

    Raises:
        RecipeError: a rule does.
    """
    for tensor in needing_importance(plan) if recipe.is_calibrated else ():
        if recipe.method_for(tensor) == ("rtn",):
            raise RecipeError(
                f"rules: {tensor.name} becomes {plan.types[tensor.name].name} by its encoder alone, which is useless "
                "without an importance.",
                hint="Give it method gptq, or another type.",
            )


def require_coverage(plan: GgufPlan, shrinkage_tokens: float, matrix: Imatrix, *, complete: bool) -> Coverage:
    """How far a matrix covers the model; if ``complete``, it must cover all that needs it.

    Raises:
        UsageError: it is of another model, or lacks what a type needs.
    """
    coverage = Coverage.of(matrix, plan.tensors.values(), shrinkage_tokens)
    for tensor in needing_importance(plan) if complete else ():
        entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
        if entry is None or not bool(entry.seen.any()):
            raise UsageError(
                f"gguf:{plan.file_type}: {tensor.name} becomes {plan.types[tensor.name].name}, which is useless "
                "without an importance, and the imatrix has none for it.",
                hint="Give --calib to collect one, or another type for this tensor.",
            )
    return coverage


def plan_values(plan: GgufPlan) -> dict[str, Any]:
    """What a report says of a build's size."""
    return {
        "parameters": sum(tensor.numel for tensor in plan.tensors.values()),
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "files": [file.name for file in plan.files],
        **_bits(plan),
    }


def _bits(plan: GgufPlan) -> dict[str, Any]:
    """Bits by layer and role, where there are several types."""
    sizes = {info.name: info.nbytes for file in plan.files for info in file.tensors}
    matrices = {name: one for name, one in plan.tensors.items() if one.quantizable}
    if len({plan.types[name] for name, one in matrices.items() if one.layer is not None}) < 2:
        return {}
    return {BITS: gguf_bits({name: (sizes[name], one.numel) for name, one in matrices.items()}).values()}


def tensor_values(plan: GgufPlan, snr_db: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """What a report says of each tensor, in file order: its type, the one that it was to have, its error.

    Args:
        plan: The build.
        snr_db: By file and tensor, its signal to noise in decibels.
    """
    return {
        name: {"type": plan.types[name].name, **_replaced(plan, name), "snr_db": snr}
        for file in plan.files
        for name, snr in snr_db[file.name].items()
    }


def _replaced(plan: GgufPlan, name: str) -> dict[str, str]:
    """The type that a tensor was to have, where it has another."""
    wanted = plan.wanted[name]
    return {} if wanted == plan.types[name] else {"wanted": wanted.name}


def importance_values(matrix: Imatrix, coverage: Coverage, file: str | None) -> dict[str, Any]:
    """What a report says of an importance matrix, and of the file in the build's folder that holds it."""
    return {"datasets": list(matrix.datasets), "file": file, "coverage": coverage.values()}


def left_out_values(verbatim: Sequence[Verbatim]) -> dict[str, Any]:
    """What a report says of the parts of a source that the files have no place for, if there are any."""
    return {"left_out": part_values(verbatim)} if verbatim else {}


def model_card(report: Mapping[str, Any]) -> str:
    """README.md for a build's folder, in the Hub's form, from the report's values."""
    front = yaml.safe_dump({"base_model": report["source"], "tags": ["gguf", "qconv"]}, sort_keys=False)
    types = Counter(one["type"] for one in report["tensors"].values())
    figures = {name: one["snr_db"] for name, one in report["tensors"].items() if one["snr_db"] is not None}
    lines = [
        f"---\n{front}---",
        f"# {markdown_text(report['source'])}, {report['format']}",
        f"Written for llama.cpp with qconv {report['qconv']}, straight from the source's shards: "
        f"{report['bits_per_weight']:.2f} bits per weight over all {report['parameters']:,} parameters. "
        + (
            f"Give llama.cpp the first of {len(report['files'])} files, {markdown_code(report['files'][0])}."
            if len(report["files"]) > 1
            else f"The model is {markdown_code(report['files'][0])}."
        ),
        _table(("type", "tensors"), [(name, str(count)) for name, count in sorted(types.items())]),
        *_left_out_lines(report.get("left_out", ())),
        *allocation_lines(report),
        "## Importance matrix",
        *_imatrix_lines(report["imatrix"]),
    ]
    if figures:
        worst = sorted(figures, key=lambda name: figures[name])[:5]
        lines += [
            "## Error",
            "Signal to noise ratio of decoded weights against the source on sampled rows, in decibels; the least:",
            _table(
                ("tensor", "type", "dB"),
                [(f"`{name}`", report["tensors"][name]["type"], f"{figures[name]:.1f}") for name in worst],
            ),
        ]
    lines += rope_lines(report["recipe"])
    lines += engine_lines(report.get("engines", ()))
    lines += ["## Recipe", markdown_block(yaml.safe_dump(report["recipe"], sort_keys=False), "yaml")]
    lines.append(
        "`qconv-report.json` holds every tensor's figures. `qconv verify . --against SOURCE` checks this folder "
        "against the source again; `sha256sum -c SHA256SUMS` checks the files alone."
    )
    return "\n\n".join(lines) + "\n"


def _left_out_lines(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"Of the source {not_taken([VerbatimPart(**one) for one in parts])}."] if parts else []


def _imatrix_lines(imatrix: Mapping[str, Any] | None) -> list[str]:
    if imatrix is None:
        return ["None: every column of a weight counts alike."]
    coverage = imatrix["coverage"]
    lines = [f"Collected on {markdown_text('; '.join(imatrix['datasets'])) or 'what its file does not say'}."]
    if imatrix["file"] is not None:
        lines.append(f"`{imatrix['file']}` is what qconv collected, in the form that llama.cpp's programs read.")
    lines.append(f"{coverage['covered']} of {coverage['weights']} weights in the layers have an importance.")
    if coverage["experts"]:
        lines.append(
            f"Each token counts for the experts that the router sent it to. Tokens per expert: least "
            f"{coverage['least']:,}, median {coverage['median']:,}, most {coverage['most']:,}. "
            f"{coverage['without_tokens']} of {coverage['experts']} experts saw no token, and "
            f"{coverage['mostly_shared']} took at least half of their importance from their layer."
        )
    lines += corpus_lines(coverage)
    if coverage["weakest"]:
        rows = [(one["expert"], f"{one['tokens']:,}", f"{100 * one['shrinkage']:.0f} %") for one in coverage["weakest"]]
        lines.append(_table(("least covered expert", "tokens", "share of its layer"), rows))
    return lines


def _share(tokens: float, shrinkage_tokens: float) -> float:
    """What an expert of so many tokens takes from its layer; all of it where it has none."""
    return round(shrinkage_tokens / (tokens + shrinkage_tokens), 6) if tokens else 1.0


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
