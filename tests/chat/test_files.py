"""Where chat templates lie, as transformers finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qconv.chat.files import templates_of
from qconv.errors import CheckpointError
from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import BUNDLED


def folder_with(path: Path, settings: object, files: dict[str, str]) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_bytes((BUNDLED / name).read_bytes())
    values = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": settings}))
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("settings", "files", "wanted"),
    [
        (None, {}, {}),
        ("inline", {}, {"default": "inline"}),
        (NAMED, {}, {"default": "d", "tool_use": "t"}),
        (NAMED, {"chat_template.jinja": "file"}, {"default": "file"}),
        (
            "inline",
            {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
            {"default": "file", "tool_use": "tools"},
        ),
    ],
)
def test_every_template_is_found_as_transformers_finds_it(
    settings: object, files: dict[str, str], wanted: dict[str, str], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, settings, files)
    found = templates_of(folder, json.loads((folder / "tokenizer_config.json").read_text()))
    assert found == wanted
    theirs = load_tokenizer(folder).chat_template
    assert (theirs or {}) == (wanted if len(wanted) > 1 else wanted.get("default", {}))


def test_a_damaged_one_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"rag\.jinja: cannot read"):
        templates_of(tmp_path, {})
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        templates_of(BUNDLED.parent, {"chat_template": 5})
