"""``qconv verify``: good and bad builds, tables and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qconv.cli.verify import by_kind
from tests.cli.conftest import Invoke


def test_a_good_build(invoke: Invoke, build: Path, tiny: Path) -> None:
    alone = invoke("verify", build)
    assert alone.exit_code == 0
    assert alone.stdout.splitlines()[-1] == f"{build}: good"
    against = invoke("verify", build, "--against", tiny)
    assert against.exit_code == 0
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert kind in against.stdout


def test_json_has_every_linear(invoke: Invoke, build: Path, tiny: Path) -> None:
    result = invoke("verify", build, "--against", tiny, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    values = json.loads(result.stdout)
    assert values["good"] is True
    assert values["problems"] == []
    # 4 layers of 4 attention linears and 16 experts of 3.
    assert len(values["snr_db"]) == 4 * (4 + 16 * 3)
    assert sum(row["count"] for row in values["kinds"]) == len(values["snr_db"])
    assert min(row["least"] for row in values["kinds"]) == min(values["snr_db"].values())


def test_a_flipped_bit_exits_with_5(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(build, bad)
    shard = sorted(bad.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    result = invoke("verify", bad)
    assert result.exit_code == 5
    assert f"BAD  {shard.name}" in result.stdout
    values = json.loads(invoke("verify", bad, "--json").stdout)
    assert values["good"] is False
    assert [shard.name in problem for problem in values["problems"]] == [True]


def test_a_damaged_source_is_not_blamed_on_the_build(invoke: Invoke, build: Path, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    next(source.glob("model-00003*")).unlink()
    result = invoke("verify", build, "--against", source)
    assert result.exit_code == 5
    assert "error: " in result.stderr
    assert "1 of 5 shards missing" in result.stderr
    assert "BAD" not in result.stdout


def test_a_folder_that_is_no_build(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    sound = invoke("verify", tiny)
    assert sound.exit_code == 2
    assert "an unquantized checkpoint, no build" in sound.stdout
    assert sound.stdout.splitlines()[-1] == f"{tiny}: not checked"
    assert json.loads(invoke("verify", tiny, "--json").stdout)["good"] is False
    assert invoke("verify", tmp_path).exit_code == 5


def test_kinds_have_the_least_and_the_mean() -> None:
    rows = by_kind({"l.0.q": 20.0, "l.1.q": 10.0, "l.0.e.7.up": float("inf"), "head": 1.0})
    assert [(row["kind"], row["count"], row["least"], row["mean"], row["worst"]) for row in rows] == [
        ("l.*.q", 2, 10.0, 15.0, "l.1.q"),
        ("l.*.e.*.up", 1, float("inf"), float("inf"), "l.0.e.7.up"),
        ("head", 1, 1.0, 1.0, "head"),
    ]
