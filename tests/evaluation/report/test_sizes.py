"""The chart of divergence against size: every build has its mark, no name lies on another, any number has a place."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from qconv.evaluation.report.charts import WIDTH
from qconv.evaluation.report.sizes import HEIGHT, LONGEST, Build, kld_by_size

OUTCOMES = ("pass", "regression", "inconclusive", "corrupt", "not gated")


def build(name: str = "awq", size: float = 9e6, kld: float = 0.001, **changes: object) -> Build:
    values = {"low": kld * 0.9, "high": kld * 1.1, "outcome": "pass", **changes}
    return Build(name, size, kld, **values)  # type: ignore[arg-type]


def marks(made: str) -> list[tuple[str, float, float]]:
    """Class and place of every mark."""
    found = re.findall(r'class="point (\w+)" d="M(-?[\d.]+) (-?[\d.]+)', made)
    return [(style, float(x), float(y)) for style, x, y in found]


def test_less_divergence_is_lower_and_more_bytes_are_farther_right() -> None:
    made = kld_by_size([build("a", 5e6, 0.004), build("b", 9e6, 0.0002), build("c", 16e6, 0.001)])
    (_, a_x, a_y), (_, b_x, b_y), (_, c_x, c_y) = marks(made)
    assert a_x < b_x < c_x
    assert a_y < c_y < b_y
    assert made.count('class="whisker"') == 3


def test_nothing_and_limits_have_their_places() -> None:
    made = kld_by_size([build(kld=0.0, low=0.0, high=0.0), build(kld=0.01, limit=0.05), build(kld=0.0001, limit=9.0)])
    assert ">0</text>" in made
    assert made.count('class="limit"') == 1, "what is far away is told in the table alone"
    assert max(y for *_, y in marks(made)) == marks(made)[0][2], "0 is the lowest"


def test_outcomes_have_shapes_of_their_own_and_other_tools_a_grey() -> None:
    styles = [style for style, *_ in marks(kld_by_size([build(outcome=outcome) for outcome in OUTCOMES]))]
    assert styles == ["pass", "fail", "unsure", "fail", "open"]
    others = kld_by_size([build(other=True), build(other=True, outcome="regression"), build(outcome="regression")])
    assert [style for style, *_ in marks(others)] == ["other", "other", "fail"]
    shapes = [re.sub(r"-?[\d.]+", "", shape) for shape in re.findall(r'class="point \w+" d="([^"]+)"', others)]
    assert shapes[0] != shapes[1] == shapes[2]


@given(
    st.lists(
        st.builds(
            Build,
            name=st.text(max_size=60),
            size=st.floats(min_value=1.0, max_value=1e15),
            kld=st.floats(min_value=0.0, max_value=1e300),
            low=st.none() | st.floats(min_value=-1.0, max_value=1e300),
            high=st.none() | st.floats(min_value=0.0, max_value=1e300),
            outcome=st.sampled_from(OUTCOMES),
            limit=st.none() | st.floats(min_value=0.0, max_value=1e300),
            other=st.booleans(),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_any_builds_have_a_chart(builds: list[Build]) -> None:
    made = kld_by_size(builds)
    assert "nan" not in made.replace("nats", "")
    found = marks(made)
    assert len(found) == len(builds)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for _, x, y in found)


def test_names_are_escaped_and_short() -> None:
    made = kld_by_size([build("<a>" * 30), build("b", 10e6)])
    tree = ElementTree.fromstring(made)
    names = [one.text or "" for one in tree.iter("text") if one.get("class") == "name"]
    assert max(map(len, names)) == LONGEST
    assert any(one.endswith("…") for one in names)
