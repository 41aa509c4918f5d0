"""The journal after crashes, and the lock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qconv.errors import ArtifactError, OutputError, StaleJournalError
from qconv.folders.journal import Journal, locked, require_same
from tests.conftest import REPOSITORY

FINGERPRINTS = {"weights": "a" * 64, "recipe": "b" * 64, "calibration data": "none", "versions": "qconv=1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The journal of a run with two units."""
    path = tmp_path / "out/.qconv/journal.jsonl"
    path.parent.mkdir(parents=True)
    journal = Journal.create(path, FINGERPRINTS)
    journal.commit("embeddings", {"files": [], "snr_db": {}})
    journal.commit_activations(0, 10, "c" * 64)
    journal.commit("layer-00000", {"files": [{"name": "x", "size": 1, "sha256": "d" * 64}]})
    journal.commit_activations(1, 20, "e" * 64)
    return path


def load(path: Path) -> Journal:
    """A journal that is there."""
    journal = Journal.load(path)
    assert journal is not None
    return journal


def test_what_was_written_is_read(path: Path) -> None:
    journal = load(path)
    assert journal.fingerprints == FINGERPRINTS
    assert list(journal.units) == ["embeddings", "layer-00000"]
    assert journal.units["layer-00000"] == {"files": [{"name": "x", "size": 1, "sha256": "d" * 64}]}
    assert list(journal.activations) == [1]  # those of layer 0 are gone by now
    assert journal.activations[1]["size"] == 20


def test_no_journal_is_none(tmp_path: Path) -> None:
    assert Journal.load(tmp_path / "journal.jsonl") is None


def test_a_crash_at_any_byte_loses_at_most_the_line_being_written(path: Path) -> None:
    content = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        journal = Journal.load(path)
        whole = sum(end <= length for end in ends)
        if whole == 0:
            assert journal is None
        else:
            assert journal is not None
            assert len(journal.units) == (whole >= 2) + (whole >= 4)
        # What is left is whole lines, so that the next line starts on its own.
        assert path.read_bytes() == content[: ends[whole - 1] if whole else 0]


def test_a_torn_journal_goes_on(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"kind":"unit","un')
    load(path).commit("head", {"files": []})
    assert list(load(path).units) == ["embeddings", "layer-00000", "head"]


@pytest.mark.parametrize("line", [0, 1, 3])
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"7", b"null", b"{}", b'{"kind":"other"}', b'{"kind":"unit"}', b"\xff\xfe"]
)
def test_a_damaged_line_is_named(path: Path, line: int, damage: bytes) -> None:
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ArtifactError, match=f"line {line + 1} is damaged") as caught:
        Journal.load(path)
    assert str(path) in caught.value.message
    assert "--restart" in (caught.value.hint or "")


@pytest.mark.parametrize("key", FINGERPRINTS)
def test_a_stale_journal_says_what_changed(path: Path, key: str) -> None:
    journal = load(path)
    journal.require(FINGERPRINTS)
    with pytest.raises(StaleJournalError) as caught:
        journal.require(FINGERPRINTS | {key: "something else"})
    message = caught.value.message
    assert f"{key} changed" in message
    assert "something el" in message
    assert str(path.parent.parent) in message
    assert not [other for other in FINGERPRINTS if other != key and f"{other}:" in message]
    assert caught.value.exit_code == 5


def test_every_difference_is_named(tmp_path: Path) -> None:
    with pytest.raises(StaleJournalError, match=r"new, recipe, weights changed .*new: none there, 1 now"):
        require_same(tmp_path, FINGERPRINTS, FINGERPRINTS | {"weights": "0", "recipe": "0", "new": "1"})


HOLD = """
import sys
from pathlib import Path
from qconv.folders.journal import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_keeps_other_processes_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another qconv process"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            assert list(tmp_path.iterdir()) == []  # the lock leaves no file


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="absent"), locked(tmp_path / "absent"):
        pass


def test_lines_are_json_without_times(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert not {"time", "date", "seconds", "duration"} & json.loads(line).keys()


def test_a_line_whose_text_was_changed_is_named_though_it_is_what_qconv_might_write(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    for old, new in ((b'"size":1', b'"size":2'), (b'"x"', b'"y"'), (b'"files":[', b'"fyles":['), (b"0000", b"0001")):
        assert old in lines[3]
        path.write_bytes(b"\n".join([*lines[:3], lines[3].replace(old, new, 1), lines[4]]) + b"\n")
        with pytest.raises(ArtifactError, match="line 4 is damaged: it does not have its checksum"):
            Journal.load(path)


@pytest.mark.parametrize("fingerprints", [5, [], {"weights": 5}, {"weights": None}, None])
def test_fingerprints_that_are_no_text_are_damage(path: Path, fingerprints: object) -> None:
    lines = path.read_bytes().splitlines()
    lines[0] = json.dumps({"kind": "start", "fingerprints": fingerprints}).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ArtifactError, match="line 1 is damaged"):
        Journal.load(path)


def test_a_line_of_brackets_is_damage(path: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"\n")  # beyond the parser's recursion limit
    with pytest.raises(ArtifactError, match="line 1 is damaged"):
        Journal.load(path)


def test_a_folder_in_the_journals_place_is_an_error_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        Journal.load(tmp_path)


@pytest.mark.parametrize(
    ("found", "wanted", "there", "now"),
    [
        # The versions that are equal are left out, and the others are whole however long they are.
        (
            "machine=x86_64 qconv=0.1.0",
            "machine=x86_64 qconv=0.1.0.dev2026",
            "qconv=0.1.0 there",
            "qconv=0.1.0.dev2026",
        ),
        ("machine=x86_64", "machine=x86_64 transformers=5.0", "transformers=none", "transformers=5.0"),
        ("a" * 64, "b" * 64, "a" * 12 + " there", "b" * 12 + " now"),
        # Digests joined by a plus that differ in the second one alone.
        ("a" * 64 + "+" + "b" * 64, "a" * 64 + "+" + "c" * 64, "b" * 64, "c" * 64),
        ("some words", "some words more", "some words there", "some words more now"),
    ],
)
def test_what_is_shown_of_two_values_tells_them_apart(
    tmp_path: Path, found: str, wanted: str, there: str, now: str
) -> None:
    with pytest.raises(StaleJournalError) as caught:
        require_same(tmp_path, {"key": found}, {"key": wanted})
    _, _, shown = caught.value.message.partition("(key: ")
    left, _, right = shown.partition(" there, ")
    assert left != right.removesuffix(" now).")
    assert there in shown
    assert now in shown
    assert "x86_64" not in shown


def test_another_arithmetic_is_named_with_the_processors(tmp_path: Path) -> None:
    there, now = {"arithmetic": "cpu=aa", "processor": "EPYC"}, {"arithmetic": "cpu=bb", "processor": "Xeon"}
    with pytest.raises(StaleJournalError, match=r"arithmetic: cpu=aa \(EPYC\) there, cpu=bb \(Xeon\) now"):
        require_same(tmp_path, there, now)
    require_same(tmp_path, there, now, ignored=["arithmetic"])
    require_same(tmp_path, there, {"arithmetic": "cpu=aa", "processor": "Xeon"})  # another name of the same arithmetic
