"""Which names are taken for those of a repository on the Hub."""

from __future__ import annotations

import pytest

from qconv.checkpoint.hub import is_hub_id


@pytest.mark.parametrize("name", ["./absent", "../x", "a/..", "a/b.", "-a/b", "a--b/c"])
def test_what_the_hub_takes_for_no_id_is_none(name: str) -> None:
    assert not is_hub_id(name)


@pytest.mark.parametrize("name", ["a/b", "Qwen/Qwen3-Coder-480B-A35B", "a/b.c@refs/pr/1"])
def test_what_the_hub_takes_for_an_id_is_one(name: str) -> None:
    assert is_hub_id(name)
