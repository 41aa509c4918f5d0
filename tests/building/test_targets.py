"""What a run asks of targets: any that answers is built, in the order of layers, and goes on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.source import Source
from qconv.building.inputs import merged
from qconv.building.output import Outcome, publish
from qconv.building.run import make_builds
from qconv.building.several import enter_all
from qconv.building.target import LayerSink, Means
from qconv.calibration.corpus import TokenSet
from qconv.calibration.layer import LayerBuild
from qconv.core.architecture import Layer
from qconv.core.workers import Workers
from qconv.errors import OutputError
from qconv.folders.part import Part
from qconv.folders.state import FolderState
from qconv.planning.costs import Demand


class Listing:
    """A target that writes a file for each layer, and does not look at any."""

    def __init__(self, source: Source, out: Path, name: str = "") -> None:
        self.source, self.name, self.folder = source, name, out / name
        self.weights = len(source.architecture.layers)
        self.calibration = None
        self.calibrates = False
        self.share = None
        self.demand = Demand(0)
        self.told: list[str] = []

    def allowance(self, workers: int) -> float:
        return math.inf

    def names(self) -> list[str]:
        return [f"{layer.index}.txt" for layer in self.source.architecture.layers]

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        return {"recipe": "listing"}

    def check(self, means: Means) -> None:
        self.told.append("check")

    def needed(self, committed: Collection[str], work: Path) -> int:
        return 10 * (self.weights - len(committed))

    def looks_again(self, committed: Collection[str]) -> bool:
        return False

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        return {name: lambda: "same" for name in self.names()}

    def standing(self, committed: Collection[str]) -> str:
        return f"{len(committed)} files"

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        raise AssertionError("it has no checksums")

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> Lister:
        assert tokens is None
        return Lister(self, part, show)


class Lister:
    """It at work."""

    def __init__(self, target: Listing, part: Part, show: Callable[[str], None]) -> None:
        self.target, self.part, self.show, self.done = target, part, show, 0

    def pending(self, layer: Layer) -> bool:
        raise AssertionError("it does not look at layers")

    doing: Any = pending
    build: Any = pending
    sink: Callable[[Layer], LayerSink] = pending  # type: ignore[assignment]

    def before_layers(self) -> None:
        self.target.told.append("before")

    def after_layer(self, layer: Layer) -> None:
        self.show(f"layer {layer.index}")
        name = f"{layer.index}.txt"
        if name not in self.part.units:
            publish(self.target.folder, self.part, {name: b"made"})
            self.part.commit(name, {"read": "same"})
            self.target.told.append(name)
        self.done += 1

    def after_layers(self) -> None:
        self.target.told.append("after")

    def settle(self) -> None:
        self.target.told.append("settled")

    def finish(self) -> Outcome:
        return Outcome(self.target.folder, {}, already_complete=False)


def make(source: Source, targets: list[Listing], out: Path, **options: Any) -> list[Outcome]:
    values: dict[str, Any] = {"restart": False, "threads": 1, "progress": lambda *_: None, "log": lambda _: None}
    return make_builds(source, targets, out, **values | options)


class Stop(Exception):
    """The plug is pulled."""


def test_a_target_is_asked_in_order_and_goes_on_where_it_was_stopped(moe: Path, tmp_path: Path) -> None:
    source, out, shown = Source.open(moe), tmp_path / "out", list[tuple[str, int, int]]()

    def stop(what: str, done: int, total: int) -> None:
        if what == "layer 1":
            raise Stop

    first = Listing(source, out)
    with pytest.raises(Stop):
        make(source, [first], out, progress=stop)
    assert first.told == ["check", "before", "0.txt"]
    second, said = Listing(source, out), list[str]()
    make(source, [second], out, progress=lambda *one: shown.append(one), log=said.append)
    assert second.told == ["before", "1.txt", "after", "settled"]
    assert said == ["resuming: 1 files"]
    assert shown == [("layer 0", 0, 2), ("layer 1", 1, 2), ("finishing", 2, 2)]
    assert {path.name for path in out.iterdir()} == {"0.txt", "1.txt"}


def test_several_have_folders_and_share_progress(moe: Path, tmp_path: Path) -> None:
    source, out, shown = Source.open(moe), tmp_path / "out", list[tuple[str, int, int]]()
    targets = [Listing(source, out, name) for name in ("a", "b")]
    outcomes = make(source, targets, out, progress=lambda *one: shown.append(one))
    assert [outcome.out for outcome in outcomes] == [out / "a", out / "b"]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.txt")) == [
        "a/0.txt",
        "a/1.txt",
        "b/0.txt",
        "b/1.txt",
    ]
    assert shown[:2] == [("a/layer 0", 0, 4), ("b/layer 0", 1, 4)]


def test_what_no_run_of_these_builds_began_stays(moe: Path, tmp_path: Path) -> None:
    source, out = Source.open(moe), tmp_path / "out"
    make(source, [Listing(source, out, name) for name in ("a", "b")], out)
    with pytest.raises(OutputError, match="holds a, b, which no run began"):
        make(source, [Listing(source, out, name) for name in ("a", "b")], out)


def test_fingerprints_of_several_are_named_where_they_are_each_ones_own() -> None:
    shared = {"weights": "w", "versions": "qconv=1"}
    first, second = (
        shared | {"recipe": "r", "calibration data": "d"},
        shared | {"recipe": "s", "calibration data": "none"},
    )
    assert merged({"": first}) == first
    assert merged({"a": first, "b": second}) == {
        **shared,
        "recipe of a": "r",
        "recipe of b": "s",
        "calibration data": "d none",
    }


@pytest.mark.parametrize(
    ("made", "state"),
    [
        ([], FolderState.EMPTY),
        (["a/"], FolderState.EMPTY),  # killed before its first line
        ([".qconv/"], FolderState.EMPTY),
        (["a/", "b/", ".qconv/journal.jsonl"], FolderState.UNFINISHED),
        (["a/SHA256SUMS", "a/qconv-report.json", "b/", ".qconv/journal.jsonl"], FolderState.UNFINISHED),
        ([f"{name}/{file}" for name in "ab" for file in ("SHA256SUMS", "qconv-report.json")], FolderState.COMPLETE),
        (["a/SHA256SUMS", "a/qconv-report.json"], None),
        (["a/notes.txt"], None),
        (["c/"], None),
        (["notes.txt"], None),
    ],
    ids=str,
)
def test_what_the_folder_of_several_holds(made: list[str], state: FolderState | None, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    if state is None:
        with pytest.raises(OutputError):
            enter_all(tmp_path, ["a", "b"], restart=False)
    else:
        assert enter_all(tmp_path, ["a", "b"], restart=False) is state
    assert LayerBuild.__eq__ is object.__eq__, "builds are told apart by identity"
