"""Tokenizers that libraries refuse, and the BOS that texts get anyway."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qconv.checkpoint.tokenizer import leading_bos, load_tokenizer, rendered_bos
from qconv.errors import CheckpointError
from tests.conftest import BUNDLED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"version": "1.0"', '"version": "9.9"'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"model": {"type": "BPE", "vocab": 5, "merges": []}}),
        lambda text: json.dumps(json.loads(text) | {"added_tokens": [{"id": -1}]}),
        lambda text: json.dumps(json.loads(text) | {"pre_tokenizer": {"type": "Abacus"}}),
    ],
)
def test_a_tokenizer_that_a_library_refuses_is_named(damage: Any, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=f"{folder}: transformers cannot load the tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("setting", [{"model_max_length": {}}, {"model_max_length": "long"}])
def test_a_setting_that_fails_when_it_is_used_is_found_when_it_is_read(setting: dict[str, Any], folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CheckpointError, match=f"{folder}: transformers cannot load the tokenizer: TypeError"):
        load_tokenizer(folder)


def test_a_panic_of_rust_is_an_error_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class PanicException(BaseException):
        """As pyo3 names and derives it."""

    def panics(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    with pytest.raises(CheckpointError, match="PanicException: index out of bounds"):
        load_tokenizer(folder)


def test_a_second_bos_is_known_before_it_is_written(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert leading_bos(tokenizer) == []
    assert rendered_bos(tokenizer, "<|im_end|>hi") == ""
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", tokenizer.bos_token_id)]
    )
    assert leading_bos(tokenizer) == [tokenizer.bos_token_id]
    assert rendered_bos(tokenizer, "<|im_end|>hi") == "<|im_end|>"
    assert rendered_bos(tokenizer, "hi") == ""
