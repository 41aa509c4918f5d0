"""What a build says of itself: ``qconv-report.json`` and the model card.

Nothing in either depends on the time, the machine's name or on how often the run was interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qconv import __version__
from qconv.artifacts.bits import BITS, module_bits
from qconv.artifacts.verbatim import VerbatimPart, copied, part_values
from qconv.boundary.printable import markdown_block, markdown_text
from qconv.building.chosen import Chosen, allocation_lines, allocation_values
from qconv.building.engine_lines import engine_lines, rope_lines
from qconv.calibration.mixture import corpus_coverage, corpus_lines
from qconv.engines.rule import Judgement
from qconv.planning.engines import engine_values
from qconv.planning.plan import BuildPlan
from qconv.planning.schemes import LinearScheme, in_full


@dataclass(frozen=True, slots=True)
class Report:
    """The report's values, ready for JSON."""

    values: dict[str, Any]

    @classmethod
    def make(
        cls,
        plan: BuildPlan,
        name: str,
        fingerprints: Mapping[str, str],
        corpus: str | None,
        units: Mapping[str, Mapping[str, Any]],
        chosen: Chosen | None = None,
        engines: Sequence[Judgement] = (),
    ) -> Report:
        """Assemble the report from the plan and the journal's unit records.

        Args:
            plan: The build's plan.
            name: The source model's name.
            fingerprints: What the build belongs to.
            corpus: Description of the calibration text, None where none was used.
            units: The journal's records by unit key.
            chosen: How the recipe's grids were chosen, if they were.
            engines: What engines will make of it.
        """
        layers = []
        for unit in plan.units:
            if unit.layer is None:
                continue
            record = units[unit.key]
            layers.append({"layer": unit.layer.index, "snr_db": record["snr_db"], **record["report"]})
        return cls(
            {
                "qconv": __version__,
                "source": name,
                "format": plan.format.name,
                "scheme": plan.scheme,
                **_schemes(plan),
                **_bits(plan),
                "recipe": plan.recipe.model_dump(mode="json"),
                **allocation_values(chosen),
                "fingerprints": dict(fingerprints),
                "calibration_corpus": corpus,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "quantized_bits_per_weight": round(plan.quantized_bits_per_weight, 4),
                "parameters": plan.weights,
                "skipped": plan.skipped,
                **_verbatim(plan),
                "coverage": _coverage(layers, plan),
                "degenerate": _degenerate(layers),
                "engines": engine_values(engines),
                "layers": layers,
            }
        )

    def model_card(self) -> str:
        """README.md for the build's folder, in the Hub's form."""
        values = self.values
        recipe = values["recipe"]
        method = recipe["method"] if isinstance(recipe["method"], str) else "+".join(recipe["method"])
        front = yaml.safe_dump(
            {"base_model": values["source"], "library_name": "transformers", "tags": ["qconv", values["format"]]},
            sort_keys=False,
        )
        lines = [
            f"---\n{front}---",
            f"# {markdown_text(values['source'])}, {values['format']}",
            f"Quantized with qconv {values['qconv']}: method `{method}`, format `{values['format']}`, "
            f"{values['scheme']}; "
            f"{values['bits_per_weight']:.2f} bits per weight over all {values['parameters']:,} parameters, "
            f"{values['quantized_bits_per_weight']:.2f} over the quantized ones. "
            "Routers, norms, embeddings and the output head are not quantized.",
            *_verbatim_lines(values.get("verbatim", ())),
            *_scheme_lines(values.get("schemes", ())),
            *allocation_lines(values),
            "## Error",
            "Signal to noise ratio of the dequantized weights against the source, in decibels, read back from the "
            "finished files.",
            _table(("layer", "least", "mean", "worst module"), [_error_row(layer) for layer in values["layers"]]),
        ]
        lines += self._calibration_lines()
        lines += _converted_lines(values.get("converted"))
        lines += rope_lines(recipe)
        lines += engine_lines(values.get("engines", ()))
        lines += ["## Recipe", markdown_block(yaml.safe_dump(recipe, sort_keys=False), "yaml")]
        lines.append(
            "`qconv-report.json` holds every module's figures. `qconv verify . --against SOURCE` checks this folder "
            "against the source again; `sha256sum -c SHA256SUMS` checks the files alone."
        )
        return "\n\n".join(lines) + "\n"

    def _calibration_lines(self) -> list[str]:
        values = self.values
        if values["calibration_corpus"] is None:
            return ["## Calibration", "None: the method rounds weights without looking at activations."]
        calibration, coverage = values["recipe"]["calibration"], values["coverage"]
        lines = [
            "## Calibration",
            f"{calibration['tokens']:,} tokens in sequences of {calibration['sequence_length']}: "
            f"{markdown_text(values['calibration_corpus'])}.",
        ]
        if coverage is not None:
            lines += _coverage_lines(coverage)
        degenerate = values["degenerate"]
        if degenerate:
            rows = [(f"`{row['module']}`", row["what"]) for row in degenerate[:10]]
            lines.append(f"Degenerate modules: {len(degenerate)}, the first of them in the table.")
            lines.append(_table(("module", "what"), rows))
        searches = [search for layer in values["layers"] for search in layer["searches"].values()]
        if searches:
            kept = sum(bool(search["kept_rtn"]) for search in searches)
            lines.append(
                f"Of {len(searches)} searches over whole layers, {kept} found nothing better than plain rounding and "
                "kept it."
            )
        mlps = [mlp for layer in values["layers"] for mlp in layer["experts"]]
        worse = sum(mlp["loss"] > mlp["rtn_loss"] for mlp in mlps)
        lines.append(
            f"Of {len(mlps)} MLPs, {worse} end with a larger output error than plain rounding would give them; "
            f"over all, the error is {_ratio(mlps):.3f} of plain rounding's."
        )
        compensated = [one for layer in values["layers"] for one in layer["compensations"].values()]
        if compensated:
            lines.append(_compensation_line(compensated))
        return lines


