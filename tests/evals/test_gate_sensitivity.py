"""The gates see three kinds of damage to a build that is well-formed in every file, and nothing in a sound one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.gate_sensitivity import DAMAGES, Bench, Blamed, Named, Result, a_a, damage, quantized, trial
from evals.gate_sensitivity import SUITE as ORDINARY
from qconv.artifacts.build import Build
from qconv.evaluation.suites import Suite
from qconv.verification.build import verify
from tests.conftest import BUNDLED

SUITE = Suite.model_validate(
    {
        "noise": None,
        "tasks": [
            # Thirty documents of 96 tokens.
            {"kind": "text", "name": "text", "context": 96, "stride": 48, "tokens": 2850, "document_tokens": 96},
        ],
    }
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model rounded to w4a16; do not write to it."""
    return quantized(BUNDLED, tmp_path_factory.mktemp("sound") / "build", "w4a16", "rtn")


@pytest.fixture(scope="module")
def damaged(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    return {name: damage(sound, folder / name, one.change) for name, one in DAMAGES.items()}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_leaves_a_build_that_verifies_and_changes_what_it_says(
    name: str, sound: Path, damaged: dict[str, Path]
) -> None:
    assert verify(damaged[name]).problems == []
    before, after = Build.open(sound), Build.open(damaged[name])
    middle = before.architecture.layers[2]
    changed = {
        linear.name
        for layer in before.architecture.layers
        for linear in (*layer.linears(), *layer.routers())
        if not torch.equal(_weight(before, linear), _weight(after, linear))
    }
    expected = {
        "expert zeroed": {f"{middle.name}.mlp.experts.0.down_proj"},
        "scales shifted": {linear.name for linear in middle.linears()},
        "router permuted": {f"{middle.name}.mlp.gate"},
    }
    assert changed == expected[name]
    if name == "expert zeroed":
        zeroed = next(linear for linear in middle.linears() if linear.name in changed)
        assert not after.qtensor(zeroed).dequantize().any()


def test_damage_is_a_regression_and_nothing_else_is(sound: Path, damaged: dict[str, Path], tmp_path: Path) -> None:
    some = {name: path for name, path in damaged.items() if name != "expert zeroed"}  # that needs more text
    bench = Bench(BUNDLED, SUITE, tmp_path / "runs")
    results = [*trial(bench, sound, sound, some, blame_tokens=500), *a_a(bench, [sound, sound], [1])]
    assert {one.case: one.exit_code for one in results} == {one.case: one.expected for one in results}
    assert [one.expected for one in results] == [0, 3, 3, 0, 0]
    assert all(one.right for one in results), [one.blame for one in results]
    shifted, permuted = (one.blame for one in results if one.blame is not None)
    assert (shifted.layers[0].part, permuted.layers[0].part) == ("model.layers.2", "model.layers.2")
    assert permuted.parts[0].part == "model.layers.2.mlp.gate"
    assert permuted.parts[0].low > permuted.parts[1].high


def test_only_what_was_damaged_is_right() -> None:
    def named(*parts: str) -> tuple[Named, ...]:
        return tuple(Named(part, 1.0, 0.9, 1.1) for part in parts)

    gate, expert = "model.layers.2.mlp.gate", "model.layers.2.mlp.experts.0"
    assert Blamed("model.layers.2", named("model.layers.2"), named(gate)).right
    assert Blamed(gate, named("model.layers.2"), named(gate, expert)).right
    assert not Blamed(gate, named("model.layers.2"), named(expert, gate)).right
    assert not Blamed(gate, named("model.layers.1"), named(gate)).right
    assert not Blamed("model.layers.2", named("model.layers.1"), named(gate)).right
    assert not Result("router permuted", 3, 0, 0.1, "").right, "the gate missed it"


@pytest.mark.slow
def test_every_damage_is_a_regression_on_a_suite_of_ordinary_size(
    sound: Path, damaged: dict[str, Path], tmp_path: Path
) -> None:
    results = trial(Bench(BUNDLED, ORDINARY, tmp_path / "runs"), sound, sound, damaged)
    assert [one.exit_code for one in results] == [0, 3, 3, 3, 0]
    assert all(one.right for one in results), [one.blame for one in results]
    assert [one.blame.damaged for one in results if one.blame is not None] == [
        "model.layers.2.mlp.experts.0",
        "model.layers.2",
        "model.layers.2.mlp.gate",
    ]


def _weight(build: Build, linear: object) -> torch.Tensor:
    from qconv.core.architecture import Linear

    assert isinstance(linear, Linear)
    return build.qtensor(linear).dequantize() if build.is_quantized(linear) else build.checkpoint.read(linear.weight)
