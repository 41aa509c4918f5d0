"""What the model reads, and what is taken out of its answer."""

from __future__ import annotations

import time

import pytest

from qconv.evaluation.engines.base import Prompt, stop_at
from qconv.evaluation.humaneval.dataset import Problem
from qconv.evaluation.humaneval.prompts import (
    COMPLETION_STOP,
    extract_code,
    program_of,
    render_prompt,
    stop_strings,
)

PROBLEM = Problem(
    task_id="HumanEval/0",
    prompt='from math import sqrt\n\n\ndef helper(x):\n    return x\n\n\ndef f(x):\n    """Twice x."""\n',
    entry_point="f",
    canonical_solution="    return 2 * x\n",
    test="def check(candidate):\n    assert candidate(2) == 4\n",
)
BODY = "    return helper(x) * 2\n"


def results(program: str) -> int:
    """f(21) of a program of this test."""
    namespace: dict[str, object] = {}
    exec(program, namespace)
    value = namespace["f"](21)  # type: ignore[operator]
    assert isinstance(value, int)
    return value


def test_a_completion_prompt_is_the_problem_itself() -> None:
    prompt = render_prompt(PROBLEM, "completion", None)
    assert (prompt.text, prompt.control_tokens, prompt.messages) == (PROBLEM.prompt, False, None)


def test_a_chat_prompt_is_rendered_and_keeps_its_messages() -> None:
    prompt = render_prompt(
        PROBLEM,
        "chat",
        lambda chat: Prompt(f"<user>{chat[0]['content']}<assistant>", control_tokens=True, messages=tuple(chat)),
    )
    assert prompt.control_tokens
    assert prompt.messages is not None
    assert prompt.text == f"<user>{prompt.messages[0]['content']}<assistant>"
    assert f"```python\n{PROBLEM.prompt.rstrip()}\n```" in prompt.text


def test_a_chat_needs_something_that_renders_it() -> None:
    with pytest.raises(ValueError, match="chat template"):
        render_prompt(PROBLEM, "chat", None)


@pytest.mark.parametrize(
    "rest", ["\ndef g():\n    pass", "\nclass A:", "\nprint(f(1))", "\nif True:", "\n# Test", "\n@cache", "\n```"]
)
def test_a_completion_ends_with_its_function(rest: str) -> None:
    assert stop_at(BODY + rest, stop_strings("completion")) == (BODY, True)
    assert program_of(PROBLEM, "completion", BODY + rest) == PROBLEM.prompt + BODY
    assert results(program_of(PROBLEM, "completion", BODY + rest)) == 42


@pytest.mark.parametrize("inside", ["    def g():\n        pass\n", "    # note\n", "    if x:\n        return 1\n"])
def test_indented_statements_do_not_end_it(inside: str) -> None:
    assert stop_at(inside, COMPLETION_STOP) == (inside, False)


def test_a_chat_answer_is_not_stopped() -> None:
    assert stop_strings("chat") == ()


