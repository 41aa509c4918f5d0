"""generation_config.json as people and tools leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.checkpoint.generation_config import read_generation_config
from qconv.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "JSON"),
        ("{not json", "JSON"),
        ("[]", "not a JSON object"),
        ('"x"', "not a JSON object"),
        ('{"eos_token_id": "0"}', "eos_token_id '0' is neither"),
        ('{"eos_token_id": {"a": 1}}', "eos_token_id"),
        ('{"eos_token_id": [0, null]}', "eos_token_id"),
        ('{"pad_token_id": true}', "pad_token_id"),
        ('{"bos_token_id": 1.5}', "bos_token_id"),
        ('{"eos_token_id": [0, 36893488147419103232]}', "eos_token_id"),
    ],
)
def test_a_malformed_file_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{problem}") as caught:
        read_generation_config(tmp_path)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("value", ["null", "0", "[0, 2]", "[]", "999999"])
def test_any_form_of_end_tokens_is_read(value: str, tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}, "foo": {{"bar": 1}}}}')
    assert read_generation_config(tmp_path)["foo"] == {"bar": 1}
