"""Regular expressions in bounded time: what ``re`` says, and what it would never have said."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.boundary.patterns import MAX_DEPTH, MAX_LENGTH, MAX_REPEATS, Pattern, PatternError

NAME = "blk.0.ffn_down_exps.weight"


def slow(text: str) -> Pattern:
    """A pattern without the way over Python's engine."""
    parsed = Pattern.parse(text)
    return Pattern(text, None, parsed._root)


@pytest.mark.parametrize(
    "text",
    [
        "ffn_down",
        "blk.0.*",
        r"blk\.(0|1)\.attn_(k|v)",
        r"^blk\.\d+\.ffn_.*_exps\.weight$",
        "(?:gate|up)_exps",
        "blk.[0-4].",
        "[^a-z]0",
        r"blk\.(?!1\.).*down",
        "(?=.*down)blk",
        r"\bffn\b|\Ablk",
        "f{2}n{0,1}?",
        "{}",
        "",
    ],
)
def test_it_says_what_re_says(text: str) -> None:
    for name in (NAME, "blk.1.attn_k.weight", "output.weight", "blk.0.attn_q.bias\n", ""):
        for pattern in (Pattern.parse(text), slow(text)):
            assert pattern.search(name) == bool(re.search(text, name))
            assert pattern.match(name) == bool(re.match(text, name))


@given(st.text("ab.*+?|()[]^$\\d{}1,-", max_size=9), st.text("ab.1\n(", max_size=6))
def test_it_says_what_re_says_of_any_pattern(text: str, name: str) -> None:
    try:
        pattern = slow(text)
    except PatternError:
        return
    compiled = re.compile(text.replace("[[", r"[\["))  # which re warns of
    assert pattern.search(name) == bool(compiled.search(name))
    assert pattern.match(name) == bool(compiled.match(name))


@pytest.mark.parametrize(
    "text", ["([a-z_.0-9]+)+#", "((((.*)*)*)*)*#", "(a|a)*b", "(.?){100}#", "(.*)(.*)(.*)(.*)(.*)#"]
)
def test_no_pattern_takes_long(text: str) -> None:
    start = time.perf_counter()
    assert not Pattern.parse(text).search("a" * 63)
    # The first takes Python's engine minutes, and these some milliseconds each.
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(", r"a group without \)"),
        ("a)", r"an unmatched \)"),
        ("[a", "it ends too early"),
        ("a\\", "it ends too early"),
        ("*a", "nothing to repeat"),
        ("^*", "nothing to repeat"),
        ("a**", "several repeats in a row"),
        ("a++", "several repeats in a row"),
        (r"(a)\1", r"\\1, which is not read"),
        ("(?<=a)b", r"\(\?<, which is not read"),
        ("(?i)a", r"\(\?i, which is not read"),
        ("(?P<n>a)", r"\(\?P, which is not read"),
        ("[b-a]", "a range from 'b' to 'a'"),
        ("a{2,1}", "at least 2 and at most 1"),
        (f"a{{{MAX_REPEATS + 1}}}", "more than 100 repeats"),
        ("a{1,99999999999999999999}", "more than 100 repeats"),
        ("(" * (MAX_DEPTH + 1) + ")" * (MAX_DEPTH + 1), "more than 20 groups"),
        ("a" * (MAX_LENGTH + 1), "at most 1000 are read"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        Pattern.parse(text)
