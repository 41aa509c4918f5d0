"""``--rope``: builds have the YaRN that was asked for and the weights of those without, and checks expect it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.pipeline import quantize
from qconv.evaluation.packaging import compare_packaging
from qconv.formats.gguf.reader import GgufModel
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import load_recipe
from qconv.verification.build import verify as verify_build
from qconv.verification.gguf import verify_gguf
from tests.conftest import BUNDLED
from tests.gguf_copies import copied

ASKED = "yarn:4"
QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the bundled model in FP8: as it is, and with a longer context."""
    out = tmp_path_factory.mktemp("builds")
    for name, rope in (("plain", {}), ("longer", {"rope": ASKED})):
        quantize(BUNDLED, out / name, load_recipe("fp8", rope), **QUIET)
    return out / "plain", out / "longer"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "build"
    quantize_gguf(BUNDLED, out, GgufRecipe(type="Q8_0", rope=ASKED), **QUIET)
    return next(out.glob("*.gguf"))


def test_only_what_says_the_context_differs(builds: tuple[Path, Path]) -> None:
    plain, longer = ({one.name: one.read_bytes() for one in at.iterdir() if one.is_file()} for at in builds)
    differing = {name for name in plain | longer if plain.get(name) != longer.get(name)}
    assert differing == {"config.json", "README.md", "qconv-report.json", "SHA256SUMS"}
    assert json.loads(longer["qconv-report.json"])["recipe"]["rope"] == ASKED
    assert b"YaRN with a factor of 4" in longer["README.md"]
    assert "rope" not in json.loads(plain["qconv-report.json"])["recipe"]
    assert b"YaRN" not in plain["README.md"]


def test_checks_expect_what_was_asked_for(builds: tuple[Path, Path], file: Path) -> None:
    for build in (*builds, file, file.parent):
        verified = (verify_gguf if build.suffix == ".gguf" or build == file.parent else verify_build)(build, BUNDLED)
        assert verified.problems == []
        assert compare_packaging(build, BUNDLED).differences == []


def test_gguf_has_the_keys_that_llama_cpp_reads(file: Path) -> None:
    keys = GgufModel.open(file).metadata
    # src/llama-model.cpp: the context, and where its extension began.
    assert keys["qwen3moe.context_length"] == 16384
    assert keys["qwen3moe.rope.scaling.type"] == "yarn"
    assert keys["qwen3moe.rope.scaling.factor"] == 4.0
    assert keys["qwen3moe.rope.scaling.original_context_length"] == 4096


def _without_sums(build: Path, at: Path) -> Path:
    """A copy whose files may be changed: sums would find that before anything else does."""
    shutil.copytree(build, at)
    (at / "SHA256SUMS").unlink()
    return at


def test_a_factor_that_is_lost_is_named(builds: tuple[Path, Path], file: Path, tmp_path: Path) -> None:
    plain, longer = builds
    lost = _without_sums(longer, tmp_path / "lost")
    shutil.copy(plain / "config.json", lost)
    differences = compare_packaging(lost, BUNDLED).differences
    assert "rope: factor is none; the source's is 4.0, set on request" in differences
    assert any("rope_parameters" in problem for problem in verify_build(lost, BUNDLED).problems)
    copy = copied(file, tmp_path / file.name, {"qwen3moe.rope.scaling.factor": (2.0, GGUFValueType.FLOAT32)})
    shutil.copy(file.parent / "qconv-report.json", tmp_path)
    assert "rope: factor is 2.0; the source's is 4.0, set on request" in compare_packaging(copy, BUNDLED).differences
    problems = verify_gguf(copy, BUNDLED).problems
    assert problems == ["qwen3moe.rope.scaling.factor is 2, 4 in the source"]


def test_a_factor_that_nobody_asked_for_is_named(builds: tuple[Path, Path], tmp_path: Path) -> None:
    plain, longer = builds
    added = _without_sums(plain, tmp_path / "added")
    shutil.copy(longer / "config.json", added)
    assert "rope: factor is 4.0; the source's is none" in compare_packaging(added, BUNDLED).differences
    assert any("rope_parameters" in problem for problem in verify_build(added, BUNDLED).problems)


def test_a_report_that_asks_for_what_the_source_cannot_have(builds: tuple[Path, Path], tmp_path: Path) -> None:
    bad = _without_sums(builds[1], tmp_path / "bad")
    report = json.loads((bad / "qconv-report.json").read_text())
    report["recipe"]["rope"] = "yarn:nine"
    (bad / "qconv-report.json").write_text(json.dumps(report))
    assert any("recipe.rope does not fit the source" in one for one in verify_build(bad, BUNDLED).problems)
