"""The bytes of every kind of build, as hashes, so that a change of the code can be shown to change none of them.

Builds the model in every packaged recipe, with the options that lead through other code, and in every GGUF type, each
in a process of its own; then hashes what engines read: weights, config.json, importance matrices and their like.
Reports, model cards and checksums tell of the run, and are left out. ``--compare`` exits with 1 and names every file
that is not as it was. Calibrated builds depend on the processor too: the digest of its arithmetic is kept beside the
hashes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import yaml

from evals.many_threads import forked
from evals.options import model_option
from evals.recipes import general_recipes
from qconv.building.arithmetic import digest, processor
from qconv.formats.gguf.mixture import FILE_TYPES

TEXT = ("--tokens", "1024", "--sequence-length", "128")
"""Calibration that keeps a build short; most experts of the bundled model still see hundreds of tokens."""
OF_THE_RUN = ("README.md", "qconv-report.json", "SHA256SUMS")
"""What tells of the run, and is no part of the model."""
IMPORTANCE = "imatrix"
"""The build that is an importance matrix alone; other variants take it from there."""
CALIBRATED_TYPES = ("Q2_K", "Q4_0", "Q4_K_M", "IQ4_XS", "IQ3_S")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")


@dataclass(frozen=True, slots=True)
class Variant:
    """One build: the command's name, its options, and the recipe's file if there is to be one."""

    name: str
    options: tuple[str, ...]
    command: str = "quantize"
    recipe: Mapping[str, object] | None = None


def variants() -> Iterator[Variant]:
    """All builds; the importance matrix before those that use it."""
    yield Variant(IMPORTANCE, TEXT, command="imatrix")
    for name in general_recipes():
        uncalibrated = name.removeprefix("qwen3-coder-480b-") in ("fp8", "fp8-dynamic")
        yield Variant(f"recipe {name}", ("--recipe", name, *(() if uncalibrated else TEXT)))
    yield from _of_options()
    yield from _of_recipes()
    for name in FILE_TYPES:
        importance = ("--imatrix", IMPORTANCE) if name in NEED_IMPORTANCE else ()
        yield Variant(f"gguf {name}", ("--fmt", f"gguf:{name}", *importance))
    for name in CALIBRATED_TYPES:
        yield Variant(f"gguf {name} --calib", ("--fmt", f"gguf:{name}", "--calib", "python-stdlib", *TEXT))
    rules = ("--tensor-type", "attn_(k|v)=Q8_0", "--tensor-type", "ffn_down=Q6_K")
    yield Variant("gguf Q4_K_S --tensor-type", ("--fmt", "gguf:Q4_K_S", *rules))
    yield Variant("gguf Q5_K_M, several files", ("--fmt", "gguf:Q5_K_M", "--max-shard-size", "0.003"))


def _of_options() -> Iterator[Variant]:
    """What the command line turns on and off, over the packaged recipes."""
    for fmt in ("awq", "gptq", "w4a16"):
        yield Variant(f"{fmt} --method rtn", ("--fmt", fmt, "--method", "rtn"))
        yield Variant(f"{fmt} --method awq+gptq", ("--fmt", fmt, "--method", "awq+gptq", *TEXT))
    yield Variant("gptq --no-propagate", ("--fmt", "gptq", "--no-propagate", *TEXT))
    yield Variant("gptq --routing all-experts", ("--fmt", "gptq", "--routing", "all-experts", *TEXT))
    yield Variant("w4a16 --skip", ("--fmt", "w4a16", "--skip", "*.self_attn.*", *TEXT))
    yield Variant("awq, many files", ("--fmt", "awq", "--max-shard-size", "0.001", *TEXT))


def _of_recipes() -> Iterator[Variant]:
    """What only a recipe's file says."""
    calibration = {"tokens": 1024, "sequence_length": 128}
    for ordering in ("none", "static", "desc_act"):
        recipe = {"format": "gptq", "method": "gptq", "gptq": {"ordering": ordering}, "calibration": calibration}
        yield Variant(f"gptq, ordering {ordering}", (), recipe=recipe)
    for fmt, bits in (("gptq", 2), ("gptq", 3), ("gptq", 8), ("w4a16", 8)):
        grid = {"bits": bits, "group_size": 64}
        recipe = {"format": fmt, "method": "gptq", "grid": grid, "calibration": calibration}
        yield Variant(f"{fmt}, {bits} bits", (), recipe=recipe)
    weighted = calibration | {"token_weights": "router"}
    recipe = {"format": "w4a16", "method": ["awq", "gptq"], "grid": {"group_size": 32}, "calibration": weighted}
    yield Variant("w4a16, tokens by router", (), recipe=recipe)
    asymmetric = {"group_size": -1, "symmetric": False}
    yield Variant("gptq, rows, zero points", (), recipe={"format": "gptq", "method": "rtn", "grid": asymmetric})
    for fmt, group_size in (("fp8", 128), ("fp8_dynamic", -1), ("fp8_static", -1)):
        grid = {"bits": 8, "group_size": group_size}
        recipe = {"format": fmt, "method": "rtn", "grid": grid, "clip": {"enabled": True}, "calibration": calibration}
        yield Variant(f"{fmt}, scales searched", (), recipe=recipe)


