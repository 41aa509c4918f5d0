"""A context that is extended on request: transformers computes YaRN with it, and what has no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.artifacts.build import with_both_spellings
from qconv.checkpoint.extended_rope import LARGEST_FACTOR, ExtendedRope, with_extended_rope
from qconv.checkpoint.rope import stated_rope
from qconv.errors import UsageError

LENGTH, BASE, HEAD = 512, 5e5, 16
OLD = {"rope_theta": BASE}
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
SPELLINGS: dict[str, dict[str, Any]] = {
    "old": OLD,
    "old, nothing to scale": OLD | {"rope_scaling": None},
    "old, a type that scales nothing": OLD | {"rope_scaling": {"type": "default"}},
    "new": NEW,
    "new, nothing to scale": NEW | {"rope_scaling": None},
    "both": NEW | {"rope_theta": BASE, "rope_scaling": {"rope_type": "default"}},
}


def described(**config: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": HEAD, "max_position_embeddings": LENGTH}
    return {"model_type": "qwen3", **sizes, **config}


def frequencies(config: dict[str, Any], folder: Path) -> tuple[torch.Tensor, float]:
    """What transformers rotates by, and what it scales attention by."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (folder / "config.json").write_text(json.dumps(config))
    found, scale = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    return found, scale


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_transformers_computes_yarn_with_either_spelling(
    spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_both_spellings(with_extended_rope(described(**SPELLINGS[spelling]), "yarn:4"))
    assert config["max_position_embeddings"] == 4 * LENGTH
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH, "rope_theta": BASE}
    assert stated_rope(config) == expected
    found, scale = frequencies(config, tmp_path)
    assert scale == pytest.approx(1.138629, abs=1e-6)  # 0.1 ln 4 + 1: YaRN, section 3.4
    plain = BASE ** -(torch.arange(0, HEAD, 2).float() / HEAD)
    # Wavelengths beyond the original context turn four times slower, the shortest as before.
    assert torch.allclose(found[0], plain[0])
    assert torch.allclose(found[-1], plain[-1] / 4)
    assert not caplog.records, "transformers warns where factor and lengths do not fit each other"


def test_a_length_of_its_own() -> None:
    config = with_extended_rope(described(**OLD), "yarn:4:256")
    assert config["rope_scaling"]["original_max_position_embeddings"] == 256
    assert config["max_position_embeddings"] == 1024


def test_the_language_part_of_a_larger_model_is_changed_alone() -> None:
    whole = {"model_type": "glm4v_moe", "max_position_embeddings": 7, "text_config": described(**NEW)}
    found = with_extended_rope(whole, "yarn:2")
    assert found["text_config"]["rope_parameters"]["factor"] == 2.0
    assert found["text_config"]["max_position_embeddings"] == 2 * LENGTH
    assert {**found, "text_config": None} == {**whole, "text_config": None}
    assert whole["text_config"] == described(**NEW), "the source's own is left alone"


def test_nothing_asked_is_nothing_changed() -> None:
    assert with_extended_rope(described(**NEW), None) == described(**NEW)


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (described(rope_theta=1.0, rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn:2", "already, 'yarn'"),
        (described(rope_theta=1.0, rope_scaling={"type": "linear", "factor": 4.0}), "yarn:2", "already, 'linear'"),
        ({"model_type": "gpt2", "max_position_embeddings": LENGTH}, "yarn:2", "(gpt2) has no rotary embedding"),
        (described(**OLD, max_position_embeddings=None), "yarn:2", "lacks max_position_embeddings"),
        (described(**OLD), "yarn:2:513", "original context length 513 is more than"),
        (described(**OLD), "yarn:2:128", "256 tokens are fewer than the 512"),
    ],
    ids=["yarn", "linear", "no rope", "no length", "too long", "too short"],
)
def test_what_has_no_sense_is_refused_with_its_reason(config: dict[str, Any], asked: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_extended_rope(config, asked)
    assert message in caught.value.message
    assert f"--rope {asked}" in caught.value.message


def test_a_base_that_the_family_has_is_a_rope_too() -> None:
    assert with_extended_rope(described(), "yarn:2")["rope_scaling"]["factor"] == 2.0


@given(st.floats(1.001, LARGEST_FACTOR), st.none() | st.integers(1, 2**31))
def test_a_request_is_read_back(factor: float, original: int | None) -> None:
    asked = ExtendedRope(float(f"{factor:.12g}"), original)
    assert ExtendedRope.parse(str(asked)) == asked


@given(st.text(max_size=12) | st.text(max_size=8).map("yarn:{}".format))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = ExtendedRope.parse(text)
    except ValueError:
        return
    assert 1.0 < found.factor <= LARGEST_FACTOR
    assert found.original is None or found.original > 0


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:1", "yarn:nan", "yarn:65", "yarn:2:", "yarn:2:0", "linear:2"])
def test_requests_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"yarn|YaRN|positive"):
        ExtendedRope.parse(text)
