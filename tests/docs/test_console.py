"""What is read of a page, and when something printed is what the page shows."""

from __future__ import annotations

import pytest

from tests.docs.console import Command, commands, is_shown

PAGE = """Words.

```console
$ one --option
first
...
$ two    # with a word
```

   ```console
   $ three
   ```

```bash
$ none
```
"""


def test_commands_are_those_of_console_blocks() -> None:
    found = list(commands(PAGE))
    assert found == [
        Command("one --option", ("first", "...")),
        Command("two    # with a word", ()),
        Command("three", ()),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "fits"),
    [
        (("a", "b"), "a\nb\n", True),
        (("a", "b"), "a\nc\nb\n", False),
        (("a", "...", "b"), "a\nc\nd\nb\n", True),
        (("...", "b"), "a\nb\nc\n", False),
        (("...", "b", "..."), "a\nb\nc\n", True),
        (("size ... MB",), "size 9.3 MB\n", True),
        (("size ... MB",), "size 9.3 GB\n", False),
        (("a+b",), "aab\n", False),
        ((), "anything\n", True),
        (("a",), "", False),
    ],
)
def test_dots_stand_for_anything(shown: tuple[str, ...], printed: str, fits: bool) -> None:
    assert is_shown(shown, printed) is fits
