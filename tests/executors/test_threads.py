"""The worker pool: order, bounds, errors, and one thread an operation."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from qconv.executors.threads import Allowance, Threads, default_workers, single_threaded_operations


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    def slow_when_early(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0.0)
        return item * item

    with Threads(count) as workers:
        assert list(workers.map(slow_when_early, range(12))) == [number * number for number in range(12)]
        assert list(workers.map(slow_when_early, [])) == []


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_items_are_taken_than_there_are_workers_to_look_ahead(count: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with Threads(count) as workers:
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

    with Threads(2) as workers:
        results = workers.map(fail, range(100))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="item 2"):
            next(results)
    assert len(started) < 10


def test_sized_items_stay_within_the_allowance_over_all_maps() -> None:
    lock, used, seen = threading.Lock(), [0], [0]

    def taken(sizes: list[int]) -> Iterator[int]:
        for size in sizes:
            with lock:
                used[0] += size
                seen.append(used[0])
            yield size

    def consume(sizes: list[int]) -> None:
        for size in workers.map(lambda item: item, taken(sizes), sizes):
            time.sleep(0.001)
            with lock:  # given back when the next one is asked for, so a little later than here
                used[0] -= size

    with Threads(3, allowance=10) as workers:
        threads = [threading.Thread(target=consume, args=([3, 4, 2, 10, 1, 5, 0, 4] * 5,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert max(seen) == 10
    assert used == [0]
    assert len(seen) == 81


def test_what_is_larger_than_the_allowance_is_worked_on_alone() -> None:
    together, most = [0], [0]

    def work(size: int) -> int:
        together[0] += size
        most[0] = max(most[0], together[0])
        time.sleep(0.002)
        together[0] -= size
        return size

    with Threads(2, allowance=10) as workers:
        sizes = [25, 4, 5, 30, 1]
        assert list(workers.map(work, sizes, sizes)) == sizes
    assert most == [30]


def test_the_allowance_is_whole_again_after_an_error_and_after_a_map_left_early() -> None:
    def fail(item: int) -> int:
        raise ValueError(item)

    with Threads(2, allowance=3) as workers:
        with pytest.raises(ValueError, match="1"):
            list(workers.map(fail, [1, 2, 3], [1, 1, 1]))
        results = workers.map(abs, [1, 1, 1], [1, 1, 1])
        next(results)
        results.close()
        list(workers.map(abs, [], [2]))  # sizes of items that never came
        done = threading.Event()

        def whole() -> None:
            assert list(workers.map(abs, [3], [3])) == [3]
            done.set()

        threading.Thread(target=whole, daemon=True).start()
        assert done.wait(10)
    assert workers._allowance.take(3, wait=False)


def test_who_waits_comes_before_who_holds_something() -> None:
    allowance, order = Allowance(2), []
    assert allowance.take(2, wait=True)

    def wait() -> None:
        allowance.take(1, wait=True)
        order.append("waited")

    thread = threading.Thread(target=wait)
    thread.start()
    while not allowance._waiting:
        time.sleep(0.001)
    with allowance._changed:
        allowance._used = 1  # room for one, which belongs to the one that waits
        assert not allowance._fits(2)
    assert not allowance.take(1, wait=False)
    allowance.give_back(0)
    thread.join(10)
    assert order == ["waited"]


def test_work_runs_beside_the_consumer() -> None:
    meeting = threading.Barrier(2, timeout=10)  # two items must be at work at the same time
    with Threads(2) as workers:
        assert len(list(workers.map(lambda _: meeting.wait(), range(2)))) == 2


def test_gradients_are_off_in_every_thread() -> None:
    assert torch.is_grad_enabled()
    with Threads(2) as workers:
        assert list(workers.map(lambda _: torch.is_grad_enabled(), range(4))) == [False] * 4


def test_operations_use_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Threads(2) as workers:
            assert list(workers.map(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), single_threaded_operations():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_default_is_at_least_one() -> None:
    assert default_workers() >= 1
    with Threads() as workers:
        assert workers.count == default_workers()
