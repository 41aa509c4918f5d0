"""``quantize --part`` and ``collect`` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke

RTN = ("--fmt", "w4a16", "--method", "rtn")


def test_two_machines_make_a_build(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = invoke("quantize", tiny, *RTN, "-o", out, "--part", "1/2")
    assert first.exit_code == 0, first.output
    assert "1 of 2: 3 units" in first.output
    assert f"qconv collect {out}" in "".join(first.output.split("\n"))
    assert invoke("collect", out).exit_code == 2
    second = json.loads(invoke("quantize", tiny, *RTN, "-o", out, "--part", "2/2", "--json").stdout)
    assert second["part"] == [2, 2]
    assert second["units"] == ["head", "layer-00002", "layer-00003"]
    collected = invoke("collect", out)
    assert collected.exit_code == 0, collected.output
    assert "bits per weight" in collected.output
    assert invoke("verify", out, "--against", tiny).exit_code == 0
    again = invoke("collect", out, "--json")
    assert json.loads(again.stdout)["already_complete"]


def test_a_gguf_of_several_files_is_collected(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    command = ("quantize", tiny, "--fmt", "gguf:Q8_0", "--max-shard-size", "0.005", "-o", tmp_path / "out")
    for part in ("2/2", "1/2"):
        assert invoke(*command, "--part", part).exit_code == 0
    values = json.loads(invoke("collect", tmp_path / "out", "--json").stdout)
    assert values["bits_per_weight"] > 8
    assert invoke("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", "1/1000000"])
def test_a_part_is_one_of_so_many(part: str, invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny, *RTN, "-o", tmp_path / "out", "--part", part)
    assert result.exit_code == 2
    assert "is not K/N" in result.output


@pytest.mark.parametrize("more", [("--fmt", "fp8"), ("--target-bits", "4.5")])
def test_a_part_is_of_one_build(more: tuple[str, ...], invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny, "--fmt", "w4a16", *more, "-o", tmp_path / "out", "--part", "1/2")
    assert result.exit_code == 2
    assert "--part: makes a share of one build" in result.output


def test_a_calibrated_build_has_no_parts(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny, "--fmt", "w4a16", "-o", tmp_path / "out", "--part", "1/2")
    assert result.exit_code == 2
    assert "--method rtn" in result.output
