"""From a problem to what the model reads, and from what it wrote to a program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from qconv.evaluation.engines.base import Prompt, stop_at
from qconv.evaluation.humaneval.dataset import Problem
from qconv.evaluation.humaneval.fences import take_apart

Style: TypeAlias = Literal["completion", "chat"]
Message: TypeAlias = dict[str, str]
Render: TypeAlias = Callable[[Sequence[Message]], Prompt]
"""A chat as the model reads it, up to where its answer begins."""

COMPLETION_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
"""The function is over at the next statement without indentation. The first five are Chen et al. 2021, section 3.1."""
INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function, and the imports that it needs, in one "
    "code block.\n\n```python\n{prompt}\n```"
)
_THOUGHT = re.compile(r"\A.*?</think>", re.DOTALL)
_CODE = re.compile(r"^(?:from +[\w.]+ +import\b|import +\w|(?:async +)?def +\w+ *\(|class +\w+ *[:(]|@\w)", re.M)
"""How a line of code begins that prose does not begin with."""


def render_prompt(problem: Problem, style: Style, render: Render | None) -> Prompt:
    """What the model reads.

    Raises:
        ValueError: a chat without anything that renders it.
    """
    if style == "completion":
        return Prompt(problem.prompt)
    if render is None:
        raise ValueError("chat prompts need a chat template")
    message = {"role": "user", "content": INSTRUCTION.format(prompt=problem.prompt.rstrip())}
    return render([message])


def stop_strings(style: Style) -> tuple[str, ...]:
    """Where generation may end. A chat answer ends by itself: it may have several functions."""
    return COMPLETION_STOP if style == "completion" else ()


def program_of(problem: Problem, style: Style, answer: str) -> str:
    """The source that is judged."""
    if style == "completion":
        # An endpoint may have ignored the stop strings.
        return problem.prompt + stop_at(answer, COMPLETION_STOP)[0]
    code = extract_code(answer, problem.entry_point)
    if not _defines(code, problem.entry_point):  # only the body
        return problem.prompt + (code if code.lstrip("\n")[:1].isspace() else textwrap.indent(code, "    "))
    # Helpers and imports of the prompt that the answer does not repeat.
    return f"{problem.preamble}\n{code}"


def extract_code(answer: str, entry_point: str) -> str:
    """The code in a chat's answer: the last fenced block that defines the function, else the first block, else all.

    A block that is cut off by the length counts, and so does one that only its end marks as such. What a model thought
    aloud before ``</think>`` does not.
    """
    found = take_apart(_THOUGHT.sub("", answer))
    blocks = [block for block in found.blocks if block.strip()]
    defining = [block for block in blocks if _defines(block, entry_point)]
    if defining:
        return defining[-1]
    if blocks and not _defines(found.before, entry_point):
        return blocks[0]
    begin = _CODE.search(found.before)
    return found.before[begin.start() :] if begin and _defines(found.before, entry_point) else found.before


def _defines(code: str, entry_point: str) -> bool:
    return (
        re.search(rf"^(?:async )?def {re.escape(entry_point)}\b|^{re.escape(entry_point)} *=", code, re.M) is not None
    )
