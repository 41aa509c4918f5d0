"""``qconv convert``: another layout of a build, with the same numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import costs, print_costs, print_engines, print_json, say, size, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import THREADS
from qconv.cli.options import json_option
from qconv.cli.progress import reporting
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.conversion.pipeline import Wanted

_SHARDED, _ROUNDED = "sharded:", ("bf16", "f16", "gguf:BF16", "gguf:F16")


@click.command(
    short_help="Write a build in another layout, without rounding again.",
    epilog=examples(
        "qconv convert BUILD --to compressed-tensors -o OUT",
        "qconv convert BUILD --to bf16 -o OUT",
        "qconv convert BUILD --to gguf -o OUT",
        "qconv convert model-Q8_0.gguf --to compressed-tensors --like MODEL -o OUT",
        "qconv convert BUILD --to sharded:5GB -o OUT",
    ),
)
@click.argument("build")
@click.option("--to", "layout", required=True, metavar="LAYOUT", help="awq, gptq, w4a16, fp8, bf16, sharded:5GB ...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the new build.")
@click.option("--like", metavar="MODEL", help="Of GGUF: take config.json, tokenizer and chat template from here.")
@click.option("--requantize", is_flag=True, help="Round again what the layout cannot hold, instead of doing nothing.")
@click.option("--restart", is_flag=True, help="Discard what the folder holds, if qconv made all of it.")
@click.option("--threads", type=THREADS, help="Matrices worked on at once; the bytes do not depend on it.")
@json_option
def command(
    build: str,
    layout: str,
    out: Path,
    like: str | None,
    requantize: bool,
    restart: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write BUILD, a folder, a GGUF file or a Hub id, in another LAYOUT of the same grid.

    Codes and scales are kept: each weight, code times scale in float32, is the same number before and after, which is
    checked, or nothing is written and the linears are named that have no place there. Works file by file; interrupted,
    the same command goes on.

    \b
    LAYOUT is
      a format of --fmt      awq, gptq, w4a16, fp8, fp8-dynamic, nvfp4, nvfp4-modelopt, mxfp4 ...
      compressed-tensors     that library's layout of the grid that BUILD has
      bf16, f16, f32         plain weights, code times scale, rounded once
      gguf, gguf:TYPE        GGUF of the types that hold the codes (Q4_0, Q4_1, Q8_0, MXFP4, NVFP4), or F32, F16, BF16
      mlx                    mlx-lm's layout, experts stacked
      sharded:SIZE           the same layout in files of at most SIZE; of a GGUF file or set, too

    A GGUF model's config.json and tokenizer are made from its keys, or taken over --like the model that it came from.
    """
    start = time.monotonic()
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        reporter.log(f"{build}: reading")
        from qconv.checkpoint.hub import resolve_build, resolve_model
        from qconv.conversion.pipeline import convert

        wanted, path = _wanted(layout), resolve_build(build)
        outcome = convert(
            path,
            out,
            wanted,
            like=None if like is None else resolve_model(like, weights=False),
            requantize=requantize,
            restart=restart,
            threads=threads,
            progress=reporter.progress,
            log=reporter.log,
        )
    report = outcome.report
    result = {
        "path": str(outcome.out),
        "already_complete": outcome.already_complete,
        "format": report["format"],
        "converted": report["converted"],
        "bits_per_weight": report["bits_per_weight"],
        "bytes": sum(file.stat().st_size for file in outcome.out.rglob("*") if file.is_file()),
        "engines": report.get("engines", []),
        **costs(start),
    }
    if as_json:
        print_json(result)
        return
    console, again = stdout(), report["converted"]["rounded_again"]
    kept = f"every weight rounded once to {layout}" if layout in _ROUNDED else "every weight the same number"
    done = "already complete; nothing to do" if outcome.already_complete else f"done, {kept}"
    say(console, f"{out}: {f'done, {len(again)} linears rounded again' if again else done}")
    say(console, f"layout       {report['converted']['from']} to {report['format']}")
    say(console, f"size         {size(result['bytes'])}, {report['bits_per_weight']:.2f} bits per weight")
    print_engines(result["engines"])
    print_costs(result)


def _wanted(layout: str) -> Wanted:
    from qconv.cli.target import parse_size
    from qconv.conversion.pipeline import Wanted, target_names

    if layout.startswith(_SHARDED):
        return Wanted(None, parse_size(layout.removeprefix(_SHARDED), "--to sharded"))
    if layout not in target_names():
        raise UsageError(f"--to: unknown layout {layout!r}.", hint=f"Known: {', '.join(target_names())}, sharded:SIZE.")
    return Wanted(layout)
