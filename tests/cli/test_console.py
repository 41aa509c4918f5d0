"""Tables and numbers on terminals of any width."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence

import click
import pytest
from rich.console import Console

from qconv.cli.console import (
    ReaderGone,
    bits,
    duration,
    print_error,
    print_json,
    print_table,
    say,
    shape,
    short_names,
    size,
    stdout,
)
from qconv.cli.progress import TimeLeft, reporting
from qconv.errors import QconvError

HEADER = ("modules", "count", "size")
ROWS = [("model.layers.*.mlp.experts.*.gate_proj", "9,920", "81.06 GB"), ("lm_head", "1", "1.87 GB")]


def printed(width: int, rows: Sequence[Sequence[str]] = ROWS) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(console, HEADER, rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_table_that_fits_has_a_line_a_row() -> None:
    lines = printed(80)
    assert len(lines) == 2 + len(ROWS)
    # Numbers are right-aligned, so the units stand below each other.
    assert lines[2].rstrip().index("GB") == lines[3].rstrip().index("GB")


@pytest.mark.parametrize("width", [20, 40, 50])
def test_a_table_that_does_not_fit_becomes_blocks_and_loses_nothing(width: int) -> None:
    lines = printed(width)
    assert lines == [
        "model.layers.*.mlp.experts.*.gate_proj",
        "  count: 9,920",
        "  size: 81.06 GB",
        "lm_head",
        "  count: 1",
        "  size: 1.87 GB",
    ]


def test_brackets_are_no_markup() -> None:
    assert "[bold]x[/bold]" in printed(80, [("[bold]x[/bold]", "1", "1 B")])[2]


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"snr": [math.inf, -math.inf, math.nan, 1.5], "shape": (2, 3), "name": "ü"})
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert values == {"snr": [None, None, None, 1.5], "shape": [2, 3], "name": "ü"}


def test_json_for_a_reader_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(ReaderGone):
        print_json({})


def test_how_numbers_read() -> None:
    assert [size(n) for n in (0, 999, 1000, 960_309_823_488)] == ["0 B", "999 B", "1.00 kB", "960.31 GB"]
    assert [duration(s) for s in (0, 59.6, 3599, 90_061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]
    assert [shape(d) for d in ((), (7,), (6144, 2560))] == ["scalar", "7", "6144x2560"]
    assert [bits(b) for b in (None, 4.15625)] == ["", "4.16"]


def test_names_lose_what_all_layers_share_only() -> None:
    assert short_names(["model.norm", "model.layers.*.mlp.gate"]) == ["model.norm", "mlp.gate"]
    towers = ["visual.blocks.*.qkv", "model.layers.*.qkv"]
    assert short_names(towers) == towers


def test_time_left_follows_the_pace() -> None:
    left = TimeLeft()
    left.update(0.0, 0, 10)
    assert left.seconds(0.0) is None
    left.update(60.0, 1, 10)
    left.update(120.0, 2, 10)
    assert left.seconds(120.0) == pytest.approx(8 * 60)
    # Within a step it counts down.
    assert left.seconds(150.0) == pytest.approx(8 * 60 - 30)
    assert left.seconds(1000.0) == 0.0


def test_time_left_ignores_what_an_earlier_run_did() -> None:
    left = TimeLeft()
    for done in range(50):
        left.update(done * 1e-5, done, 100)
    left.update(100.0, 50, 100)
    assert left.seconds(100.0) == pytest.approx(50 * 100, rel=0.01)


def test_time_left_starts_anew_with_other_work() -> None:
    left = TimeLeft()
    left.update(0.0, 0, 10)
    left.update(60.0, 5, 10)
    left.update(60.0, 0, 3)
    assert left.seconds(60.0) is None


def test_time_left_forgets_a_pace_that_is_over() -> None:
    left = TimeLeft()
    # A minute a step at first, then ten seconds: after eight steps of those the first ones count no more.
    times = [60.0 * step for step in range(5)] + [240.0 + 10.0 * step for step in range(1, 13)]
    for done, now in enumerate(times):
        left.update(now, done, 100)
    assert left.seconds(times[-1]) == pytest.approx(10.0 * (100 - len(times) + 1))


HOSTILE = "a\x1b[2J\x07\u202eb"


def test_nothing_printed_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(stdout(), HOSTILE)
    print_table(stdout(), ("name",), [(HOSTILE,)])
    print_table(stdout(), ("name", "more"), [(HOSTILE, "x" * 300)])  # too wide: as blocks
    print_error(QconvError(HOSTILE, hint=HOSTILE), as_json=False)
    print_error(QconvError(HOSTILE, hint=HOSTILE), as_json=True)
    shown = "".join(capsys.readouterr())
    assert not set("\x1b\x07\u202e") & set(shown)
    assert shown.count("a\\x1b[2J\\x07\\u202eb") == 5


def test_progress_shows_names_that_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("test")), reporting(quiet=False) as reporter:
        reporter.progress(HOSTILE, 1, 2)
        reporter.log(HOSTILE)
    assert capsys.readouterr().err.count("a\\x1b[2J\\x07\\u202eb") == 2