def _converted_lines(converted: Mapping[str, Any] | None) -> list[str]:
    """What a card says of a build that was made from another one's codes."""
    if converted is None:
        return []
    again = len(converted["rounded_again"])
    kept = f"{again:,} linears had no place in it and were rounded again." if again else "Every weight kept its number."
    return ["## Converted", f"From the layout `{converted['from']}`, not from the original weights. {kept}"]


def _schemes(plan: BuildPlan) -> dict[str, Any]:
    """Where linears have different grids or methods, what became of how many; else nothing."""
    names: dict[LinearScheme, list[str]] = {}
    for name, scheme in plan.schemes.items():
        names.setdefault(scheme, []).append(name)
    rows = [
        {"linears": len(of), "first": of[0], "scheme": in_full(one.grid), "method": one.method_name}
        for one, of in names.items()
    ]
    return {"schemes": rows} if len(rows) > 1 else {}


def _bits(plan: BuildPlan) -> dict[str, Any]:
    """Bits by layer and role, where linears are on several grids."""
    if len(plan.grids()) < 2:
        return {}
    candidates = {linear.name for layer in plan.architecture.layers for linear in layer.linears()}
    items = [item for item in plan.items() if item.module.name in candidates]
    sizes = ((one.module.name, sum(spec.nbytes for spec in one.specs), one.module.numel) for one in items)
    return {BITS: module_bits(sizes).values()}


def _verbatim(plan: BuildPlan) -> dict[str, Any]:
    """What is copied beside the model, if anything is."""
    return {"verbatim": part_values(plan.verbatim)} if plan.verbatim else {}


