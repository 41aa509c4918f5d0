"""``--target-size`` and ``--target-bits``: what goes with them, what is said without a sensitivity, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qconv.building.bench import SliceShape
from tests.cli.conftest import Invoke
from tests.conftest import random_model, save_model

TEXT = ("--tokens", 128, "--sequence-length", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that groups of 128 and blocks of 256 divide."""
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_experts": 4}
    made = random_model("qwen3_moe", norm_topk_prob=True, **sizes)
    return save_model(made, tmp_path_factory.mktemp("target") / "model", "4MB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fmt", "gguf", "--target-bits", 4, "--target-size", "2MB"), "give one of them"),
        (("--fmt", "gguf", "--target-size", "2 megabytes"), "is no size"),
        (("--fmt", "gguf", "--target-bits", 0.1), "0.1"),
        (("--fmt", "gguf", "--target-bits", "nan"), "nan"),
        (("--fmt", "gguf", "--target-size", "1kB"), "the smallest build of these types has"),
        (("--fmt", "gguf", "--target-bits", 4, "--exclude-type", "Q9*"), "is none of"),
        (("--fmt", "gguf", "--target-bits", 4, "--exclude-type", "*"), "leaves no type"),
        (("--fmt", "gguf", "--fmt", "w4a16", "--target-bits", 4), "are for one build"),
        (("--fmt", "awq", "--target-bits", 4), "format awq holds no mixture of integers"),
        (("--fmt", "fp8-dynamic", "--target-bits", 4), "format fp8_dynamic holds"),
        (("--fmt", "w8a8", "--target-bits", 8), "format w8a8 holds"),
        (("--fmt", "w4a16", "--sensitivity", "."), "--sensitivity: goes with --target-size or --target-bits"),
        (("--fmt", "gguf:Q4_K_M", "--exclude-type", "IQ*"), "--exclude-type: goes with"),
        (("--fmt", "gguf:Q4_K_M", "--no-gradients"), "--no-gradients: goes with"),
        (
            ("--fmt", "gguf", "--target-bits", 4, "--no-gradients", "--sensitivity", "."),
            "--no-gradients: is for the pass",
        ),
        (("--fmt", "gguf", "--target-bits", 4, "--sensitivity", "."), "holds no sensitivity"),
        (("--target-bits", 4), "what to build is not said"),
    ],
)
def test_what_cannot_be_asked_for_is_wrong_usage(
    options: tuple[Any, ...], message: str, invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    refused = invoke("quantize", model, *options, "-o", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["nowhere/best.yaml", "out/best.yaml", "out/deep/best.yaml", "model/config.json"])
def test_where_a_recipe_cannot_be_saved_is_said_before_any_work(
    place: str, invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.symlink_to(model)
    before = (model / "config.json").read_bytes()
    options = ("--fmt", "gguf", "--target-bits", 5, *TEXT, "--save", tmp_path / place)
    refused = invoke("quantize", source, *options, "-o", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert "--save" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert (model / "config.json").read_bytes() == before


@pytest.mark.parametrize("fmt", ["gguf", "w4a16"])
@pytest.mark.parametrize("flag", [(), ("--no-gradients",)])
def test_without_a_sensitivity_the_plan_says_what_it_costs(
    fmt: str, flag: tuple[str, ...], invoke: Invoke, tmp_path: Path
) -> None:
    config = SliceShape().config(layers=62, experts=160)
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--fmt", fmt, "--target-bits", 4.5, *flag)
    found = json.loads(invoke("plan", tmp_path, *options, "--json").stdout)["sensitivity"]
    assert found["tokens"] == 32768
    layers = 2 if flag else 63
    assert 2 * layers * 6144 * 32768 < found["scratch_bytes"] < 2 * (layers + 14) * 6144 * 32768
    # GPTQ factorizes and compensates 29,760 experts' linears; the passes meet 8 of 160 experts a token.
    assert 0.02 < found["calibration_passes"] < 0.5
    shown = invoke("plan", tmp_path, *options)
    assert shown.exit_code == 0
    assert "qconv sensitivity" in shown.stdout
    assert invoke("plan", tmp_path, *options, "--save", tmp_path / "best.yaml").exit_code == 2


@pytest.mark.parametrize("fmt", ["gguf", "w4a16"])
def test_a_choice_is_planned_saved_and_built(fmt: str, invoke: Invoke, model: Path, tmp_path: Path) -> None:
    flag = ("--no-gradients",) if fmt == "w4a16" else ()
    assert invoke("sensitivity", model, *TEXT, *flag, "-o", tmp_path / "s").exit_code == 0
    options = ("--fmt", fmt, "--target-bits", 5, *TEXT, "--sensitivity", tmp_path / "s")
    shown = invoke("plan", model, *options, "--save", tmp_path / "plan.yaml")
    assert shown.exit_code == 0, shown.stderr
    assert ("relative error" in shown.stdout) == bool(flag)
    assert ("predicted KLD" in shown.stdout) != bool(flag)
    planned = json.loads(invoke("plan", model, *options, "--json").stdout)
    made = invoke("quantize", model, *options, "--save", tmp_path / "made.yaml", "-o", tmp_path / "out", "--json")
    assert made.exit_code == 0, made.stderr
    values = json.loads(made.stdout)
    name = "predicted_relative_error" if flag else "predicted_kld"
    assert values["allocation"][name] == planned[name]
    weights = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out").glob("model-*.gguf")]
    assert sum(file.stat().st_size for file in weights) == planned["output_bytes"]
    inspected = json.loads(invoke("inspect", tmp_path / "out", "--roles", "--json").stdout)["bits_by_layer"]
    report = json.loads((tmp_path / "out" / "qconv-report.json").read_text())["bits_by_layer"]
    for mine, theirs in zip(inspected, report, strict=True):  # headers hold routers, too
        assert {role: mine["roles"][role] for role in theirs["roles"]} == pytest.approx(theirs["roles"], abs=1e-4)
    assert "8.50" in invoke("inspect", tmp_path / "out", "--roles").stdout or fmt == "w4a16"
    # Both files are recipes of the same build.
    for file in ("plan.yaml", "made.yaml"):
        assert yaml.safe_load((tmp_path / file).read_text())["calibration"]["tokens"] == 128
        again = json.loads(invoke("plan", model, "--recipe", tmp_path / file, "--json").stdout)
        assert again["bits_per_weight"] == pytest.approx(values["bits_per_weight"], abs=1e-3)
