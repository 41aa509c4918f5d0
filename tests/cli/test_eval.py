"""``qconv eval``: commands, their output and exit codes, on the bundled model and few tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Invoke

KLD = {"classes": [{"name": "any", "bits": [1, 40], "reference": {"kld.mean": 1e-9}}], "least_units": 2}
"""What no quantized build keeps."""


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten documents of 64 tokens."""
    task = {"kind": "text", "name": "text", "context": 64, "stride": 32, "tokens": 630, "document_tokens": 64}
    path = tmp_path_factory.mktemp("suite") / "few.yaml"
    path.write_text(yaml.safe_dump({"noise": None, "tasks": [task]}))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_reference_then_run_then_gate_and_compare(
    invoke: Invoke, tiny: Path, build: Path, suite: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--suite", suite, "--cache", cache)
    kept = json.loads(invoke("eval", "reference", tiny, *options, "--json").stdout)
    assert kept["tasks"][0]["tokens"] >= 630

    out = tmp_path / "run"
    result = invoke("eval", "run", build, "--reference", tiny, *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert "no regression" in result.stdout
    assert "kld.mean" in result.stdout
    assert "detectable" in result.stdout
    run = json.loads((out / "run.json").read_text())
    assert run["build"]["format"] == "w4a16"
    assert run["tasks"][0]["metrics"]["kld.mean"]["value"] > 1e-4

    assert invoke("eval", "gate", out).exit_code == 0
    strict = tmp_path / "strict.yaml"
    strict.write_text(yaml.safe_dump(KLD))
    judged = invoke("eval", "gate", out, "--gates", strict, "--json")
    assert judged.exit_code == 3
    assert json.loads(judged.stdout)["verdict"]["outcome"] == "regression"
    before = (out / "run.json").read_bytes()
    again = invoke("eval", "run", build, "--reference", tiny, *options, "-o", out)
    assert (again.exit_code, again.stdout) == (0, result.stdout), "a finished run is shown"
    assert "nothing is measured again" in again.stderr
    assert invoke("eval", "run", tiny, "--reference", tiny, *options, "-o", out).exit_code == 1, "another's is not"
    assert invoke("eval", "run", build, "--reference", tiny, *options, "--no-gate", "-o", out).exit_code == 1
    assert (out / "run.json").read_bytes() == before
    left_out = {"name": "humaneval", "kind": "humaneval", "reason": "no sandbox", "remedy": "Install one."}
    (out / "run.json").write_text(json.dumps(json.loads(before) | {"unmeasured": [left_out]}))
    monkeypatch.setattr("qconv.evaluation.standing.find_backend", lambda: None)
    assert invoke("eval", "run", build, "--reference", tiny, *options, "-o", out).exit_code == 1, "it is there now"
    (out / "run.json").write_bytes(before)

    compared = json.loads(invoke("eval", "compare", tiny, out, "--reference", tiny, *options, "--json").stdout)
    assert {one["metric"]: one["verdict"] for one in compared["differences"]}["kld.mean"] == "worse"


def test_a_regression_exits_with_3_and_no_gate_with_0(
    invoke: Invoke, tiny: Path, build: Path, suite: Path, cache: Path, tmp_path: Path
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(yaml.safe_dump(KLD))
    options = ("eval", "run", build, "--reference", tiny, "--suite", suite, "--cache", cache, "--gates", strict)
    failed = invoke(*options, "-o", tmp_path / "gated", "--json")
    assert failed.exit_code == 3
    values = json.loads(failed.stdout)
    assert values["verdict"]["outcome"] == "regression"
    assert [gate["reruns"] for gate in values["gates"] if gate["status"] == "fail"] == [1]
    blamed = invoke("eval", "blame", tmp_path / "gated", "--tokens", 64, "--layers", 1)
    assert blamed.exit_code == 0, blamed.output
    kept = json.loads((tmp_path / "gated" / "blame.json").read_text())
    dearest, layer = kept["parts"][0], kept["layers"][0]
    assert f"dearest: {dearest['part']}, {dearest['kld']:.3g} +- " in blamed.stdout
    assert f"its layer costs {layer['kld']:.3g}, and {dearest['layer_without']:.3g} without it" in blamed.stdout
    beside = ("eval", "blame", tmp_path / "gated", "--tokens", 64, "--layers", 1, "--baseline", tmp_path / "gated")
    values = json.loads(invoke(*beside, "--json").stdout)
    assert {one["kld"] for one in (*values["layers"], *values["parts"])} == {0.0}, "a build costs no more than itself"
    assert invoke(*options, "-o", tmp_path / "measured", "--no-gate").exit_code == 0


def test_gates_without_a_reference_are_a_usage_error(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    result = invoke("eval", "run", build, "-o", tmp_path / "run", "--json")
    assert result.exit_code == 2
    assert "--no-gate" in json.loads(result.stdout)["error"]["hint"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("run", "BUILD", "--reference", "TINY", "--engine", "warp"), 2, "warp"),
        (("run", "BUILD", "--reference", "TINY", "--suite", "absent"), 2, "absent"),
        (("run", "BUILD", "--reference", "TINY", "--device", "warp"), 2, "warp"),
        (("run", "absent", "--no-gate"), 2, "absent"),
    ],
)
def test_wrong_requests_are_explained(
    arguments: tuple[str, ...], code: int, word: str, invoke: Invoke, tiny: Path, build: Path, tmp_path: Path
) -> None:
    named = {"BUILD": build, "TINY": tiny}
    result = invoke("eval", *(named.get(one, one) for one in arguments), "-o", tmp_path / "run")
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert word in result.stderr


def test_a_run_that_is_none_is_an_artifact_error(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert invoke("eval", "gate", tmp_path).exit_code == 5


def test_templates_names_what_differs_and_exits_with_5(invoke: Invoke, build: Path, tiny: Path, tmp_path: Path) -> None:
    good = invoke("eval", "templates", build, "--reference", tiny)
    assert good.exit_code == 0
    assert good.stdout.splitlines()[-1] == f"{build}: good"
    bad = tmp_path / "bad"
    shutil.copytree(build, bad)
    (bad / "generation_config.json").unlink()
    told = invoke("eval", "templates", bad, "--reference", tiny)
    assert told.exit_code == 5
    assert "BAD  generation_config.json is missing" in told.stdout
    result = invoke("eval", "templates", bad, "--reference", tiny, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["good"] is False
