"""The run record: what is written is what is read, content is addressed by hash, damage is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.record import (
    FILES_FOLDER,
    RUN_NAME,
    Artifact,
    Item,
    Metric,
    Run,
    Task,
    Verdict,
    load_arrays,
    load_json,
    read_run,
    store_arrays,
    store_json,
    write_run,
)
from qconv.manifest import WORK_FOLDER

SHA = "0" * 64


def example(**changes: object) -> Run:
    values: dict[str, object] = {
        "qconv": "0",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "command": ("qconv", "eval", "run", "b"),
        "build": Artifact(name="b", path="/b", kind="build", sha256=SHA),
        "reference": None,
        "suite": "smoke",
        "suite_sha256": SHA,
        "engine": {"engine": "local"},
        "versions": {},
        "device": {},
        "seed": 0,
        "tasks": (
            Task(
                name="stdlib",
                kind="text",
                inputs_sha256=SHA,
                source="text",
                unit="document",
                settings={"context": 512},
                metrics={"ppl": Metric(value=40.0, low=39.0, high=41.0)},
                items=(Item(name="a.py", values={"tokens": 3.0, "nll": 0.1 + 0.2}),),
            ),
        ),
        "verdict": Verdict(outcome="not gated", sentence="measured"),
    }
    return Run.model_validate(values | changes)


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    run = example()
    write_run(tmp_path, run)
    assert read_run(tmp_path) == read_run(tmp_path / RUN_NAME) == run
    assert read_run(tmp_path).digest == run.digest


def test_numbers_that_json_lacks_are_read_as_unknown(tmp_path: Path) -> None:
    task = example().tasks[0].model_copy(update={"metrics": {"ppl": Metric(value=math.inf)}})
    write_run(tmp_path, example(tasks=(task,)))
    json.loads((tmp_path / RUN_NAME).read_text(), parse_constant=pytest.fail)
    assert read_run(tmp_path).tasks[0].metrics["ppl"].value is None


def test_the_digest_is_that_of_the_results_alone() -> None:
    run = example()
    assert example(started="later", seconds=2.0, command=("x",)).digest == run.digest
    elsewhere = run.build.model_copy(update={"path": "/elsewhere"})
    assert example(build=elsewhere).digest == run.digest
    assert example(seed=1).digest != run.digest
    other = run.tasks[0].model_copy(update={"items": (Item(name="a.py", values={"tokens": 4.0}),)})
    assert example(tasks=(other,)).digest != run.digest


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("regression", 3), ("inconclusive", 4), ("corrupt", 5)])
def test_exit_codes_are_the_documented_ones(outcome: str, code: int) -> None:
    assert Verdict.model_validate({"outcome": outcome, "sentence": ""}).exit_code == code


def test_a_record_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path, example())
    values = json.loads((tmp_path / RUN_NAME).read_text())
    values["build"]["surprise"] = 1
    (tmp_path / RUN_NAME).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"build\.surprise"):
        read_run(tmp_path)


def test_no_run_and_an_unfinished_run_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as absent:
        read_run(tmp_path)
    (tmp_path / WORK_FOLDER).mkdir()
    with pytest.raises(ArtifactError) as unfinished:
        read_run(tmp_path)
    assert "not finished" not in str(absent.value)
    assert "not finished" in str(unfinished.value)


def test_arrays_are_kept_once_and_bit_for_bit(tmp_path: Path) -> None:
    # A transposed array has other strides, which a careless writer stores as they are.
    arrays = {"nll": np.arange(6, dtype=np.float32).reshape(2, 3).T, "agree": np.array([True, False])}
    first, second = store_arrays(tmp_path, arrays), store_arrays(tmp_path, arrays)
    assert first == second
    assert len(list((tmp_path / FILES_FOLDER).iterdir())) == 1
    found = load_arrays(tmp_path, first)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    file = store_json(tmp_path, {"completion": "äöü"})
    assert load_json(tmp_path, file) == {"completion": "äöü"}
    path = tmp_path / FILES_FOLDER / file.name
    path.write_bytes(path.read_bytes().replace(b"completion", b"completiom"))
    with pytest.raises(ArtifactError, match="damaged"):
        load_json(tmp_path, file)
