"""A build's packaging against its source's: each kind of damage is found and named, sound builds differ in nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.chat.fixed_set import FIXED_SET
from qconv.evaluation.packaging import compare_packaging
from qconv.planning.gguf_recipe import GgufRecipe
from tests.conftest import BUNDLED
from tests.gguf_copies import copied

TEMPLATE = """{%- if tools %}{{ eos_token }}<tools>
{%- for t in tools %}{{ t.function | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}
<{{ m.role }}>{{ m.content }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% for k, v in c.function.arguments | items %}
{{ k }}={{ v }}{% endfor %}</call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif %}{% endif %}"""
"""Tools, calls with arguments as objects, a system message in the middle refused, a thinking flag."""
GENERATION = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a template for tools and with a sampling of its own."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(BUNDLED, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _set(folder / "generation_config.json", **GENERATION)
    return folder


@pytest.fixture(scope="module")
def gguf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "build"
    quantize_gguf(source, out, GgufRecipe(type="Q8_0"), progress=lambda *_: None, log=lambda _: None)
    return next(out.glob("*.gguf"))


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _template(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def test_the_same_differs_in_nothing(source: Path, gguf: Path) -> None:
    for build in (source, gguf):
        found = compare_packaging(build, source)
        assert found.differences == []
        # Refused: a system message in the middle, and arguments as a text, which has no items.
        assert found.refused == ["system message in the middle", "arguments as text"]
        assert len(found.rendered) == len(FIXED_SET) - 2


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
DAMAGES: list[tuple[str, Change, list[str]]] = [
    ("lost template", lambda at: (at / "chat_template.jinja").unlink(), ["chat template default is missing"]),
    (
        "broken template",
        _template("{%- if tools %}", "{%- if tools"),
        ["chat template default is not the source's text", "is no Jinja template"],
    ),
    (
        "arguments twice",
        _template("{{ k }}={{ v }}", "{{ k }}={{ v | tojson }}"),
        [
            "chat template default is not",
            "chat 'tool result': rendered otherwise from character",
            "chat 'several calls in a turn'",
            "chat 'answer after",
        ],
    ),
    (
        "system refused no more",
        _template("{{ raise_exception('system first') }}", ""),
        ["chat template default is not", "the build's template renders it; the source's refuses it"],
    ),
    (
        "thinking flag lost",
        _template("not enable_thinking", "false"),
        ["chat template default is not", "chat 'no thinking': rendered otherwise"],
    ),
    (
        "lost generation_config",
        lambda at: (at / "generation_config.json").unlink(),
        ["generation_config.json is missing; the source says"],
    ),
    (
        "another temperature",
        lambda at: _set(at / "generation_config.json", temperature=1.0),
        ["generation_config: temperature is 1.0; the source's is 0.7"],
    ),
    (
        "another end",
        lambda at: _set(at / "generation_config.json", eos_token_id=7),
        ["generation_config: eos_token_id is 7", "tokens 0 end the source's answers and not the build's"],
    ),
    (
        "another special token",
        lambda at: _set(at / "tokenizer_config.json", eos_token="<|im_end|>"),
        ["chat 'tools'", "chat 'tools and", "chat 'one", "chat 'tool r", "chat 'sev", "chat 'ans", "eos_token is"],
    ),
    (
        "YaRN added",
        lambda at: _set(at / "config.json", rope_scaling=YARN),
        ["rope: factor is 4.0; the source's is none", "rope: original_max", "rope: rope_type is 'yarn'"],
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [pytest.param(*one[1:], id=one[0]) for one in DAMAGES])
def test_every_damage_is_named(source: Path, tmp_path: Path, damage: Change, expected: list[str]) -> None:
    build = tmp_path / "build"
    shutil.copytree(source, build)
    damage(build)
    found = compare_packaging(build, source).differences
    assert len(found) == len(expected), found
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence


def test_a_lost_yarn_factor_is_named(source: Path, tmp_path: Path) -> None:
    stretched = tmp_path / "stretched"
    shutil.copytree(source, stretched)
    _set(stretched / "config.json", rope_scaling=YARN)
    found = compare_packaging(source, stretched).differences
    assert "rope: factor is none; the source's is 4.0" in found


OF_GGUF = {
    "stale template": (
        {"tokenizer.chat_template": (TEMPLATE.replace("<call>", "<tool>"), GGUFValueType.STRING)},
        "chat 'several calls in a turn': rendered otherwise",
    ),
    "temperature": (
        {"general.sampling.temp": (1.0, GGUFValueType.FLOAT32)},
        "generation_config: temperature is 1.0; the source's is 0.7",
    ),
    "YaRN added": (
        {
            "qwen3moe.rope.scaling.type": ("yarn", GGUFValueType.STRING),
            "qwen3moe.rope.scaling.factor": (4.0, GGUFValueType.FLOAT32),
        },
        "rope: factor is 4.0; the source's is none",
    ),
    "context": (
        {"qwen3moe.context_length": (8192, GGUFValueType.UINT32)},
        "context length is 8192; the source's is 4096",
    ),
}


@pytest.mark.parametrize(("keys", "expected"), OF_GGUF.values(), ids=OF_GGUF)
def test_keys_of_gguf_that_are_stale(source: Path, gguf: Path, tmp_path: Path, keys: Any, expected: str) -> None:
    stale = copied(gguf, tmp_path / "stale.gguf", keys)
    assert any(expected in sentence for sentence in compare_packaging(stale, source).differences)


def test_keys_of_gguf_that_are_lost(source: Path, gguf: Path, tmp_path: Path) -> None:
    sampling = [f"general.sampling.{name}" for name in ("temp", "top_p", "top_k", "penalty_repeat")]
    lost = copied(gguf, tmp_path / "lost.gguf", drop=["tokenizer.chat_template", *sampling])
    found = compare_packaging(lost, source).differences
    assert len(found) == 2, found
    assert "chat template default is missing" in found[0]
    assert "general.sampling.* is missing" in found[1]
