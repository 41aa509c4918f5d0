"""Names from outside, shown."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qconv.boundary.printable import markdown_block, markdown_code, markdown_text, name_of, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("mod\u00e8le \u6a21\u578b \U0001f469\u200d\U0001f4bb", "mod\u00e8le \u6a21\u578b \U0001f469\u200d\U0001f4bb"),
        ("a\x1b]0;t\x07b", "a\\x1b]0;t\\x07b"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("a\x9bb", "a\\x9bb"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_acts_is_an_escape(name: str, shown: str) -> None:
    assert printable(name) == shown


@given(st.text(st.characters(categories=("Cc", "Cf", "Cs", "L", "N", "S", "Zl", "Zp"))))
def test_nothing_that_acts_is_left(text: str) -> None:
    shown = printable(text)
    assert all(one == "\u200d" or unicodedata.category(one)[0] != "C" for one in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()


def test_what_is_to_be_kept_is() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_long_name_is_cut_in_its_middle() -> None:
    assert name_of("a" * 300 + "z" * 300, 9) == "aaa...zzz"
    assert name_of("short") == "short"


@pytest.mark.parametrize(
    "name",
    [
        *("# head", "[a](http://b)", "<script>x</script>", "a\n\n# b", "`x`", "*x*", "![i](j)", "&lt;", "_x_", "~~x~~"),
        *("- item", "+ item", "1. item", "23) item", "===", "---", "www.example.com", "http://a.b", "me@example.com"),
    ],
)
def test_markdown_shows_the_name_and_nothing_else(name: str) -> None:
    tokens = MarkdownIt("commonmark").parse(markdown_text(name))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == printable(name)


@pytest.mark.parametrize("address", ["www.example.com", "see www.a.b", "http://a.b", "me@example.com"])
def test_what_sites_turn_into_links_by_themselves_is_escaped(address: str) -> None:
    # The autolinks of GitHub's Markdown look for these in the text as it is written.
    assert not re.search(r"www\.|[^\\]://|[^\\]@", markdown_text(address))


def test_an_ordinary_name_stays_as_it_is() -> None:
    for name in (
        "tiny-coder-moe",
        "Qwen3-Coder-480B-A35B",
        "python-stdlib, seed 0: 8 x 32 tokens of 3 documents (a)",
        *("pass@1", "0.001 (0.0009 to 0.0011)", "1.5"),
    ):
        assert markdown_text(name) == name


@pytest.mark.parametrize("name", ["a", "`", "a`b", "``a", "a\n# b", "a\n```\n# b", "```"])
def test_code_is_one_piece(name: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"It is {markdown_code(name)} here.")
    (code,) = (child for child in tokens[1].children or [] if child.type == "code_inline")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert code.content == printable(name)


@pytest.mark.parametrize("text", ["a: 1\n", "```\n# b\n", "a\n````\n~~~\n", "\x1b[2J\n"])
def test_a_block_of_code_is_one_piece(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(markdown_block(text, "yaml") + "\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == printable(text, keep="\n")
