"""The run record: what is written is what is read, content is addressed by hash, damage is found."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.kept_files import FILES_FOLDER, load_arrays, load_json, store, store_arrays, store_json
from qconv.evaluation.metrics import column
from qconv.evaluation.record import RUN_NAME, Artifact, Item, Metric, Run, Task, Verdict, read_run, write_run
from qconv.folders.journal import WORK_FOLDER

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
    other = run.tasks[0].model_copy(update={"items": (Item(name="a.py", values={"tokens": 4.0, "nll": 0.1 + 0.2}),)})
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


def test_a_record_of_numbers_that_json_lacks_is_the_same_run_when_it_is_read(tmp_path: Path) -> None:
    """What a build of broken weights gives: it must be reported, and be known again."""
    items = (Item(name="a.py", values={"tokens": 3.0, "nll": math.inf}),)
    run = example(tasks=(example().tasks[0].model_copy(update={"items": items}),))
    write_run(tmp_path, run)
    found = read_run(tmp_path)
    assert column(found.tasks[0].items, "nll").tolist() == [math.inf]
    assert found.digest == run.digest


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tokens": lambda run: run["tasks"][0]["items"][0]["values"].pop("tokens"),
    "no nll": lambda run: run["tasks"][0]["items"][0]["values"].pop("nll"),
    "tokens of text": lambda run: run["tasks"][0]["items"][0]["values"].update(tokens="many"),
    "tokens of nothing": lambda run: run["tasks"][0]["items"][0]["values"].update(tokens=0.0),
    "tokens without end": lambda run: run["tasks"][0]["items"][0]["values"].update(tokens=math.inf),
    "tokens below nothing": lambda run: run["tasks"][0]["items"][0]["values"].update(tokens=-1.0),
    "items of unlike columns": lambda run: run["tasks"][0]["items"].append({"name": "b", "values": {"tokens": 1.0}}),
    "items as a number": lambda run: run["tasks"][0].update(items=5),
    "one task twice": lambda run: run["tasks"].append(run["tasks"][0]),
    "a metric of nothing": lambda run: run["tasks"][0]["metrics"].update({"kld.mean": {"value": 1.0}}),
    "another unit": lambda run: run["tasks"][0].update(unit="problem"),
    "a file elsewhere": lambda run: run["tasks"][0].update(files={"tokens": file("../../../../dev/zero")}),
    "a file of another name": lambda run: run["tasks"][0].update(files={"tokens": file(f"{SHA}/../x")}),
    "a file below nothing": lambda run: run["tasks"][0].update(files={"tokens": file(f"{SHA}.json", size=-1)}),
    "a size as a string of digits": lambda run: run["build"].update(size="9" * 400),
    "a size beyond every file": lambda run: run["build"].update(size=1 << 63),
    "no verdict": lambda run: run.pop("verdict"),
    "a verdict that is none": lambda run: run["verdict"].update(outcome="fine"),
    "a hash that is none": lambda run: run.update(suite_sha256="0"),
    "another version": lambda run: run.update(schema_version=2),
}


def file(name: str, size: int = 1) -> dict[str, object]:
    return {"name": name, "sha256": SHA, "size": size}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_with_a_remedy(tmp_path: Path, damage: str) -> None:
    write_run(tmp_path, example())
    values = json.loads((tmp_path / RUN_NAME).read_text())
    DAMAGES[damage](values)
    (tmp_path / RUN_NAME).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"run\.json") as caught:
        read_run(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xe7\xff", b"[" * 10**5, b'{"seed": ' + b"9" * 5000 + b"}", b'"\\ud800"']
)
def test_a_record_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / RUN_NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"run\.json"):
        read_run(tmp_path)


def test_a_record_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RUN_NAME)
    with pytest.raises(ArtifactError, match="is no file"):
        read_run(tmp_path)


def test_a_file_that_is_none_any_more_is_damaged(tmp_path: Path) -> None:
    kept = store_json(tmp_path, {"a": 1})
    path = tmp_path / FILES_FOLDER / kept.name
    path.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        load_json(tmp_path, kept)
    path.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="damaged"):
        load_json(tmp_path, kept)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="damaged"):
        load_json(tmp_path, kept)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no arrays",
        struct.pack("<Q", 1 << 60) + b"{}",
        # bfloat16, which NumPy does not have
        struct.pack("<Q", 57) + b'{"kl": {"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}' + b"xx",
    ],
)
def test_arrays_that_are_none_are_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArtifactError, match="holds no arrays"):
        load_arrays(tmp_path, store(tmp_path, data, ".safetensors"))


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        load_json(tmp_path, store(tmp_path, b"{", ".json"))
