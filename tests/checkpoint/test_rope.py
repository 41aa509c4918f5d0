"""Rotary embeddings in config.json: what transformers itself reads is the oracle, in either spelling and in both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.build import with_both_spellings
from qconv.artifacts.source import Source
from qconv.checkpoint.rope import in_both_spellings, stated_rope
from qconv.errors import CheckpointError, UsageError
from qconv.planning.estimate import estimate
from tests.conftest import small_recipe

LENGTH = 512
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn, length of the model": {"rope_type": "yarn", "factor": 4.0},
    "yarn in full": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "longrope": LONG,
    "default": {"rope_type": "default"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "a base alone": {"rope_theta": 5e5},
    "nothing to scale": {"rope_theta": 5e5, "rope_scaling": None},
    "an older type": {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "two names of a type": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", **YARN}},
    "a length at the top": {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "two bases": {"rope_theta": 3e4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
    "a card's advice": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
    "a card's advice and three bases": {
        "rope_theta": 3e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e5},
        "rope_scaling": YARN | {"rope_theta": 9e4},
    },
    "the base at the top": {
        "rope_theta": 3e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e5},
        "rope_scaling": YARN,
    },
    "an empty older one": {"rope_parameters": YARN | {"rope_theta": 7e5}, "rope_scaling": {}},
    **{f"{name}, new": {"rope_parameters": scaling | {"rope_theta": 7e5}} for name, scaling in SCALINGS.items()},
    **{f"{name}, old": {"rope_theta": 7e5, "rope_scaling": scaling} for name, scaling in SCALINGS.items()},
}


def theirs(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What transformers makes of a config.json."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(folder).rope_parameters
    return {key: value for key, value in read.items() if key != "type"}


def described(config: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16} | {
        "max_position_embeddings": LENGTH,
        **config,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_transformers_computes_with(name: str, tmp_path: Path) -> None:
    config = described(CONFIGS[name])
    assert stated_rope(config) == theirs(config, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_say_the_same_to_transformers_and_to_older_readers(name: str, tmp_path: Path) -> None:
    config = described(CONFIGS[name])
    both = config | in_both_spellings(config)
    expected = theirs(config, tmp_path)
    assert theirs(both, tmp_path) == expected
    # Readers on transformers 4 look at these two keys and at nothing else.
    assert both["rope_theta"] == expected["rope_theta"]
    scaling = dict(both.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    assert kind == expected["rope_type"]
    scaling.pop("type", None)
    assert {name: expected.get(name) for name in scaling} == scaling
    if "rope_parameters" in config and kind != "default":
        assert "rope_theta" not in scaling, "transformers 4 warns of keys that no scaling has"


def test_a_partial_rotation_is_at_the_top_too() -> None:
    config = described({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}})
    assert in_both_spellings(config) == {"rope_theta": 1e4, "partial_rotary_factor": 0.5}


def test_the_old_spelling_is_left_as_it_is() -> None:
    assert in_both_spellings(described({"rope_theta": 1e4, "rope_scaling": YARN})) == {}


def test_a_base_that_would_be_lost_is_refused() -> None:
    # transformers 5 drops the base of rope_parameters where rope_scaling is there, and takes the family's.
    config = described({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_scaling": YARN})
    for function in (stated_rope, in_both_spellings):
        with pytest.raises(UsageError, match=r"rope_theta 700000\.0 of rope_parameters is lost") as caught:
            function(config)
        assert caught.value.hint


def test_a_lost_base_is_told_before_any_work(moe_copy: Path, edit_json: Callable[..., None]) -> None:
    parameters = {"rope_type": "default", "rope_theta": 7e5}
    edit_json(moe_copy / "config.json", rope_theta=None, rope_parameters=parameters, rope_scaling=YARN)
    for function in (Source.open, lambda path: estimate(path, small_recipe())):
        with pytest.raises(UsageError, match="is lost"):
            function(moe_copy)


def test_a_builds_config_has_both() -> None:
    config = described({"rope_parameters": YARN | {"rope_theta": 7e5}})
    both = with_both_spellings(config)
    assert (both["rope_scaling"], both["rope_theta"]) == (YARN, 7e5)
    assert both["rope_parameters"] == config["rope_parameters"]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", ["yarn", [1], 3, {"rope_type": ["yarn"]}, {"full_attention": {"rope_theta": 1e4}}])
def test_what_is_no_object_of_parameters_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: "):
        stated_rope(described({key: value}))
