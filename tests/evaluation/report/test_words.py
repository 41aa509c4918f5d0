"""Every metric that a run records has a plain name; a task of any kind may bring its own, and none gets lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.divergence import TokenScores
from qconv.evaluation.gates import METRICS
from qconv.evaluation.metrics import Scores, text_metrics
from qconv.evaluation.record import Item, Metric, Run, Task, Unmeasured
from qconv.evaluation.report.overview import overview
from qconv.evaluation.report.page import html, markdown
from qconv.evaluation.report.view import view
from qconv.evaluation.report.words import Words, headlines, sign, words
from tests.evaluation.report.conftest import SHA, Write


def measured() -> dict[str, Metric]:
    """Every metric of a text task."""
    ones, flags = np.ones(4, dtype=np.float32), np.ones(4, dtype=np.bool_)
    names: dict[str, Any] = {field: flags if field == "agree" else ones for field in TokenScores.__slots__}
    values = dict.fromkeys(("tokens", "bytes", "nll", "reference_nll", "kl", "kl_high", "flips", "delta_p2"), 1.0)
    return text_metrics(
        [Item(name=str(index), values=values) for index in range(4)], Scores(ones, TokenScores(**names))
    )


def test_every_metric_of_ours_has_a_name_and_a_meaning() -> None:
    found = measured()
    assert len(found) > 10
    for name in (*found, *METRICS, "pass@10"):
        for prefix in ("", "reference.", "noise.", "rounded_inputs."):
            told = words(f"{prefix}{name}")
            assert told.meaning, name
            assert not {".", "_", "@"} & set(told.name.replace("99.9th", "")), told.name
    assert words("kld.mean").unit == "nats a token"
    assert words("noise.top1.flips", "nats").form == "share", "an old record's unit does not count"


def test_other_metrics_are_shown_under_their_own_name() -> None:
    assert words("valid_calls", "share") == Words("valid calls", form="share")
    assert words("kld.arguments", "nats") == Words("kld.arguments", "", "nats")
    own = {"kld.arguments": Words("Divergence within arguments", "Of tool calls.", "nats a token")}
    assert words("kld.arguments", "nats", own).name == "Divergence within arguments"
    assert words("reference.kld.arguments", "nats", own).name == "Divergence within arguments, of the reference"


def test_a_sign_is_never_a_colour_alone() -> None:
    signs = {
        status: sign(status) for status in ("pass", "fail", "inconclusive", "not measured", "regression", "corrupt")
    }
    assert len({mark for mark, _ in signs.values()}) == 4
    assert all(word for _, word in signs.values())
    assert sign("something new") == ("?", "something new")


def own_kind(**details: Any) -> Task:
    """A task of a kind that this version does not know."""
    return Task(
        name="calls",
        kind="toolcalls",
        inputs_sha256=SHA,
        source="conversations with tools",
        unit="problem",
        settings={},
        metrics={
            "conversations": Metric(value=50.0),
            "valid": Metric(value=0.96, low=0.9, high=0.99, unit="share", better="higher", units=50),
            "kld.arguments": Metric(value=0.0123, low=0.011, high=0.013, unit="nats", better="lower", units=50),
        },
        items=(Item(name="a", values={"samples": 1.0, "passed": 1.0}),),
        details=details,
    )


def test_a_task_of_another_kind_shows_without_being_known(tmp_path: Path, write: Write) -> None:
    details = {
        "words": {"valid": {"name": "Calls that parse", "meaning": "Share of the calls whose arguments fit."}},
        "tables": [
            {"title": "By tool", "columns": ["tool", "calls"], "rows": [["grep", 12], ["ls", None]], "note": "n"}
        ],
    }
    run = write()
    runs = [run.model_copy(update={"tasks": (run.tasks[0], own_kind(**details))}) for _ in range(2)]
    views = [view(tmp_path / "run", one, name=name) for one, name in zip(runs, "ab", strict=True)]
    page, text = html(views), markdown(views)
    for told in ("Calls that parse", "96.0 %", "0.0123"):
        assert told in page
        assert told in text
    assert "Share of the calls whose arguments fit." in page
    assert "<th>tool</th><th>calls</th>" in page
    assert "<td>grep</td><td>12.0</td>" in page
    (matrix,) = overview(views).matrices
    assert ("Calls that parse", "calls") in matrix.head
    assert headlines(own_kind()) == ("valid", "kld.arguments"), "what can be better or worse"
    assert headlines(Unmeasured(name="calls", kind="toolcalls", reason="none")) == ()


@pytest.mark.parametrize(
    "details",
    [
        {"words": 5},
        {"words": {"valid": {"meaning": "no name"}}},
        {"tables": {}},
        {"tables": [{"title": "t", "columns": ["a"], "rows": [["x", "y"]]}]},
        {"tables": [{"title": "t", "columns": ["a"], "rows": [[{}]]}]},
    ],
)
def test_details_that_are_damaged_are_named(tmp_path: Path, write: Write, details: Any) -> None:
    run: Run = write()
    with pytest.raises(ArtifactError, match="task calls: its details are damaged"):
        view(tmp_path / "run", run.model_copy(update={"tasks": (own_kind(**details),)}))
