"""What transformers' config class gets of a config.json."""

from __future__ import annotations

import math

import pytest

from evals.model_types import config_of as small_config
from qconv.models.transformer import config_of


@pytest.mark.parametrize(("tag", "number"), [("Infinity", math.inf), ("-Infinity", -math.inf)])
def test_infinities_are_numbers_again(tag: str, number: float) -> None:
    values = small_config("bamba").to_dict()
    written = {**values, "time_step_limit": [0.0, {"__float__": tag}]}
    assert config_of(written).time_step_limit[1] == number


def test_what_only_looks_like_one_stays() -> None:
    values = small_config("llama").to_dict()
    for other in ({"__float__": "many"}, {"__float__": "NaN", "more": 1}, [{"a": {"b": 2}}]):
        assert config_of({**values, "note": other}).note == other
    assert math.isnan(config_of({**values, "note": {"__float__": "NaN"}}).note)
