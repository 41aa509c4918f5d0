"""The table in kernels/README.md, from kernels/budgets.yaml.

``python -m kernels.proof.table`` prints it; with ``--write`` it takes the place of the one in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kernels.proof.budgets import ARCHITECTURES, Budget, Build, read
from kernels.proof.chips import A100, B200, CHIPS, H100, L40S

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- from budgets.yaml -->", "<!-- end -->"


def table(budgets: dict[str, Budget]) -> str:
    """Markdown: a row a product with float16 activations, then the helpers.

    Where the model's share is another with bfloat16 activations, both are given.
    """
    targets = " / ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    chips = (A100, L40S, H100, B200)
    lines = [
        f"| kernel | registers on {targets} | occupancy, % | moved / compulsory | "
        + " | ".join(chip.name for chip in chips)
        + " |",
        "| --- | --- | --- | --- |" + " ---: |" * len(chips),
    ]
    for name, budget in budgets.items():
        if name.startswith("qconv_") and name.endswith("_bf16"):
            continue
        builds = [budget.builds[architecture] for architecture in ARCHITECTURES]
        registers = " / ".join(str(build.registers) for build in builds)
        pairs = zip(ARCHITECTURES, builds, strict=True)
        occupancy = " / ".join(f"{100 * build.warps / CHIPS[architecture].warps:.0f}" for architecture, build in pairs)
        moved = "" if budget.ratio is None else f"{budget.ratio:.2f}"
        other = budgets.get(name.removesuffix("_f16") + "_bf16", budget)
        cells = ["; ".join(dict.fromkeys(_share(each.builds[chip.arch]) for each in (budget, other))) for chip in chips]
        short = name.removeprefix("qconv_").removesuffix("_f16")
        lines.append(f"| `{short}` | {registers} | {occupancy} | {moved} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(build: Build) -> str:
    return "" if build.dram is None else f"{100 * build.dram:.0f} % {build.bound}"


def replaced(document: str, new: str) -> str:
    """The document with the table between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    head, tail = document.index(BEGIN) + len(BEGIN), document.index(END)
    return f"{document[:head]}\n{new}\n{document[tail:]}"


def main(arguments: list[str]) -> int:
    """Print or write the table."""
    new = table(read())
    if arguments == ["--write"]:
        README.write_text(replaced(README.read_text(), new))
    else:
        print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
