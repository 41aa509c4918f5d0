"""The worker pool: order, bounds, errors, and one thread an operation."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from qconv.parallel import Workers, default_workers, single_threaded_operations


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    def slow_when_early(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0.0)
        return item * item

    with Workers(count) as workers:
        assert list(workers.map(slow_when_early, range(12))) == [number * number for number in range(12)]
        assert list(workers.map(slow_when_early, [])) == []


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_items_are_taken_than_there_are_workers_to_look_ahead(count: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with Workers(count) as workers:
        for consumed, _ in enumerate(workers.map(lambda item: item, items()), start=1):
            # The one that is consumed and one for each worker.
            assert len(taken) <= consumed + count


def test_the_first_error_is_raised_in_its_turn_and_the_rest_is_dropped() -> None:
    started: list[int] = []

    def fail(item: int) -> int:
        started.append(item)
        if item >= 2:
            raise ValueError(f"item {item}")
        return item

    with Workers(2) as workers:
        results = workers.map(fail, range(100))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="item 2"):
            next(results)
    assert len(started) < 10


def test_work_runs_beside_the_consumer() -> None:
    meeting = threading.Barrier(2, timeout=10)  # two items must be at work at the same time
    with Workers(2) as workers:
        assert len(list(workers.map(lambda _: meeting.wait(), range(2)))) == 2


def test_gradients_are_off_in_every_thread() -> None:
    assert torch.is_grad_enabled()
    with Workers(2) as workers:
        assert list(workers.map(lambda _: torch.is_grad_enabled(), range(4))) == [False] * 4


def test_operations_use_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers(2) as workers:
            assert list(workers.map(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), single_threaded_operations():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_default_is_at_least_one() -> None:
    assert default_workers() >= 1
    with Workers() as workers:
        assert workers.count == default_workers()
