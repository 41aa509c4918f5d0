"""What lies beside the weights of a build, against the source: whoever changed it may have made new checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.source import Source
from qconv.verification.companions import check_companions, config_problems
from qconv.verification.outcome import Verification

Edit = Callable[..., None]


@pytest.fixture(scope="module")
def source(moe: Path) -> Source:
    return Source.open(moe)


@pytest.fixture
def copy(rtn_build: Path, tmp_path: Path) -> Path:
    """A build's small files."""
    for file in rtn_build.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def found(folder: Path, source: Source, is_ours: bool = True) -> list[str]:
    result = Verification()
    check_companions(folder, is_ours, source, result)
    return result.problems


def test_a_sound_build_is_sound(copy: Path, source: Source) -> None:
    assert found(copy, source) == []


CHANGES: dict[str, Any] = {
    "hidden_act": "relu",
    "rms_norm_eps": 0.1,
    "num_experts_per_tok": 1,
    "rope_theta": 12345.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "auto_map": {"AutoModelForCausalLM": "evil.M"},
    "eos_token_id": 5,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 99,
    "architectures": ["OtherForCausalLM"],
    "dtype": "float16",
    "unheard_of": 1,
    "bos_token_id": 3,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_named(copy: Path, source: Source, edit_json: Edit, key: str) -> None:
    before = json.loads((copy / "config.json").read_text())
    assert before.get(key) != CHANGES[key]
    edit_json(copy / "config.json", **{key: CHANGES[key]})
    assert any(key in problem for problem in config_problems(copy, source))


@pytest.mark.parametrize("key", ["num_experts_per_tok", "hidden_size", "max_position_embeddings"])
def test_a_missing_key_is_named(copy: Path, source: Source, edit_json: Edit, key: str) -> None:
    edit_json(copy / "config.json", **{key: None})
    assert any(key in problem for problem in config_problems(copy, source))


def test_what_means_the_same_is_the_same(copy: Path, source: Source, edit_json: Edit) -> None:
    # As other tools save it: without the old spellings, with defaults, versions and names of their own.
    edit_json(copy / "config.json", rope_theta=None, num_experts=None)
    edit_json(copy / "config.json", transformers_version="4.40.0", _name_or_path="/home/me/model", use_cache=True)
    values = json.loads((copy / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (copy / "config.json").write_text(json.dumps(values))
    assert list(config_problems(copy, source)) == []


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_changed_file_is_named(copy: Path, source: Source, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content.replace(b"e", b"f", 1))
    assert found(copy, source) == [f"{name} is not the source's"]
    (copy / name).unlink()
    assert found(copy, source) == [f"{name} is missing; the source has it"]


@pytest.mark.parametrize("name", ["chat_template.json", "merges.txt", "vocab.json"])
def test_a_file_that_the_source_lacks_is_named(copy: Path, source: Source, name: str) -> None:
    (copy / name).write_text("{}")
    assert found(copy, source) == [f"{name} is there; the source has none"]


def test_others_builds_may_lack_and_add_files(copy: Path, source: Source) -> None:
    (copy / "generation_config.json").write_text("{}")
    (copy / "tokenizer_config.json").unlink()
    assert found(copy, source, is_ours=False) == []
    (copy / "chat_template.jinja").write_text("{{ evil }}")
    assert found(copy, source, is_ours=False) == ["chat_template.jinja is not the source's"]
