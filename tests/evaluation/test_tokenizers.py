"""A build must read text as its reference does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qconv.evaluation.artifacts import identify
from qconv.evaluation.tokenizers import difference


@pytest.fixture
def copy(moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(moe, tmp_path / "copy"))


def test_another_form_of_the_same_tokenizer_is_the_same(copy: Path, moe: Path) -> None:
    values = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(values, indent=4))
    assert identify(copy).tokenizer_sha256 != identify(moe).tokenizer_sha256
    assert difference(identify(copy), identify(moe)) is None


def test_another_vocabulary_is_told(copy: Path, moe: Path) -> None:
    values = json.loads((copy / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:-200]
    (copy / "tokenizer.json").write_text(json.dumps(values))
    assert "other tokens" in str(difference(identify(copy), identify(moe)))


def test_another_chat_template_is_told(copy: Path, moe: Path) -> None:
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert "chat template" in str(difference(identify(copy), identify(moe)))


def test_a_template_that_knows_no_system_turn_differs_only_in_what_it_renders(
    copy: Path, moe: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(moe, tmp_path / "other"))
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    (copy / "chat_template.jinja").write_text(refusing + "{% endfor %}")
    (other / "chat_template.jinja").write_text(refusing + "{#- the same -#}{% endfor %}")
    assert difference(identify(copy), identify(other)) is None
    (other / "chat_template.jinja").write_text(refusing + "!{% endfor %}")
    assert "chat template" in str(difference(identify(copy), identify(other)))
