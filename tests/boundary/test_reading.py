"""JSON and YAML from outside: values, or one error that names the file and the reason."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qconv.boundary import reading
from qconv.boundary.reading import parse_json, parse_yaml, read_json, read_yaml
from qconv.errors import CheckpointError, RecipeError, UsageError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_what_json_writes_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value), "it", CheckpointError) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_our_error(content: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        said = ""
        try:
            parse(content, "it", CheckpointError)
        except CheckpointError as error:
            said = error.message
        assert not said or said.startswith("it: cannot be read as")
        assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        f'{{"size": -{10**400}}}',  # which no float holds
        b"\xff\xfe{}",
        "[" * 100_000,
        "[" * 200 + "]" * 200,
        "9" * 5000,
        '{"a": "\\ud800"}',
        '["\\udc00x"]',
    ],
    ids=[
        "empty",
        "open",
        "comma",
        "no float",
        "not UTF-8",
        "open lists",
        "deep lists",
        "long number",
        "high half",
        "low half",
    ],
)
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises(UsageError, match="answer: cannot be read as JSON") as found:
        parse_json(text, "answer", UsageError, hint="Ask again.")
    assert found.value.hint == "Ask again."
    assert len(found.value.message) < 500, "a message never quotes what it cannot read"


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "it", CheckpointError) == "\U0001f600"


@pytest.mark.parametrize(
    "value",
    [
        "2001-13-45",
        "0x_",
        "!!timestamp foo",
        "!!float abc",
        '!!int ""',
        "!!bool maybe",
        "!!binary a",
        "!!python/object:os.system x",
        "{? [a]: 1, ? {b: 1}: 2}",
        "{a: 1, a: 2}",
        "&a [*a]",
        "*missing",
        "%",
        "'open",
        "[" * 3000,
        "9" * 5000,
        "{<<: 3}",
        "\x00",
    ],
)
def test_yaml_that_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read as YAML: "):
        parse_yaml(f"skip: {value}\n", "r.yaml", RecipeError)


def test_aliases_that_stand_for_billions_of_values_are_refused_before_they_are_built() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    started = time.monotonic()
    with pytest.raises(UsageError, match="stands for more than"):
        parse_yaml(bomb, "suite", UsageError)
    assert time.monotonic() - started < 10, "counting takes a look at each alias; building would take for ever"


def test_aliases_and_merged_keys_work() -> None:
    text = "base: &b {x: 1}\nmine: {<<: *b, y: 2}\nagain: *b\n"
    assert parse_yaml(text, "it", UsageError) == yaml.safe_load(text)


@pytest.mark.parametrize("document", ["", "# nothing\n"])
def test_an_empty_document_is_none(document: str) -> None:
    assert parse_yaml(document, "it", UsageError) is None


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('\ufeff{"a": 1}')
    assert read_json(file, CheckpointError) == {"a": 1}
    assert read_yaml(file, CheckpointError) == {"a": 1}
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "b.json", CheckpointError)
    with pytest.raises(CheckpointError, match="is no file"):
        read_yaml(tmp_path, CheckpointError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no file"):  # reading it would wait for ever
        read_json(tmp_path / "pipe", CheckpointError)
    with pytest.raises(CheckpointError, match="null"):
        read_json(Path("a\0b"), CheckpointError)
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 4)
    with pytest.raises(CheckpointError, match="11 bytes are more than the 4 that are read"):
        read_json(file, CheckpointError)
