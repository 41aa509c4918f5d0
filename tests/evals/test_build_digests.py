"""The table of hashes: every recipe and type is in it, and a comparison names whatever is not as it was."""

from __future__ import annotations

from pathlib import Path

from evals.build_digests import OF_THE_RUN, Table, Variant, build, differences, hashed, variants
from evals.recipes import general_recipes
from qconv.formats.gguf.mixture import FILE_TYPES


def table(arithmetic: str = "a", **hashes: dict[str, str]) -> Table:
    return Table(arithmetic, "some processor", hashes)


def test_every_packaged_recipe_and_every_type_is_built_once() -> None:
    names = [one.name for one in variants()]
    assert len(names) == len(set(names))
    assert names[0] == "imatrix"  # others take it from there
    assert {f"recipe {name}" for name in general_recipes()} | {f"gguf {name}" for name in FILE_TYPES} <= set(names)


def test_what_tells_of_the_run_is_not_hashed(tmp_path: Path) -> None:
    (tmp_path / "qconv-scales").mkdir()
    for name in (*OF_THE_RUN, "config.json", "qconv-scales/layer-00000.safetensors"):
        (tmp_path / name).write_text(name)
    assert list(hashed(tmp_path)) == ["config.json", "qconv-scales/layer-00000.safetensors"]


def test_equal_tables_have_no_differences() -> None:
    assert not list(differences(table(x={"f": "1"}), table(x={"f": "1"})))


def test_other_bytes_files_builds_and_arithmetic_are_named() -> None:
    before = table(x={"f": "1", "gone": "1"}, old={})
    after = table("b", x={"f": "2", "new": "1"}, young={})
    assert list(differences(before, after)) == [
        "the arithmetic is b (some processor), not a (some processor): calibrated builds may differ for that alone",
        "old: only before",
        "x: f has other bytes",
        "x: gone is there only before",
        "x: new is there only now",
        "young: only now",
    ]
    assert [line for line in differences(before, after, ["x"]) if line.startswith(("old", "young"))] == []


def test_a_build_that_fails_has_no_hashes(bundled: Path, tmp_path: Path) -> None:
    assert build(Variant("unknown", ("--fmt", "gguf:Q9_K")), bundled, tmp_path) is None


def test_a_build_is_hashed(bundled: Path, tmp_path: Path) -> None:
    found = build(Variant("recipe fp8", ("--recipe", "fp8")), bundled, tmp_path)
    assert found is not None
    assert {"config.json", "model-00001-of-00006.safetensors"} <= found.keys()