FUNCTION = "def f(x):\n    return helper(x) * 2\n"
BODIED = FUNCTION.replace("\n    ", "\n       ")
ANSWERS = {
    "fenced": f"Here it is:\n\n```python\n{FUNCTION}```\nIt doubles.",
    "fenced without language": f"```\n{FUNCTION}```",
    "py": f"```py\n{FUNCTION}\n```",
    "bare": FUNCTION,
    "cut off": f"Sure!\n```python\n{FUNCTION}",
    "tests in a second block": f"```python\n{FUNCTION}```\nTest it:\n```python\nassert f(1) == 3\n```",
    "usage first": f"```sh\npip install x\n```\n```python\n{FUNCTION}```",
    "corrected": f"```python\ndef f(x): return 0\n```\nThat is wrong.\n```python\n{FUNCTION}```",
    "thought": f"<think>Maybe\n```python\ndef f(x): return 1\n```\n</think>\n```python\n{FUNCTION}```",
    "thought without its start": f"Hm, def f(x): return 1\n</think>\n```python\n{FUNCTION}```",
    "body alone": f"```python\n{BODY}```",
    "with helpers and imports": "```python\nimport math\ndef g(x): return 2 * x\ndef f(x):\n    return g(x)\n```",
    "a name bound": "```python\nf = lambda x: 2 * x\n```",
    "no start": f"{FUNCTION}```",
    "no start and text behind": f"{FUNCTION}```\nThat doubles it.",
    "no start, then an example": f"{FUNCTION}```\nUse it:\n```python\nprint(f(1))\n```",
    "an end on the last line of the code": f"```python\n{FUNCTION.rstrip()}```\nDone.",
    "neither start nor a line for the end": f"{FUNCTION.rstrip()}```",
    "text before the fence": f"Here: ```python\n{FUNCTION}```\nDone.",
    "text before a bare fence": f"Here: ```\n{FUNCTION}```",
    "text behind the end": f"```python\n{FUNCTION}``` That is all.",
    "in a list": f"1. This:\n\n   ```python\n   {BODIED}   ```\n2. Done.",
    "in a list's line": f"- ```python\n  {BODIED.replace(chr(10) + '  ', chr(10) + ' ')}  ```",
    "in a list, the code at the margin": f"1. This:\n\n   ```python\n{FUNCTION}   ```\n",
    "behind a tab": f"\t```python\n{FUNCTION}\t```",
    "quoted": "> ```python\n" + "".join(f"> {line}\n" for line in FUNCTION.splitlines()) + "> ```\nDone.",
    "tildes": f"~~~python\n{FUNCTION}~~~\n",
    "tildes around backticks": f"~~~python\n{FUNCTION}# ```\n~~~\nand ```\nno code\n```",
    "four": f"````python\n{FUNCTION}````\n",
    "four around three": '````python\ndef f(x):\n    """\n```\nf(1)\n```\n    """\n    return 2 * x\n````\n',
    "four and three": f"````python\n{FUNCTION}```\nDone.",
    "attributes": f'```python title="a.py" {{1,2}}\n{FUNCTION}```',
    "capital": f"```Python\n{FUNCTION}```",
    "a fence in the docstring": f'```python\ndef f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n{BODY}```',
    "never closed, then another": f"```python\nprint(1)\n```python\n{FUNCTION}```",
    "prose alone before it": f"The function is:\n\n{FUNCTION}",
    "inline code before it": f"Use `f` and ``g`` or ```h```:\n```python\n{FUNCTION}```",
    "body at the margin": "```python\nreturn helper(x) * 2\n```",
    "body without a start": f"{BODY}```",
    "inline code on its line": f"Use `f` so: ```python\n{FUNCTION}```",
    "an empty block first": f"```\n```\n```python\n{FUNCTION}```",
    "windows line ends throughout": f"Here:\n```python\n{FUNCTION}```\nDone.\n".replace("\n", "\r\n"),
    "windows line ends": f"```python\r\n{FUNCTION}```".replace("\n", "\r\n"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_the_code_is_found_in_a_chat_answer(answer: str) -> None:
    assert results(program_of(PROBLEM, "chat", answer)) == 42


@pytest.mark.parametrize(
    "line", ["~~~ " * 20_000 + "`", "` " * 20_000, "> " * 20_000, "```" + " ~" * 20_000, "- " * 20_000]
)
def test_taking_an_answer_apart_takes_time_in_proportion(line: str) -> None:
    began = time.process_time()
    for answer in (line, f"{line}\n" * 5, f"```\n{line}", line.replace(" ", "\n")):
        extract_code(answer, "f")
    assert time.process_time() - began < 5.0, "0.8 s at most when measured; a pattern that goes back takes minutes"


def test_inline_code_is_no_block() -> None:
    assert extract_code("Use `f` and ``g``.", "f") == "Use `f` and ``g``."
