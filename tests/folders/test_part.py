"""A build's part of a journal: its own keys and files, whoever else writes there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.checkpoint.reader import Checkpoint
from qconv.checkpoint.writer import ShardRecord
from qconv.folders.journal import Journal
from qconv.folders.ownership import WORK_FOLDER, claimed
from qconv.folders.part import Part, key_of, own
from qconv.folders.readings import SourceRecord


@pytest.fixture
def record(moe: Path, tmp_path: Path) -> SourceRecord:
    """Of a run that has just begun."""
    journal = Journal.create(tmp_path / WORK_FOLDER / "journal.jsonl", {"weights": "w"})
    return SourceRecord(Checkpoint.open(moe), journal, {})


FILES = {"files": [{"name": "model.safetensors", "size": 3, "sha256": "a" * 64}]}


def test_parts_do_not_see_each_other_and_the_only_one_has_everything(record: SourceRecord) -> None:
    awq, gguf, whole = Part(record, "awq"), Part(record, "gguf"), Part(record)
    awq.announce([ShardRecord("model.safetensors", 3, "a" * 64)])
    awq.commit("layer-00000", FILES)
    gguf.note("layer-00000", {"size": 1})
    assert awq.units == {"layer-00000": FILES}
    assert gguf.units == {"layer-00000": {"size": 1}}
    assert awq.files == {"model.safetensors": frozenset({"a" * 64})}
    assert gguf.files == {}
    assert list(whole.units) == ["awq/layer-00000", "gguf/layer-00000"]
    assert list(whole.files) == ["awq/model.safetensors"]
    read = Journal.load(record.journal.path)
    assert read is not None
    assert (read.units, read.files) == (record.journal.units, record.journal.files)


def test_one_builds_journal_is_what_it_was_without_parts(record: SourceRecord) -> None:
    Part(record).commit("layer-00000", FILES)
    assert record.journal.units == {"layer-00000": FILES}
    assert Part(record).scratch("blocks") == record.journal.path.parent / "blocks"


def test_files_of_the_work_folder_do_not_meet_and_are_claimed(record: SourceRecord) -> None:
    paths = {Part(record, name).staged("config.json") for name in ("", "awq", "gguf")}
    assert len(paths) == 3
    assert {path.name for path in paths} < claimed(record.journal.path.parent).keys()


def test_a_name_that_begins_another_is_not_taken_for_it() -> None:
    values = {key_of("awq", "one"): 1, key_of("awq-2", "two"): 2}
    assert own(values, "awq") == {"one": 1}
    assert own(values, "") == values
