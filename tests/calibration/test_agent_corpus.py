"""The corpus for agents: conversations are about real text, whole, seeded, and reach a template with their tools."""

from __future__ import annotations

import json
from itertools import islice

from qconv.calibration.agent_corpus import TOOLS, conversation
from qconv.calibration.corpus import render_chat
from qconv.calibration.documents import Document, documents
from qconv.chat.templates import ChatTemplates

FILE = 'import os\n\n\ndef twice(x):\n    """Two of it."""\n    return 2 * x\n\n\nprint(twice(os.getpid()))\n'


class Tokenizer:
    """What rendering takes of a tokenizer; arguments must be objects, as Qwen3-Coder's template wants them."""

    chat_template = (
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.name }}{% for k, v in c.function.arguments | items %}"
        " {{ k }}={{ v }}{% endfor %}>{% endfor %}{% endfor %}"
    )
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012


def test_calls_fit_the_tools_and_results_are_the_files_text() -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for seed in range(20):
        turns = conversation("a.py", FILE, seed)
        assert turns is not None
        calls = [call for turn in turns for call in turn.get("tool_calls", [])]
        results = {turn["tool_call_id"]: turn["content"] for turn in turns if turn["role"] == "tool"}
        assert sorted(results) == sorted(call["id"] for call in calls)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert list(arguments) == schemas[call["function"]["name"]]["required"]
        search, read = (results[call["id"]] for call in calls)
        assert search == "4: def twice(x):\n9: print(twice(os.getpid()))"
        assert read == 'def twice(x):\n    """Two of it."""\n    return 2 * x'
        assert turns[-1]["content"] == "`twice` in a.py, line 4: Two of it."
    made = [conversation("a.py", FILE, seed) for seed in range(20)]
    assert {len(turns or []) for turns in made} == {6, 7}  # both calls in one turn, or one after the other


def test_what_has_no_docstring_or_no_syntax_gives_none() -> None:
    assert conversation("a.py", "x = 1\n", 0) is None
    assert conversation("a.py", "def f(:\n", 0) is None
    assert conversation("a.py", "\0", 0) is None


def test_half_are_conversations_and_the_seed_decides() -> None:
    first = list(islice(documents("agent", 0), 40))
    assert first == list(islice(documents("agent", 0), 40))
    assert first != list(islice(documents("agent", 1), 40))
    chats = [one for one in first if isinstance(one.content, list)]
    assert 10 <= len(chats) <= 20  # every other one, less files without a docstring
    assert all(one.tools == TOOLS for one in chats)


def test_tools_and_arguments_are_rendered() -> None:
    chat = conversation("a.py", FILE, 0)
    assert chat is not None
    with ChatTemplates(Tokenizer(), "here") as chats:
        text = render_chat(chats, Document("a", chat, TOOLS))
    assert text.startswith("[read_file][search]")
    assert "<read_file path=a.py first_line=4 last_line=6>" in text
