"""Suites and gates as anybody may write them: names lead nowhere, numbers have bounds, gates lie beside a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qconv.errors import UsageError
from qconv.evaluation.gates import GateFile, load_gates
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.suites import MAX_NAME_BYTES, Suite, gates_of, load_suite, parse_settings, shared_names
from qconv.evaluation.tasks import settings_of

TASK = {"kind": "text", "name": "text"}


def suite(**changes: Any) -> Suite:
    return parse_settings(Suite, {"tasks": [TASK], **changes}, "suite")


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        ".hidden",
        "../out",
        "/etc/out",
        "a/../../b",
        "a\\b",
        "a\n",
        "a\x00b",
        "a\x1b[2J",
        "\u202eb",
        " a",
        "",
        # One byte more than what leaves room for what a folder is called around a name.
        "n" * (MAX_NAME_BYTES + 1),
        7,
        None,
    ],
)
def test_a_task_whose_name_is_no_folder_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match="name"):
        suite(tasks=[TASK | {"name": name}])


@pytest.mark.parametrize("name", ["llama.cpp", "humaneval-sampled", "pass@1, k=2", "größer", "n" * MAX_NAME_BYTES])
def test_ordinary_names_are_names(name: str) -> None:
    ((_, settings),) = settings_of(suite(tasks=[TASK | {"name": name}]), "suite")
    assert settings.name == name


def test_names_that_a_file_system_may_hold_for_one_are_found() -> None:
    assert shared_names(["a", "b", "A"]) == ["A"]
    assert shared_names(["\u00e9", "e\u0301"]) == ["e\u0301"]
    with pytest.raises(UsageError, match="a name of its own"):
        suite(tasks=[TASK, TASK | {"name": "TEXT"}])


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1 << 63},  # what generators take has 64 bits, one of them a sign
        {"seed": -1},
        {"seed": True},
        {"seed": 0.5},
        {"engine": {"rows": 1 << 40}},
        {"engine": {"rows": float("inf")}},
        {"noise": {"tokens": 10**30}},
        {"noise": {"rows": float("nan")}},
        {"gates": "gates\x00.yaml"},
        {"gates": ""},
        {"tasks": [TASK | {"tokens": 10**30}]},
        {"tasks": [TASK | {"context": float("inf")}]},
        {"tasks": [TASK | {"corpus": "jsonl:a\x00b"}]},
        {"tasks": [TASK | {"stride": 0}]},
        {"tasks": []},
        {"tasks": "text"},
    ],
)
def test_settings_beyond_their_bounds_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        settings_of(suite(**changes), "suite tasks")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_mib": 1 << 40},  # beyond what setrlimit takes
        {"samples": 10**9, "temperature": 1.0},
        {"max_tokens": 1 << 40},
        {"cpu_seconds": 10**12},
        {"temperature": float("nan")},
        {"top_p": float("inf")},
        {"problems": True},
        {"name": "../x"},
    ],
)
def test_a_humaneval_task_has_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        parse_settings(HumanEvalSettings, changes, "task")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": [float("nan"), 4.0]}, "bits"),
        ({"bits": [4.0, 4.0]}, "bits"),
        ({"reference": {"ppl.ratio": 0.0}}, r"ppl\.ratio"),  # its logarithm is taken
        ({"reference": {"kld.mean": float("nan")}}, r"kld\.mean"),
        ({"baseline": {"kld.mean": float("inf")}}, r"kld\.mean"),
        ({"baseline": {"kld.mean": -1.0}}, r"kld\.mean"),
    ],
)
def test_gates_have_bounds(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_settings(GateFile, {"classes": [{"name": "any", "bits": [1, 40], **changes}]}, "gates")


def test_gates_without_a_class_are_none() -> None:
    with pytest.raises(UsageError, match="classes"):
        parse_settings(GateFile, {"classes": []}, "gates")


def test_a_suites_gates_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, alpha in (("here", 0.1), ("there", 0.2)):
        (tmp_path / folder).mkdir()
        classes = [{"name": "any", "bits": [1, 40]}]
        (tmp_path / folder / "mine.yaml").write_text(yaml.safe_dump({"alpha": alpha, "classes": classes}))
    (tmp_path / "there" / "suite.yaml").write_text(yaml.safe_dump({"tasks": [TASK], "gates": "mine.yaml"}))
    monkeypatch.chdir(tmp_path / "here")
    for source, beside in (("../there/suite.yaml", None), ("suite.yaml", tmp_path / "there")):
        assert load_gates(gates_of(load_suite(source, beside), source, beside)).alpha == 0.2
    packaged = load_suite("smoke", tmp_path / "there")
    assert gates_of(packaged, "smoke", tmp_path / "there") == "default"


@pytest.mark.parametrize(
    "text", ["tasks: 2001-13-45", "tasks: !!int x", "tasks: [", "a: &a [*a]", "[1]", "", "tasks: !!binary '=='"]
)
def test_a_file_that_is_no_suite_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml"):
        load_suite(str(path))


def test_aliases_that_stand_for_millions_of_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{one}: &a{one} [{', '.join([f'*a{one - 1}'] * 10)}]" for one in range(1, 9)]  # 10 ** 9 values
    path.write_text("tasks: [{kind: text, name: x}]\n" + "\n".join(lines))
    with pytest.raises(UsageError, match="aliases"):
        load_suite(str(path))


def test_of_many_wrong_keys_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({f"wrong{number}": 1 for number in range(1000)} | {"tasks": [TASK]}))
    with pytest.raises(UsageError, match=r"wrong0: unknown key.* and 995 more") as caught:
        load_suite(str(path))
    assert len(caught.value.message) < 500
