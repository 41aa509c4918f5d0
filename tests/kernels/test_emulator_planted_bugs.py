"""Each bug planted in the kernels is caught, by the checker or the comparison that is meant to catch it.

Every bug runs where it can show: a barrier that is missing before shared memory is reused shows only where the number
of tiles is no multiple of the stages. The same run without the bug passes, so what is caught is the bug.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.emulator import KERNELS, SCHEDULES, Schedule
from tests.kernels.helpers import run_gather, run_sum
from tests.kernels.products import CASES, Result, activations, case, depth_of, route, run_dense, run_experts

pytestmark = pytest.mark.kernels

LAYOUTS = tuple(CASES)
GROUPED = ("awq", "int4")
NIBBLES = ("awq", "int4", "q4_k", "q6_k")

NUMBERS = "numbers"
CONFLICTS = "bank conflicts"
RACE = "shared race|uninitialised"
IN_FLIGHT = "in flight"
BARRIER = "synccheck"
READ_BOUNDS = "global read out of bounds"
WRITE_BOUNDS = "global write out of bounds"
GLOBAL_RACE = "global race"
UNINITIALISED = "uninitialised"


@dataclass(frozen=True, slots=True)
class Planted:
    """A bug, what catches it, in which layouts it can be, and the run in which it shows."""

    bug: str
    caught_by: str
    layouts: tuple[str, ...] = LAYOUTS
    run: str = "dense"


RAGGED_DEPTH = tuple(layout for layout in LAYOUTS if depth_of(layout) == 32)
PLANTED = (
    Planted("NO_BARRIER_IN_LOOP", RACE),
    Planted("NO_BARRIER_BEFORE_EXCHANGE", RACE, run="exchange"),
    Planted("EARLY_COPY", RACE),
    Planted("SHORT_WAIT", IN_FLIGHT),
    Planted("DIVERGENT_BARRIER", BARRIER, run="exchange"),
    Planted("ACTIVATIONS_UNSWIZZLED", CONFLICTS),
    Planted("WEIGHTS_UNSWIZZLED", CONFLICTS),
    Planted("ROWS_OVERRUN", READ_BOUNDS),
    Planted("WEIGHTS_OVERRUN", READ_BOUNDS, run="ragged"),
    Planted("DEPTH_OVERRUN", READ_BOUNDS, RAGGED_DEPTH, run="ragged"),
    Planted("COLUMNS_OVERRUN", f"{WRITE_BOUNDS}|{GLOBAL_RACE}", run="ragged"),
    Planted("PARAMETERS_HALF_COPIED", UNINITIALISED, run="ragged"),
    Planted("PADDING_WRITTEN", f"{WRITE_BOUNDS}|{GLOBAL_RACE}", run="experts"),
    Planted("WRONG_EXPERT", NUMBERS, run="experts"),
    Planted("SLICES_COLLIDE", GLOBAL_RACE, run="slices"),
    Planted("SLICES_OVERLAP", NUMBERS, run="slices"),
    Planted("STALE_SCALES", NUMBERS),
    Planted("STALE_FACTORS", NUMBERS, ("q4_k", "q6_k")),
    Planted("RING_UNWRAPPED", "shared access out of bounds"),
    Planted("COPIES_LEFT", "thread ends with copies in flight"),
    Planted("SLAB_TWICE", NUMBERS),
    Planted("WRONG_LANE", NUMBERS),
    Planted("WRONG_NIBBLE", NUMBERS, NIBBLES),
    Planted("ROTATION_LOST", NUMBERS, NIBBLES, run="bfloat16"),
    Planted("ZERO_POINTS_SWAPPED", NUMBERS, GROUPED),
    Planted("ZERO_OFFSET_LOST", NUMBERS, GROUPED, run="zero offset"),
    Planted("SIGN_LOST", NUMBERS, ("fp8", "q8_0")),
    Planted("NO_MINIMUM", NUMBERS, ("q4_k",)),
    Planted("HIGH_BITS_LOST", NUMBERS, ("q6_k",)),
    Planted("RUNS_SWAPPED", NUMBERS, ("q6_k",)),
    Planted("FIRST_SLICE_LOST", NUMBERS, ("helpers",), run="sum"),
    Planted("ELEMENTS_OVERRUN", f"{READ_BOUNDS}|{WRITE_BOUNDS}", ("helpers",), run="sum"),
    Planted("WRONG_EXPERT", NUMBERS, ("helpers",), run="gather"),
    Planted("PADDING_WRITTEN", f"{READ_BOUNDS}|{WRITE_BOUNDS}", ("helpers",), run="gather"),
)


def run(planted: Planted, layout: str, schedule: Schedule, bug: str) -> Result:
    """The run in which a bug shows, with or without it."""
    if planted.run == "sum":
        return run_sum(3, 1000, torch.float16, schedule=schedule, bug=bug)
    if planted.run == "gather":
        return run_gather(torch.tensor([2, 0, 2, 1, 2]), 96, schedule=schedule, bug=bug)
    if planted.run == "experts":
        routing = route(torch.tensor([2, 0, 2, 1, 2]), 8, 0)
        tokens = activations(5, 256, torch.float16)
        return run_experts(case(layout, 128, 256, 64, 3), tokens, routing, 8, 1, schedule=schedule, bug=bug)
    if planted.run == "ragged":
        depth = 160 if depth_of(layout) == 32 else 256
        return run_dense(
            case(layout, 160, depth, 32), activations(9, depth, torch.float16), 8, schedule=schedule, bug=bug
        )
    if planted.run == "zero offset":
        weight = case(layout, 128, 320, 64, zero_offset=1)
        return run_dense(weight, activations(7, 320, torch.float16), 8, schedule=schedule, bug=bug)
    # Five tiles, or in slices of them: the last tile lies where sums are exchanged.
    depth, slices = (320, 1) if depth_of(layout) == 32 else (1280, 4)
    slices = 2 if planted.run == "slices" else slices
    tokens = activations(7, depth, torch.bfloat16 if planted.run == "bfloat16" else torch.float16)
    traffic = planted.caught_by == CONFLICTS
    row_tile = 16 if planted.run == "exchange" else 8  # where warps share a tile's inputs
    weight = case(layout, 128, depth, 64)
    return run_dense(weight, tokens, row_tile, slices, schedule=schedule, traffic=traffic, bug=bug)


def is_caught(planted: Planted, result: Result) -> bool:
    """Whether what should catch the bug has."""
    if planted.caught_by == NUMBERS:
        return not result.relative_error < 1e-2
    if planted.caught_by == CONFLICTS:
        return bool(result.report.conflicts())
    return any(re.search(planted.caught_by, error) for error in result.report.errors)


CASE_LIST = [(planted, layout) for planted in PLANTED for layout in planted.layouts]


@pytest.mark.parametrize(("planted", "layout"), CASE_LIST, ids=[f"{p.bug}-{layout}" for p, layout in CASE_LIST])
def test_planted_bug(planted: Planted, layout: str) -> None:
    """Caught under every schedule but those that happen to hide a race from the numbers; never seen without the bug."""
    clean = run(planted, layout, SCHEDULES[0], "")
    assert clean.report.errors == ()
    assert not is_caught(planted, clean)
    caught = [is_caught(planted, run(planted, layout, schedule, planted.bug)) for schedule in SCHEDULES]
    assert all(caught) if planted.caught_by in (NUMBERS, CONFLICTS, READ_BOUNDS, BARRIER) else any(caught)


def test_every_bug_is_tested() -> None:
    """What the sources can plant, and nothing else, is in the list above."""
    declared = set(re.findall(r"X\((\w+)\)", (KERNELS / "emulator/planted.h").read_text())) - {"X"}
    used = set()
    for source in KERNELS.glob("cuda/*.cu*"):
        used |= set(re.findall(r"QC_PLANTED\((\w+)\)", source.read_text())) - {"bug"}
    assert declared == used == {planted.bug for planted in PLANTED}


def test_misaligned_pointer() -> None:
    """Sixteen-byte copies from an address that is no multiple of sixteen."""
    tokens = activations(8, 128, torch.float16).flatten()
    shifted = tokens[4 : 4 + 7 * 128].view(7, 128)
    result = run_dense(case("int4", 128, 128), shifted, 8)
    assert any("misaligned global access" in error for error in result.report.errors)
