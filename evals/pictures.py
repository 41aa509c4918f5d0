"""The pictures of README and documentation: ``python -m evals.pictures [--report PAGE]``.

``docs/images/builds.svg`` is drawn from ``evals/results``: files of qconv's beside other tools', all measured on the
same text. With ``--report`` the first screen of a report, such as ``make demo`` makes, is photographed by Chromium into
``docs/images/report.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
MODEL = "tiny-coder-moe"
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 36, 52
_SIZES, _KLD = (5.0, 10.6), (1.5e-4, 6e-2)
"""Ends of the axes: megabytes, and nats a token by their logarithm."""
_SCREEN = 1280, 965
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #3b434b } .title { font-weight: 600; fill: #1d2125 }
.ground { fill: #fff } .grid { stroke: #dfe2e6 } .axis { stroke: #626a73 }
.qconv { fill: #17703a; stroke: #17703a } .other { fill: #fff; stroke: #626a73; stroke-width: 2 }
line.whisker, polyline { fill: none; stroke-width: 1.5 } .named { fill: #17703a }
@media (prefers-color-scheme: dark) {
  text { fill: #b4bcc5 } .title { fill: #e6e8ea } .ground { fill: #1c2024 } .grid { stroke: #343a41 }
  .axis { stroke: #9aa3ad }
  .qconv { fill: #6fce93; stroke: #6fce93 } .other { fill: #1c2024; stroke: #9aa3ad } .named { fill: #6fce93 }
}
"""


@dataclass(frozen=True, slots=True)
class Series:
    """Files of one kind.

    Attributes:
        name: Beside one of them.
        ours: Whether qconv made the choice that the chart is about.
        files: Megabytes, KL divergence in nats a token and its standard error.
        named: Which file bears the name.
        beside: Where the name goes from there: units right and down, and where it is anchored.
    """

    name: str
    ours: bool
    files: tuple[tuple[float, float, float], ...]
    named: int = 0
    beside: tuple[float, float, str] = (10.0, 4.0, "start")


def series(sizes: Mapping[str, Any], peers: Mapping[str, Any]) -> list[Series]:
    """What is shown, from the results of ``evals.target_sizes`` and ``evals.peers.quality``.

    Raises:
        ValueError: the two were not measured on the same text.
    """
    model = sizes[MODEL]
    if any(model[key] != peers[key] for key in ("documents", "tokens", "source_perplexity")):
        raise ValueError("target-sizes and peers-quality were measured on different text")

    def whole(name: str) -> tuple[tuple[float, float, float], ...]:
        found = ((one["builds"], name) for one in model["sizes"].values())
        builds = [next(build for build in builds if build["build"] == name) for builds, name in found]
        return tuple((build["size"] / 1e6, build["kl"], build["standard_error"]) for build in builds)

    def peer(name: str) -> tuple[tuple[float, float, float], ...]:
        build = next(build for build in peers["builds"] if build["build"] == name)
        return ((build["size"] / 1e6, build["kl"], build["kl_standard_error"]),)

    return [
        Series("llama.cpp's mixtures of types, with an imatrix", False, whole("imatrix"), 1, (12.0, -6.0, "start")),
        Series("the same types, calibrated by qconv", True, whole("mixture"), 1, (-10.0, 18.0, "end")),
        Series("qconv --target-size", True, whole("chosen"), 1, (-6.0, 20.0, "end")),
        Series("llm-compressor, 4 bits", False, peer("llm-compressor"), 0, (-10.0, 0.0, "end")),
        Series("GPTQModel", False, peer("GPTQModel"), 0, (10.0, -4.0, "start")),
        Series("qconv --method gptq", True, peer("qconv gptq"), 0, (-2.0, 22.0, "middle")),
    ]


def builds_svg(shown: Sequence[Series], documents: int, tokens: int) -> str:
    """The chart: megabytes across, divergence up by its logarithm, with 95 % intervals."""
    parts = [f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}"/>']
    parts.append(_text(12, 20, "KL divergence from bf16, nats a token: lower is nearer", "start", "title"))
    for power in range(-4, 0):
        for step in (1, 2, 5):
            value = step * 10.0**power
            if _KLD[0] <= value <= _KLD[1]:
                parts.append(_line("grid", _LEFT, _up(value), _WIDTH - _RIGHT, _up(value)))
                parts.append(_text(_LEFT - 8, _up(value) + 4, f"{value:.10f}".rstrip("0"), "end"))
    for size in map(float, range(math.ceil(_SIZES[0]), math.floor(_SIZES[1]) + 1)):
        parts.append(_text(_across(size), _HEIGHT - _BOTTOM + 18, f"{size:.0f}", "middle"))
    parts.append(_line("axis", _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM))
    said = f"size of the files in MB; {MODEL}, {documents} files of held-out Python, {tokens:,} tokens; 95 % intervals"
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 10, said, "end"))
    for one in shown:
        style = "qconv" if one.ours else "other"
        if len(one.files) > 1:
            places = " ".join(f"{_across(size):.1f},{_up(kld):.1f}" for size, kld, _ in one.files)
            parts.append(f'<polyline class="{style}" style="fill: none" points="{places}"/>')
        for size, kld, error in one.files:
            x, y = _across(size), _up(kld)
            parts.append(_line(f"whisker {style}", x, _up(kld - 1.96 * error), x, _up(kld + 1.96 * error)))
            told = escape(f"{one.name}: {kld:.5f} nats a token, {size:.2f} MB")
            parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{told}</title></circle>')
        size, kld, _ = one.files[one.named]
        right, down, anchor = one.beside
        parts.append(_text(_across(size) + right, _up(kld) + down, one.name, anchor, "named" if one.ours else ""))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    label = "KL divergence against file size: qconv's files beside those of other tools"
    body = "\n".join(parts)
    return f'{head} aria-label="{label}">\n<style>{_STYLE}</style>\n{body}\n</svg>\n'


def drawn() -> str:
    """The chart of the results that are kept."""
    sizes, peers = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("target-sizes", "peers-quality"))
    return builds_svg(series(sizes, peers), peers["documents"], peers["tokens"])


def photographed(page: Path, picture: Path) -> None:
    """The first screen of a page as a PNG.

    Raises:
        RuntimeError: there is no Chromium, or it fails.
    """
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise RuntimeError("no Chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--screenshot={picture}",
        ]
        size = ",".join(map(str, _SCREEN))
        command += [f"--window-size={size}", f"--user-data-dir={profile}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not picture.exists():
        raise RuntimeError(f"{browser} failed: {done.stderr.strip()[-500:]}")


def _across(size: float) -> float:
    return _LEFT + (size - _SIZES[0]) / (_SIZES[1] - _SIZES[0]) * (_WIDTH - _LEFT - _RIGHT)


def _up(kld: float) -> float:
    low, high = map(math.log, _KLD)
    return _HEIGHT - _BOTTOM - (math.log(kld) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _line(style: str, x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line class="{style}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report, to be photographed")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "builds.svg").write_text(drawn(), encoding="utf-8")
    if options.report is not None:
        photographed(options.report, IMAGES / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
