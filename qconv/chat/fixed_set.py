"""The fixed set of chats by which two chat templates are compared: what agents and people send, each once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat of the set.

    Attributes:
        name: What it is an example of.
        messages: Its turns, in OpenAI's form with arguments as objects, which most templates are written for.
        tools: What may be called, in OpenAI's form; None for no tools.
        answer: Whether the text ends where the model's answer begins.
        variables: Further variables of the template.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    answer: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


def _tool(name: str, description: str, required: list[str], **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _call(number: int, name: str, arguments: Any) -> Mapping[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(number: int, name: str, content: str) -> Mapping[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": name, "content": content}


_SYSTEM = {"role": "system", "content": "You are a careful programmer."}
_USER = {"role": "user", "content": "What is in setup.py?"}
_ANSWER = {"role": "assistant", "content": "It lists the package's dependencies."}
_MORE = {"role": "user", "content": "And which are pinned?"}
_TOOLS = (
    _tool(
        "read_file",
        "Read lines of a file.",
        ["path"],
        path={"type": "string", "description": "Path within the project."},
        lines={"type": "array", "items": {"type": "integer"}, "description": "First and last line."},
    ),
    _tool(
        "search",
        "Find a text.",
        ["text"],
        text={"type": "string"},
        case_sensitive={"type": "boolean", "default": False},
        kind={"type": "string", "enum": ["code", "docs"]},
    ),
)
_READ = {"path": "setup.py", "lines": [1, 40]}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_call(1, "read_file", _READ)]}
_CALLING_TWICE = {
    "role": "assistant",
    "content": "I look at both.",
    "tool_calls": [
        _call(1, "read_file", _READ),
        _call(2, "search", {"text": 'a "b" <c>\n', "case_sensitive": True, "kind": "code"}),
    ],
}
_TEXTUAL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [_call(1, "read_file", '{"path": "setup.py", "lines": [1, 40]}')],
}
_READ_RESULT = _result(1, "read_file", "from setuptools import setup\n\nsetup(name='a')\n")
_FOUND = _result(2, "search", "")
_THOUGHT = {"role": "assistant", "content": "<think>\nA file.\n</think>\n\nIt lists dependencies."}

FIXED_SET = (
    Chat("plain", (_USER,)),
    Chat("no answer begun", (_USER, _ANSWER), answer=False),
    Chat("several turns", (_USER, _ANSWER, _MORE)),
    Chat("system", (_SYSTEM, _USER)),
    Chat("system message in the middle", (_USER, _ANSWER, _SYSTEM, _MORE)),
    Chat("tools", (_USER,), _TOOLS),
    Chat("tools and system", (_SYSTEM, _USER), _TOOLS),
    Chat("one tool", (_USER,), _TOOLS[:1]),
    Chat("tool result", (_USER, _CALLING, _READ_RESULT), _TOOLS),
    Chat("several calls in a turn", (_SYSTEM, _USER, _CALLING_TWICE, _READ_RESULT, _FOUND), _TOOLS),
    Chat("arguments as text", (_USER, _TEXTUAL, _READ_RESULT), _TOOLS),
    Chat("answer after a tool result", (_USER, _CALLING, _READ_RESULT, _ANSWER, _MORE), _TOOLS),
    Chat("Unicode", ({"role": "user", "content": "Größer als π? 漢字, עברית, e\u0301, 🙂, \u200b, <|im_end|>"},)),
    Chat("thinking", (_USER,), variables={"enable_thinking": True}),
    Chat("no thinking", (_USER,), variables={"enable_thinking": False}),
    Chat("an earlier turn's thoughts", (_USER, _THOUGHT, _MORE)),
)
"""Templates may refuse some; then both must."""
