"""Chat templates of any kind: rendered as transformers does, bounded in time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qconv.chat import templates
from qconv.chat.templates import ChatTemplates, RefusedChatError
from qconv.errors import CheckpointError, UsageError
from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import BUNDLED

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größer als π? 🙂"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "content": "yes", "tool_call_id": "1"},
]
TURNS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"


class Tokenizer:
    """What rendering takes of a tokenizer."""

    def __init__(self, chat_template: Any) -> None:
        self.chat_template = chat_template
        self.special_tokens_map = {"bos_token": "<s>"}


Make = Callable[..., ChatTemplates]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ChatTemplates] = []

    def of(template: Any, **options: Any) -> ChatTemplates:
        made.append(ChatTemplates(Tokenizer(template), "MODEL", **options))
        return made[-1]

    yield of
    for one in made:
        one.close()


def test_text_is_what_transformers_makes_of_it() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.chat_template = {
        "default": tokenizer.chat_template,
        "turns": TURNS + "{% endfor %}{{ 'go' if add_generation_prompt }}",
        "masked": "{% generation %}{{ messages }}{% endgeneration %}",
    }
    with ChatTemplates(tokenizer, BUNDLED) as chats:
        for name in chats.names:
            chat = CHAT[:2] if name == "default" else CHAT
            for answer in (True, False):
                wanted = tokenizer.apply_chat_template(
                    chat, chat_template=name, tokenize=False, add_generation_prompt=answer
                )
                assert chats.render(chat, answer=answer, name=name) == wanted


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        ("{{ (9 ** 9) ** (9 ** 9) }}", "more than 2 s|memory"),
        ('{{ "a" * 10 ** 10 }}', "memory|more than"),
        (
            '{% set n = namespace(x="aa") %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}',
            "memory|64 Mi|more than",
        ),
        ("{% for a in b %}", "no Jinja template: line 1"),
    ],
)
def test_a_hostile_template_is_ended_by_name(
    template: str, problem: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 2)
    chats, started = make(template), time.monotonic()
    with pytest.raises(CheckpointError, match=f"MODEL: its chat template.*({problem})") as caught:
        chats.render(CHAT)
    assert not isinstance(caught.value, RefusedChatError)
    assert time.monotonic() - started < 120.0  # starting the process on a busy machine takes most of it


REFUSALS = (
    "{{ messages[99].content }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ 1 // 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(9999999) }}",
    "{{ ''.__class__.__mro__ }}",
)


def test_a_template_that_refuses_a_chat_may_render_another(make: Make) -> None:
    named = {one: "{% if messages | length > 1 %}" + one + "{% endif %}ok" for one in REFUSALS}
    chats = make(named)
    for name in named:
        with pytest.raises(RefusedChatError, match="does not render this chat"):
            chats.render(CHAT, name=name)
        assert chats.render(CHAT[:1], name=name) == "ok"


def test_after_a_hostile_chat_the_next_is_rendered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 4)  # the second chat has as long
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    chats = make("{% if messages | length > 1 %}" + loop + "{% endif %}ok")
    with pytest.raises(CheckpointError, match="more than 4 s"):
        chats.render(CHAT)
    assert chats.render(CHAT[:1]) == "ok"


def test_the_date_is_fixed_unless_it_is_asked_for(make: Make) -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    assert make(template).render(CHAT) == "26 Jul 2024"
    assert make(template, date=None).render(CHAT) == time.strftime("%d %b %Y")


def test_several_templates_go_by_name(make: Make) -> None:
    chats = make({"default": "one", "tool_use": "two"})
    assert chats.names == ("default", "tool_use")
    assert [chats.render(CHAT), chats.render(CHAT, name="tool_use")] == ["one", "two"]
    with pytest.raises(RefusedChatError, match="no default"):
        make({"rag": "x", "tool_use": "two"}).render(CHAT)


def test_no_template_and_what_json_cannot_say_are_told(make: Make) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        make(None).render(CHAT)
    with pytest.raises(RefusedChatError, match="JSON cannot say"):
        make("x").render([{"role": "user", "content": {1, 2}}])


def test_half_a_surrogate_pair_is_replaced(make: Make) -> None:
    rendered = make("{{ messages[0].content }}").render([{"role": "user", "content": "a\ud800b🙂"}])
    assert rendered == "a\ufffdb🙂"


def test_tools_and_variables_reach_the_template(make: Make) -> None:
    chats = make("{{ tools[0].function.name if tools }}|{{ enable_thinking }}")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert chats.render(CHAT, tools=tools, variables={"enable_thinking": False}) == "f|False"
    assert chats.render(CHAT) == "|"
