"""Files of a repository come to the byte through everything that may go wrong on the way, and the token stays home."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconv.checkpoint import repository as repositories
from qconv.checkpoint.repository import Repository
from qconv.errors import CheckpointError
from tests.hub_server import TOKEN, HubServer

NAME = "model-00001-of-00001.safetensors"
SIZE = 2_000_003  # some 30 blocks of the server, and no whole number of them


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / NAME).write_bytes(random.Random(1).randbytes(SIZE))
    (folder / "config.json").write_text("{}")
    with HubServer(folder) as server:
        yield server


@pytest.fixture
def opened(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Repository.open("owner/name", endpoint=hub.url, pause=0.001)


def fetched(opened: Repository, tmp_path: Path, name: str = NAME) -> bytes:
    assert opened.fetch(name, tmp_path / "partial", tmp_path / "done", threading.Event())
    assert not (tmp_path / "partial").exists()
    return (tmp_path / "done").read_bytes()


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {"cut": 3},
        {"flip": 1},
        {"refuse": 4},
        {"cut": 1, "whole": 1},
        {"cut": 2, "elsewhere": 1},
        {"cut": 2, "flip": 2},
    ],
    ids=str,
)
def test_a_file_comes_to_the_byte(hub: HubServer, opened: Repository, tmp_path: Path, faults: dict[str, int]) -> None:
    hub.faults.update({(kind, NAME): count for kind, count in faults.items()})
    assert fetched(opened, tmp_path) == (hub.folder / NAME).read_bytes()
    assert not any(hub.faults.values())  # each struck
    assert not hub.leaked


def test_a_small_file_is_held_against_gits_name(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    assert fetched(opened, tmp_path, "config.json") == b"{}"
    (hub.folder / "config.json").write_text("[]")  # of the same size
    with pytest.raises(CheckpointError, match="checksum"):
        fetched(opened, tmp_path, "config.json")


def test_what_is_there_is_not_asked_for_again(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    data = (hub.folder / NAME).read_bytes()
    (tmp_path / "partial").write_bytes(data[:1_500_000])
    assert fetched(opened, tmp_path) == data
    assert hub.sent[NAME] == SIZE - 1_500_000


def test_a_wrong_beginning_is_found_and_replaced(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(bytes(1_500_000))
    assert fetched(opened, tmp_path) == (hub.folder / NAME).read_bytes()


def test_damage_that_does_not_pass_is_an_error(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    hub.faults["flip", NAME] = 100
    with pytest.raises(CheckpointError, match="checksum that is not the Hub's"):
        fetched(opened, tmp_path)
    assert not (tmp_path / "done").exists()


def test_a_hub_that_refuses_is_an_error_without_addresses(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    hub.faults["refuse", NAME] = repositories.ATTEMPTS
    with pytest.raises(CheckpointError, match="HTTP status 503") as raised:
        fetched(opened, tmp_path)
    said = str(raised.value) + repr(raised.value.__cause__)
    assert TOKEN not in said
    assert "http://" not in said
    assert "Signature" not in said


def test_silence_is_given_up_and_gone_on_after(
    hub: HubServer, opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repositories, "TIMEOUT_SECONDS", 0.05)
    hub.pause = 0.1  # a slow drip: every connection brings a block and is silent
    monkeypatch.setattr(repositories, "READ_BYTES", 1 << 16)
    threading.Timer(1.0, lambda: setattr(hub, "pause", 0.0)).start()
    assert fetched(opened, tmp_path) == (hub.folder / NAME).read_bytes()


def test_a_stop_leaves_what_came(hub: HubServer, opened: Repository, tmp_path: Path) -> None:
    stopped = threading.Event()
    hub.pause = 0.02
    threading.Timer(0.2, stopped.set).start()
    assert not opened.fetch(NAME, tmp_path / "partial", tmp_path / "done", stopped)
    assert not (tmp_path / "done").exists()
    hub.pause = 0.0
    assert fetched(opened, tmp_path) == (hub.folder / NAME).read_bytes()


def test_parts_of_a_file(hub: HubServer, opened: Repository) -> None:
    data = (hub.folder / NAME).read_bytes()
    where = opened.locate(NAME)
    assert opened.part(NAME, 1000, 17, where) == data[1000:1017]
    hub.faults["whole", NAME] = 1
    assert opened.part(NAME, SIZE - 5, 100) == data[-5:]
    assert not hub.leaked


def test_a_repository_that_is_not_there(hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match="owner/other: its files cannot be listed"):
        Repository.open("owner/other", endpoint=hub.url)
