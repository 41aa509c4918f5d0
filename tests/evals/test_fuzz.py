"""The mutation sweep sees what it is there to see, and its mutants are what they say."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.fuzz import harness, mutations
from evals.fuzz.harness import Target, score
from evals.fuzz.mutations import JSON, json_value, safetensors_header
from evals.fuzz.targets import TARGETS


def traceback(folder: Path) -> None:
    raise KeyError("weights")


def killed(folder: Path) -> None:
    os.kill(os.getpid(), 11)


def hang(folder: Path) -> None:
    while True:
        time.process_time()


def eat(folder: Path) -> None:
    assert len(bytearray(b"x") * (200 << 20)) > 0


def undocumented(folder: Path) -> None:
    raise SystemExit(77)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (traceback, "KeyError"),
        (killed, "ended by SIGSEGV"),
        (hang, "ended by SIGXCPU"),
        (eat, "GiB"),
        (undocumented, "exit code 77"),
    ],
)
def test_every_kind_of_fault_is_found(
    function: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SECONDS", 1.0)
    monkeypatch.setattr(harness, "MEMORY", 150 << 20)
    sound = {"a": 1}

    def prepare(folder: Path) -> None:
        (folder / "a.json").write_text(json.dumps(sound))

    def run(folder: Path) -> None:
        content = (folder / "a.json").read_bytes()
        if content != json.dumps(sound).encode():
            function(folder)

    found = score(Target("test", prepare, "a.json", JSON, run), 2, 0, tmp_path / "kept")
    assert found.mutants == 2
    assert len(found.faults) == 2, found.faults
    assert all(said in fault for fault in found.faults)
    assert len(list((tmp_path / "kept").glob("test-?"))) == 2


def test_a_seed_does_the_same_damage() -> None:
    target, data = TARGETS[0], struct.pack("<Q", 2) + b"{}"
    assert [harness.damaged(target, data, seed) for seed in range(9)] == [
        harness.damaged(target, data, seed) for seed in range(9)
    ]


def test_values_of_json_are_exchanged() -> None:
    data = json.dumps({"a": [1, {"b": "c"}]}).encode()
    found = {json_value(random.Random(seed), data) for seed in range(60)}
    assert len(found) > 30
    assert all(json.loads(one) is not Ellipsis for one in found)


def test_a_headers_length_stays_right() -> None:
    data = struct.pack("<Q", 8) + b'{"a": 1}' + b"payload"
    for seed in range(30):
        changed = safetensors_header(random.Random(seed), data)
        (size,) = struct.unpack("<Q", changed[:8])
        json.loads(changed[8 : 8 + size])
        assert changed[8 + size :] == b"payload"


def test_every_target_has_a_name_of_its_own() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS) >= 20
    assert all(target.mutations in vars(mutations).values() for target in TARGETS)