@click.command(help=__doc__)
@model_option
@click.option("--only", metavar="TEXT", help="Only variants in whose names that is.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the table there, as JSON.")
@click.option("--compare", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A table of before.")
def main(model: Path, only: str | None, out: Path | None, compare: Path | None) -> None:
    """Build, print a table, and exit."""
    chosen = [one for one in variants() if only is None or only in one.name or one.name == IMPORTANCE]
    # What is only imported need not be imported in every process.
    importlib.import_module("qconv.calibration.run")
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    hashes: dict[str, dict[str, str]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qconv-digests-") as scratch:
        for variant in chosen:
            started = time.monotonic()
            found = build(variant, model, Path(scratch))
            if found is None:
                failed.append(variant.name)
            else:
                hashes[variant.name] = found
            for file, value in (found or {"failed": ""}).items():
                click.echo(f"{variant.name}: {file} {value}")
            click.echo(f"{variant.name}: {time.monotonic() - started:.1f} s", err=True)
    table = Table(digest(), processor(), hashes)
    if out is not None:
        out.write_text(json.dumps(asdict(table), indent=1, sort_keys=True) + "\n")
    problems = [f"{name}: the command failed" for name in failed]
    if compare is not None:
        before = Table(**json.loads(compare.read_text()))
        problems += differences(before, table, [one.name for one in chosen] if only is not None else None)
    for problem in problems:
        click.echo(problem, err=True)
    click.echo(f"{len(hashes)} builds, {len(problems)} problems; arithmetic {table.arithmetic}", err=True)
    sys.exit(1 if problems else 0)


@dataclass(frozen=True, slots=True)
class Table:
    """What was built where: sha256, hexadecimal, by variant and file."""

    arithmetic: str
    processor: str
    hashes: dict[str, dict[str, str]]


def build(variant: Variant, model: Path, scratch: Path) -> dict[str, str] | None:
    """The hashes of a variant's files by name, or None if the command failed; files of importance stay in scratch."""
    out = scratch / variant.name.replace(" ", "-").replace(":", "-")
    importance = str(scratch / IMPORTANCE / "imatrix.gguf")
    options = [importance if option == IMPORTANCE else option for option in variant.options]
    if variant.recipe is not None:
        recipe = scratch / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(dict(variant.recipe)))
        options += ["--recipe", str(recipe)]
    if forked([variant.command, str(model), *options, "-o", str(out)]):
        return None
    return hashed(out)


def hashed(folder: Path) -> dict[str, str]:
    """sha256, hexadecimal, of every file that is a part of the model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in OF_THE_RUN)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(before: Table, after: Table, only: Sequence[str] | None = None) -> Iterator[str]:
    """What is not as it was, a sentence each.

    Args:
        before: The table to compare with.
        after: The new one.
        only: The variants that were built, None for all of them.
    """
    if before.arithmetic != after.arithmetic:
        yield (
            f"the arithmetic is {after.arithmetic} ({after.processor}), not {before.arithmetic} ({before.processor}): "
            "calibrated builds may differ for that alone"
        )
    for name in sorted(before.hashes.keys() | after.hashes.keys()):
        old, new = before.hashes.get(name), after.hashes.get(name)
        if only is not None and name not in only:
            continue
        if old is None or new is None:
            yield f"{name}: only {'before' if new is None else 'now'}"
            continue
        for file in sorted(old.keys() | new.keys()):
            if file not in old or file not in new:
                yield f"{name}: {file} is there only {'before' if file in old else 'now'}"
            elif old[file] != new[file]:
                yield f"{name}: {file} has other bytes"


if __name__ == "__main__":
    main()
