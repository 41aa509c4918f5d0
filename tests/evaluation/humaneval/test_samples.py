"""The journal of answers: read back as it was written; what qconv did not write there is named, never believed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qconv.errors import ArtifactError, StaleJournalError
from qconv.evaluation.humaneval.samples import JOURNAL_NAME, Journal, Sample
from qconv.evaluation.sandbox.verdict import Status

KEY = {"engine": "one"}
SAMPLE = Sample("HumanEval/0", 0, "return 1\n", (5, 6), "stop", Status.FAIL, "wrong")


def begun(folder: Path, *lines: bytes) -> Path:
    """A journal with one sample, and lines after it."""
    with Journal(folder, KEY) as journal:
        journal.add(SAMPLE)
    with (folder / JOURNAL_NAME).open("ab") as file:
        file.writelines(lines)
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with Journal(begun(tmp_path, b'{"task_id": "cut sho'), KEY) as journal:
        assert journal.samples == {("HumanEval/0", 0): SAMPLE}
    with pytest.raises(StaleJournalError, match="engine"):
        Journal(tmp_path, {"engine": "other"})


def line(**changes: Any) -> bytes:
    return json.dumps(asdict(SAMPLE) | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        b"x\n",
        b"5\n",
        b"[]\n",
        b"\n",
        b"\xe7\xff\n",
        b"[" * 10**5 + b"\n",
        b'{"task_id": "a"}\n',
        line(status="solved"),
        line(finish="never"),
        line(tokens=5),
        line(tokens=["a"]),
        line(sample="first"),
        line(text=None),
        line(surprise=1),
    ],
)
def test_a_damaged_line_is_named_with_a_remedy(tmp_path: Path, damage: bytes) -> None:
    begun(tmp_path, damage)
    with pytest.raises(ArtifactError, match=rf"{JOURNAL_NAME}: line 3") as caught:
        Journal(tmp_path, KEY)
    assert "Remove the file" in str(caught.value.hint)


@pytest.mark.parametrize("first", [b"5\n", b"[]\n", b"\xff\n"])
def test_a_damaged_first_line_is_named(tmp_path: Path, first: bytes) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(first)
    with pytest.raises(ArtifactError, match=rf"{JOURNAL_NAME}: line 1"):
        Journal(tmp_path, KEY)


def test_a_journal_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / JOURNAL_NAME)
    with pytest.raises(ArtifactError, match="is no file"):
        Journal(tmp_path, KEY)
