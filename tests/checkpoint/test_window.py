"""A window holds no more than its budget, gives every shard in any order of asking, and fetches few of them twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.checkpoint.hub_folder import steps_of
from qconv.checkpoint.window import PARTIAL, ShardWindow, least_budget
from qconv.errors import CheckpointError, UsageError

SIZE = 10
# Layers of a shard and a half, as in real checkpoints; the head lies in the first shard, as transformers 5 saves it.
STEPS = [["a"], ["a", "b"], ["b", "c"], ["d"], ["d", "e"], ["e", "f"], ["a"]]
SIZES = dict.fromkeys("abcdef", SIZE)


class Disk:
    """Brings shards of the right size, and counts what lies there at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.brought: Counter[str] = Counter()
        self.most = 0

    def __call__(self, name: str, stopped: threading.Event) -> bool:
        self.brought[name] += 1
        (self.folder / name).write_bytes(name.encode() * SIZE)
        self.most = max(self.most, sum(file.stat().st_size for file in self.folder.iterdir()))
        return True


def window(disk: Callable[[str, threading.Event], bool], folder: Path, budget: int) -> ShardWindow:
    return ShardWindow(folder, SIZES, STEPS, budget, disk, lambda _: None)


def read(one: ShardWindow, name: str) -> None:
    with one.open(name) as file:
        assert file.read() == name.encode() * SIZE


def test_the_least_budget_is_that_of_a_step_and_the_one_before() -> None:
    assert least_budget(SIZES, STEPS) == 3 * SIZE  # a, b, c
    with pytest.raises(UsageError) as raised:
        ShardWindow(Path(), dict.fromkeys("abcdef", 10**9), STEPS, 29 * 10**8, lambda *_: True, lambda _: None)
    assert "3.000 GB" in str(raised.value)
    assert raised.value.hint == "Allow at least 3000MB."


@pytest.mark.parametrize("rounds", [[1], [1, -1], [1, 1]], ids=["forward", "and back", "twice"])
def test_work_in_order_fetches_each_shard_once_a_pass(tmp_path: Path, rounds: list[int]) -> None:
    disk = Disk(tmp_path)
    with window(disk, tmp_path, 3 * SIZE) as one:
        for way in rounds:
            for step in STEPS[::way]:
                for name in step:
                    read(one, name)
        assert one.most_held == disk.most == 3 * SIZE
        one.clear()
    assert max(disk.brought[name] for name in "bcdef") <= len(rounds)
    assert disk.brought["a"] <= 2 * len(rounds)  # for the embeddings and for the head
    assert not list(tmp_path.iterdir())


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(3, 6), st.integers(1, 4))
def test_any_order_and_any_number_of_threads(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], room: int, threads: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    disk = Disk(folder)
    with window(disk, folder, room * SIZE) as one, ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda name: read(one, name), order))
    assert disk.most <= room * SIZE


def test_shards_are_fetched_ahead_of_the_work_as_far_as_they_fit(tmp_path: Path) -> None:
    came = threading.Event()
    disk = Disk(tmp_path)

    def bring(name: str, stopped: threading.Event) -> bool:
        done = disk(name, stopped)
        if name == "d":
            came.set()
        return done

    with window(bring, tmp_path, 4 * SIZE) as one:
        assert not came.wait(0.1), "who reads last layers alone needs no first ones"
        assert not disk.brought
        read(one, "a")
        assert came.wait(20)  # though nobody asked for any other
    assert set(disk.brought) == {"a", "b", "c", "d"}


def test_shards_of_a_run_before_are_used_and_others_files_stay(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b" * SIZE)
    (tmp_path / "c").write_bytes(b"c" * (SIZE - 1))  # not whole
    (tmp_path / f"e{PARTIAL}").write_bytes(b"e")
    (tmp_path / "notes").write_text("somebody's")
    disk = Disk(tmp_path)
    with window(disk, tmp_path, 4 * SIZE) as one:
        for name in "abc":
            read(one, name)
        one.clear()
    assert (disk.brought["b"], disk.brought["c"]) == (0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


def test_what_cannot_be_had_is_told_where_it_is_opened_and_tried_again(tmp_path: Path) -> None:
    disk, broken = Disk(tmp_path), {"b"}

    def bring(name: str, stopped: threading.Event) -> bool:
        if name in broken:
            raise CheckpointError("gone", hint="Wait.")
        return disk(name, stopped)

    with window(bring, tmp_path, 3 * SIZE) as one:
        read(one, "a")
        with pytest.raises(CheckpointError, match="gone"):
            one.open("b")
        broken.clear()
        read(one, "b")


def test_steps_are_embeddings_layers_and_the_rest() -> None:
    # Layers by number, not by spelling; a visual part has layers of its own numbers.
    names = ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.mlp.gate.weight" for layer in (10, 2, 0)]
    shards = dict(zip(names, "xyabcd", strict=True))
    assert steps_of(shards) == [["a"], ["d"], ["c"], ["b"], ["x", "y"]]
