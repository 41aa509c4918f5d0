"""What agents make models read: source files, and conversations in which an assistant reads and searches them.

Every conversation is about a real file: what the tools return is that file's text, and the answers are its own
docstrings. Its choices are drawn from the seed and the file's name, so that the same files give the same conversations.
"""

from __future__ import annotations

import ast
import json
import random
import warnings
from typing import Any

_LINES = 60
"""Of a file that one call returns."""
_FOUND = 8
"""Lines that a search returns at most."""

Use = tuple[str, dict[str, Any], str]
"""A tool's name, the arguments, and what it returns."""


def _tool(name: str, description: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: tuple[dict[str, Any], ...] = (
    _tool("read_file", "Return lines of a file.", path="string", first_line="integer", last_line="integer"),
    _tool("search", "Return the lines of a file that hold a text, with their numbers.", path="string", text="string"),
)
"""In OpenAI's form."""


def conversation(path: str, text: str, seed: int) -> list[dict[str, Any]] | None:
    """A conversation about a Python file, in OpenAI's form; None if no function or class of it has a docstring.

    Args:
        path: What the file is called in it.
        text: The file.
        seed: Of the choices.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody's literals
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError):
            return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    described = [(node, said) for node in nodes if isinstance(node, kinds) and (said := ast.get_docstring(node))]
    if not described:
        return None
    draw = random.Random(f"{seed}:{path}")
    node, said = draw.choice(described)
    lines = text.splitlines()
    last = min(node.end_lineno or node.lineno, node.lineno + _LINES - 1)
    found = [f"{number}: {line}" for number, line in enumerate(lines, start=1) if node.name in line][:_FOUND]
    search: Use = ("search", {"path": path, "text": node.name}, "\n".join(found))
    body = "\n".join(lines[node.lineno - 1 : last])
    read: Use = ("read_file", {"path": path, "first_line": node.lineno, "last_line": last}, body)
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a coding agent. Look at the files before you answer."},
        {"role": "user", "content": draw.choice(_QUESTIONS).format(name=node.name, path=path)},
    ]
    together = draw.random() < 0.5
    rounds: list[list[Use]] = [[search, read]] if together else [[search], [read]]
    for calls in rounds:
        made = [_call(name, arguments, draw) for name, arguments, _ in calls]
        turns.append({"role": "assistant", "content": "", "tool_calls": made})
        for call, (name, _, result) in zip(made, calls, strict=True):
            turns.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": result})
    return [*turns, {"role": "assistant", "content": f"`{node.name}` in {path}, line {node.lineno}: {said}"}]


_QUESTIONS = (
    "What does {name} in {path} do?",
    "Find {name} in {path} and explain it.",
    "I want to change {name} ({path}). What is it for?",
)


def _call(name: str, arguments: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{draw.getrandbits(32):08x}", "type": "function", "function": function}
