"""Renders chats by transformers, in a process that may be killed: the worker of :mod:`qconv.chat.templates`.

The first line of JSON on stdin names the template (or several, by name), the special tokens and the date; each line
after it is a chat. Each is answered by a line of JSON on stdout. Jinja's sandbox keeps a template from running code,
but not from looping or allocating without end: memory is limited here, time by whoever started this process.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any

MEMORY = 512 << 20
"""Bytes that rendering may take beyond what the interpreter and its modules do."""
LARGEST_TEXT = 64 << 20
"""Characters of one rendered chat."""
_SAID = 500


def main() -> None:
    """Serve until stdin ends."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing that a library prints may come between

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value).encode() + b"\n")
        out.flush()

    setup = json.loads(sys.stdin.buffer.readline())
    tokenizer = _bare_tokenizer(setup)
    _limit_memory()
    say({"ready": True})
    for line in sys.stdin.buffer:
        _limit_time(setup["seconds"])
        say(_rendered(tokenizer, json.loads(line)))


def _bare_tokenizer(setup: dict[str, Any]) -> Any:
    """What of a tokenizer rendering needs; all of transformers' handling of chats is in its base class."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    class Bare(PreTrainedTokenizerBase):
        special_tokens_map = setup["special_tokens"]

    if setup["date"]:
        fixed = datetime.datetime.fromisoformat(setup["date"])

        class Fixed(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Fixed:
                return cls(fixed.year, fixed.month, fixed.day, tzinfo=tz)

        untyped: Any = chat_template_utils
        untyped.datetime = Fixed  # what its strftime_now asks
    untyped_class: Any = Bare
    made = untyped_class(chat_template=setup["template"])
    # What rendering imports is imported before time and memory are counted.
    made.apply_chat_template([{"role": "user", "content": ""}], chat_template="{{ messages }}", tokenize=False)
    return made


def _limit_memory() -> None:
    """Bound what is allocated from here on."""
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Bound the processor time of a chat, in case that nobody is left to end this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft, hard = int(used.ru_utime + used.ru_stime) + seconds + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _rendered(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError

    try:
        text = tokenizer.apply_chat_template(
            request["messages"],
            tools=request["tools"],
            chat_template=request["name"],
            tokenize=False,
            add_generation_prompt=request["answer"],
            **request["variables"],
        )
        if len(text) > LARGEST_TEXT:
            return {"problem": "size"}
        return {"text": text}
    except MemoryError:
        return {"problem": "memory"}
    except TemplateSyntaxError as error:
        return {"problem": "syntax", "said": f"line {error.lineno}: {error.message}"[:_SAID]}
    # Whatever a template makes the library raise: it is the template's word on this chat.
    except Exception as error:
        return {"problem": "refused", "said": f"{type(error).__name__}: {error}"[:_SAID]}


if __name__ == "__main__":
    main()
