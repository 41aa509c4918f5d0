"""The kernels on a real GPU: right against float64, timed against torch's bf16 matmul and the roofline.

``make gpu-check`` runs this alone, in at most ten minutes, and writes evals/results/gpu/DEVICE-DATE.json.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qconv.runtime.backends.cuda.driver import DriverLauncher, load_driver
from qconv.runtime.kernel_interface import ROW_TILES, TILE_BYTES
from tests.gpu.bench import RESULTS, Machine, Peaks, Results, device_seconds, environment, peaks
from tests.gpu.products import ROUNDING, check_codes, check_dense, check_experts, time_dense, time_experts

# torch warns of some devices and drivers; that is no error of the kernels.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ATTENTION, INNER, DOWN = (12288, 6144), (5120, 6144), (6144, 2560)
"""Outputs and inputs of Qwen3-Coder-480B's query projection, and of one expert's gate and up, and down projections."""


@pytest.fixture(scope="module")
def machine() -> Machine:
    """The first CUDA device."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    device = torch.device("cuda", 0)
    return Machine(device, DriverLauncher(device, load_driver()), device_seconds)


@pytest.fixture(scope="module")
def roofline(machine: Machine) -> Peaks:
    """Measured once."""
    return peaks(machine)


@pytest.fixture(scope="module")
def results(machine: Machine, roofline: Peaks) -> Iterator[Results]:
    """Collects, and writes the file at the end."""
    found = Results(environment(machine.device, roofline))
    yield found
    print(f"\n{found.write(RESULTS)}")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 33, 64, 200])
@pytest.mark.parametrize("shape", [(160, 512), (2560, 6144)], ids=str)
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_one_weight(
    machine: Machine, results: Results, layout: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    found = check_dense(machine, layout, shape, rows, dtype)
    results.correctness.append(found)
    assert found.relative_error < found.allowed


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tile", ROW_TILES)
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_codes(machine: Machine, results: Results, layout: str, tile: int, dtype: torch.dtype) -> None:
    found = check_codes(machine, layout, (160, 512), tile, dtype)
    results.correctness.append(found)
    assert found.relative_error == 0


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_experts(machine: Machine, results: Results, layout: str, tokens: int) -> None:
    found = check_experts(machine, layout, (160, 512), tokens, torch.bfloat16)
    results.correctness.append(found)
    assert found.relative_error < found.allowed


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_speed_of_one_weight(machine: Machine, roofline: Peaks, results: Results, layout: str, rows: int) -> None:
    cache = torch.cuda.get_device_properties(machine.device).L2_cache_size
    found = time_dense(machine, roofline, layout, ATTENTION, rows, cache)
    results.timings.append(found)
    # No kernel is faster than memory; a tenth for the roofline's own error.
    assert found.microseconds > 0.9 * found.roofline_microseconds


@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize("shape", [INNER, DOWN], ids=str)
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_speed_of_experts(
    machine: Machine, roofline: Peaks, results: Results, layout: str, shape: tuple[int, int], tokens: int
) -> None:
    cache = torch.cuda.get_device_properties(machine.device).L2_cache_size
    found = time_experts(machine, roofline, layout, shape, 160, 8, tokens, cache)
    results.timings.append(found)
    assert found.microseconds > 0.9 * found.roofline_microseconds
