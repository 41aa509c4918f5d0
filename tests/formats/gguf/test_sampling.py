"""What generation_config.json says of sampling and of ends, in a GGUF file's keys and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.sampling import generation_of, sampling_metadata
from qconv.formats.gguf.special import EOS_IDS, end_ids
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from tests.conftest import BUNDLED

QWEN3_CODER = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
FILE = Path("generation_config.json")


def test_the_keys_are_those_that_llama_cpps_converter_writes() -> None:
    metadata = sampling_metadata(FILE, QWEN3_CODER | {"min_p": 0.05, "max_length": 9, "num_beams": 4})
    assert {key: (value.value, value.type) for key, value in metadata.items()} == {
        "general.sampling.top_k": (20, GGUFValueType.INT32),
        "general.sampling.top_p": (0.8, GGUFValueType.FLOAT32),
        "general.sampling.min_p": (0.05, GGUFValueType.FLOAT32),
        "general.sampling.temp": (0.7, GGUFValueType.FLOAT32),
        "general.sampling.penalty_repeat": (1.05, GGUFValueType.FLOAT32),
    }
    assert sampling_metadata(FILE, {"temperature": None}) == {}


@pytest.mark.parametrize(
    "values", [{"top_k": 1.5}, {"temperature": "hot"}, {"top_p": -1}, {"min_p": True}, {"top_k": 2**40}]
)
def test_a_value_that_is_no_number_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {next(iter(values))} is"):
        sampling_metadata(FILE, values)


def test_what_is_written_is_read_back() -> None:
    written = sampling_metadata(FILE, QWEN3_CODER)
    read = {
        # As a header's reader gives them: a float32's value.
        key: float(np.float32(value.value)) if value.type is GGUFValueType.FLOAT32 else value.value
        for key, value in written.items()
    }
    assert generation_of(read) == QWEN3_CODER
    assert generation_of({"general.sampling.temp": 0.0}) == {"do_sample": False}
    assert generation_of({"general.sampling.temp": float("nan"), "general.sampling.top_k": "20"}) == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled tokenizer, <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2; 0 is its end of sequence."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    return tmp_path


def named(folder: Path, ends: Any) -> tuple[int | None, int | None, int | None]:
    """The ids of the end of sequence, of turn and of message that a file gets."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    keys = tokenizer_metadata(folder, 2048, {"eos_token_id": 0})
    found = [keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    eos, eot, eom = (None if value is None else value.value for value in found)
    return eos, eot, eom


def test_every_end_gets_a_key_or_is_known_by_its_text(folder: Path) -> None:
    assert named(folder, 0) == (0, None, None)
    assert named(folder, [0, 2]) == (0, 2, None)
    assert named(folder, [2, 77]) == (0, 77, None)  # llama.cpp knows <|im_end|> anyway
    assert named(folder, [0, 77, 78]) == (0, 77, 78)
    assert named(folder, [0, 999_999]) == (0, None, None)  # no token can be it
    assert named(folder, None) == (0, None, None)
    with pytest.raises(UsageError, match=r"end an answer, and llama\.cpp has no key left"):
        named(folder, [0, 77, 78, 79])
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        named(folder, "0")


def test_every_end_is_read() -> None:
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "b", "c", "<|endoftext|>", "d"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        EOS_IDS: np.array([2, 5], dtype=np.int32),
    }
    assert end_ids(GgufModel((Path("m"),), keys, {}), 6) == [2, 3, 5, 1, 4]
    for wrong in (6, -1, 1.0, True, "2"):
        with pytest.raises(CheckpointError, match=r"eos_token_id is .*, no row of the embedding"):
            end_ids(GgufModel((Path("m"),), keys | {"tokenizer.ggml.eos_token_id": wrong}, {}), 6)