def _verbatim_lines(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not parts:
        return []
    rows = [(one["part"], f"{one['tensors']:,}", f"{one['nbytes']:,}", f"{one['dequantized']:,}") for one in parts]
    return [
        "## Not quantized",
        f"Beside the language model: {copied([VerbatimPart(**one) for one in parts])}. The skip list of config.json "
        "names their modules.",
        _table(("part", "tensors", "bytes", "dequantized"), rows),
    ]


def _scheme_lines(schemes: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [(f"{one['linears']:,}", f"`{one['first']}`", one["scheme"], one["method"]) for one in schemes]
    return ["## Schemes", _table(("linears", "the first", "scheme", "method"), rows)] if rows else []


def _coverage_lines(coverage: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Each token went to the experts that the router chose. Tokens per expert: least {coverage['least']:,}, "
        f"median {coverage['median']:,}, most {coverage['most']:,}. "
        f"{coverage['without_tokens']} of {coverage['experts']} experts saw no token and "
        f"{coverage['mostly_shared']} took at least half of their statistics from the layer as a whole."
    ]
    lines += corpus_lines(coverage)
    weakest = coverage["weakest"]
    if weakest:
        rows = [(row["module"], f"{row['tokens']:,}", f"{100 * row['shrinkage']:.0f} %") for row in weakest]
        lines.append(_table(("least covered expert", "tokens", "share of layer statistics"), rows))
    return lines


def _ratio(records: Sequence[Mapping[str, Any]], name: str = "loss") -> float:
    """The mean ratio of an error to plain rounding's."""
    ratios = [record[name] / record[f"rtn_{name}"] for record in records if record[f"rtn_{name}"] > 0]
    return statistics.fmean(ratios) if ratios else 1.0


def _compensation_line(linears: Sequence[Mapping[str, Any]]) -> str:
    raised, dead, rows = (
        sum(key in linear for linear in linears) for key in ("damp_percent", "dead_columns", "rows_kept_rtn")
    )
    return (
        f"GPTQ's error `d H d^T` on the calibration tokens is {_ratio(linears, 'error'):.3f} of plain rounding's on "
        f"average over {len(linears)} linears. The damping had to be raised for {raised} of them, {dead} have inputs "
        f"that were zero on every token, and {rows} hold rows that were left to plain rounding, which cost them less."
    )


def _coverage(layers: Sequence[Mapping[str, Any]], plan: BuildPlan) -> dict[str, Any] | None:
    """Tokens per routed expert over the whole model, or None without calibrated experts."""
    experts = [expert for layer in layers for expert in layer["experts"] if ".experts." in expert["module"]]
    if not experts:
        return None
    counts = sorted(expert["tokens"] for expert in experts)
    weakest = sorted(experts, key=lambda expert: (expert["tokens"], expert["module"]))[:10]
    k = plan.recipe.calibration.shrinkage_tokens
    return {
        "experts": len(counts),
        "least": counts[0],
        "median": int(statistics.median(counts)),
        "most": counts[-1],
        "without_tokens": sum(count == 0 for count in counts),
        "mostly_shared": sum(expert["shrinkage"] >= 0.5 for expert in experts),
        **corpus_coverage(plan.recipe.calibration, experts),
        "weakest": [
            {key: expert[key] for key in ("module", "tokens", "shrinkage")}
            for expert in weakest
            if expert["tokens"] <= 4 * k
        ],
    }


def _degenerate(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Modules whose weights or statistics left little to go by, and what was made of them."""
    found = []
    for layer in layers:
        for expert in layer["experts"]:
            if expert["tokens"] < 2:
                seen = "no calibration token" if expert["tokens"] == 0 else "one calibration token"
                share = f"{100 * expert['shrinkage']:.0f} % of its statistics are the layer's"
                found.append((expert["module"], f"saw {seen}: {share}"))
        for name, value in layer["snr_db"].items():
            if value is None:
                found.append((name, "is exact: all weights are zero or on the grid"))
        for name, record in layer["compensations"].items():
            if "damp_percent" in record:
                found.append(
                    (name, f"second moments too close to singular: damping raised to {record['damp_percent']:g}")
                )
    return [{"module": name, "what": what} for name, what in found]


def _error_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    figures = {name: value for name, value in layer["snr_db"].items() if value is not None and math.isfinite(value)}
    if not figures:
        return str(layer["layer"]), "", "", ""
    worst = min(figures, key=lambda name: figures[name])
    return str(layer["layer"]), f"{figures[worst]:.1f}", f"{statistics.fmean(figures.values()):.1f}", f"`{worst}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
