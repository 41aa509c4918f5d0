"""Devices by name, and lent to threads: how many at a time, which of them, and what becomes of too little memory."""

from __future__ import annotations

import ast
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qconv.core.devices import CPU, Lending, devices_of
from qconv.core.workers import AT_ONCE
from qconv.errors import ResourceError, UsageError
from tests import accelerator
from tests.conftest import REPOSITORY


@pytest.fixture
def emu() -> None:
    accelerator.load()


@pytest.mark.usefixtures("emu")
@pytest.mark.parametrize(
    ("asked", "found"),
    [("cpu", ["cpu"]), ("emu", ["emu:0", "emu:1"]), ("emu:1", ["emu:1"]), ("emu:1,0", ["emu:1", "emu:0"])],
)
def test_devices_by_name(asked: str, found: list[str]) -> None:
    assert devices_of(asked) == tuple(map(torch.device, found))


@pytest.mark.usefixtures("emu")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("emu:2", "there is no emu:2; torch sees 2"),
        ("emu:0,0", "twice"),
        ("emu:x", "not read"),
        ("emu:-1", "no emu:-1"),
        ("emu:", "not read"),
        ("warp", "knows no device"),
        ("cpu:0", "not read"),
        ("", "knows no device"),
        ("meta", "knows no device"),
    ],
)
def test_what_is_not_there_is_told(asked: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        devices_of(asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert devices_of("auto") == (CPU,)
    for asked in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="torch sees no cuda device"):
            devices_of(asked)


def test_the_processor_is_lent_to_all_at_once() -> None:
    lending, barrier = Lending((CPU,)), threading.Barrier(3 * AT_ONCE)
    with ThreadPoolExecutor(3 * AT_ONCE) as pool:
        calls = [pool.submit(lending.call, lambda _: barrier.wait(10), "x") for _ in range(3 * AT_ONCE)]
        assert sorted(call.result() for call in calls) == list(range(3 * AT_ONCE))


def served_at_once(lending: Lending) -> int:
    """How many a lending's only device serves at most."""
    lock, now, most = threading.Lock(), [0], [0]

    def work(_: torch.device) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    with ThreadPoolExecutor(4 * AT_ONCE) as pool:
        for call in [pool.submit(lending.call, work, "x") for _ in range(8 * AT_ONCE)]:
            call.result()
    return most[0]


@pytest.mark.usefixtures("emu")
def test_a_device_serves_so_many_at_once_and_all_devices_serve() -> None:
    lending, lock = Lending(devices_of("emu")), threading.Lock()
    used: dict[torch.device, int] = dict.fromkeys(lending.devices, 0)
    most: dict[torch.device, int] = dict.fromkeys(lending.devices, 0)
    full = threading.Barrier(2 * AT_ONCE)

    def work(device: torch.device) -> None:
        with lock:
            used[device] += 1
            most[device] = max(most[device], used[device])
        full.wait(10)  # passes when both devices are full
        with lock:
            used[device] -= 1

    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(lending.call, work, "x") for _ in range(4 * AT_ONCE)]:
            call.result()
    assert most == dict.fromkeys(lending.devices, AT_ONCE)


@pytest.mark.usefixtures("emu")
def test_one_thread_uses_the_devices_in_turn_and_home_is_the_first() -> None:
    lending = Lending(devices_of("emu:1,0"))
    assert [str(lending.call(lambda device: device, "x")) for _ in range(4)] == ["emu:1", "emu:0"] * 2
    assert {lending.call(lambda device: device, "x", home=True) for _ in range(3)} == {torch.device("emu:1")}


@pytest.mark.usefixtures("emu")
def test_what_does_not_fit_beside_others_is_done_alone() -> None:
    lending = Lending(devices_of("emu:0"))
    held, refused, tries = threading.Event(), threading.Event(), []

    def first(device: torch.device) -> float:
        memory = torch.ones(6000, device=device)
        held.set()
        assert refused.wait(10)
        return float(memory.sum())

    def second(device: torch.device) -> float:
        tries.append(held.wait(10))
        try:
            return float(torch.ones(6000, device=device).sum())
        finally:
            refused.set()

    used = torch.accelerator.memory_allocated(0)
    with accelerator.capped(0, used + 40_000), ThreadPoolExecutor(2) as pool:  # 24,000 bytes fit once
        calls = [pool.submit(lending.call, function, "x") for function in (first, second)]
        assert [call.result() for call in calls] == [6000.0, 6000.0]
    assert tries == [True, True]
    assert served_at_once(lending) == AT_ONCE


@pytest.mark.usefixtures("emu")
def test_what_never_fits_is_told_and_the_device_serves_on() -> None:
    lending, tries = Lending(devices_of("emu:0"), modelled=3 * 2**20), []

    def work(device: torch.device) -> None:
        tries.append(device)
        torch.ones(10**6, device=device)

    with accelerator.capped(0, torch.accelerator.memory_allocated(0) + 2**20):
        with pytest.raises(ResourceError, match="expert 7 does not fit into the memory of emu:0") as told:
            lending.call(work, "expert 7")
        assert len(tries) == 2
        assert "plan models 3 MiB" in str(told.value)
    assert served_at_once(lending) == AT_ONCE


def test_other_errors_are_raised_as_they_are_and_the_device_serves_on() -> None:
    accelerator.load()
    lending = Lending(devices_of("emu:0"))
    for _ in range(2 * AT_ONCE):
        with pytest.raises(ZeroDivisionError):
            lending.call(lambda _: 1 // 0, "x")
    assert served_at_once(lending) == AT_ONCE


FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "randperm", "eye"}
FACTORIES |= {"linspace", "logspace", "scalar_tensor", "as_tensor"}
ON_DEVICES = (
    *("qconv/calibration", "qconv/methods", "qconv/sensitivity/layer.py", "qconv/grids/integers.py"),
    *(f"qconv/core/{name}.py" for name in ("hessian", "rounding", "qtensor", "grid")),
    "qconv/building/arithmetic.py",
)


def made_nowhere(source: str) -> list[int]:
    """Lines where a tensor is made without a word about where."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and "device" not in {keyword.arg for keyword in call.keywords}
    ]


def test_code_that_runs_on_devices_says_where_tensors_are_made() -> None:
    """What is forgotten is made on the processor, and meets a device's tensor on a GPU only."""
    assert made_nowhere("torch.zeros(3)\ntorch.zeros(3, device=x.device)\nx.new_zeros(3)\ntorch.arange(4)") == [1, 4]
    files: list[Path] = []
    for place in ON_DEVICES:
        path = REPOSITORY / place
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert len(files) > 30
    found = [f"{file.relative_to(REPOSITORY)}:{line}" for file in files for line in made_nowhere(file.read_text())]
    assert found == []
