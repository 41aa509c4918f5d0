"""Mixtures of corpora: proportions, what each gives, what the experts saw of each, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.calibration.corpus import build_tokens, load_tokenizer, used_documents
from qconv.calibration.mixture import corpus_coverage, origins, part_of, parts, seen_by_corpus
from qconv.cli.options import corpus_of
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.errors import RecipeError, UsageError
from qconv.evaluation.text import calibrated_on
from qconv.planning.recipe import Recipe, load_recipe, parse_recipe
from tests.conftest import BUNDLED, build

LENGTH = 32
MIXED = [{"corpus": "python-stdlib", "weight": 0.6}, {"corpus": "agent", "weight": 0.4}]


def text(corpus: object, sequences: int = 10) -> TextSettings:
    return TextSettings.model_validate({"corpus": corpus, "tokens": sequences * LENGTH, "sequence_length": LENGTH})


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=4), st.integers(64, 200))
def test_every_beginning_has_about_the_proportions(weights: list[float], count: int) -> None:
    corpora = [{"corpus": f"text:{number}", "weight": weight} for number, weight in enumerate(weights)]
    try:
        found = origins(text(corpora, count))
    except UsageError:
        assert min(weights) / sum(weights) * count < 1  # less than a sequence's worth
        return
    for stop in range(1, count + 1):
        given = torch.bincount(found[:stop], minlength=len(weights))
        for had, weight in zip(given.tolist(), weights, strict=True):
            # Never a whole sequence ahead; how far behind, others' turns decide.
            assert -1.0 < weight / sum(weights) * stop - had < len(weights) - 1


def test_each_corpus_gives_what_it_gives_alone() -> None:
    settings = text(MIXED)
    mixed, of = build_tokens(settings, BUNDLED), origins(settings)
    assert torch.bincount(of).tolist() == [6, 4]
    for number, share in enumerate(settings.shares):
        alone = build_tokens(text(share.corpus, int((of == number).sum())), BUNDLED)
        assert torch.equal(mixed.ids[of == number], alone.ids)
        assert set(alone.documents) <= set(mixed.documents)
    assert mixed.source.startswith("0.6*python-stdlib + 0.4*agent, seed 0: 10 x 32 tokens of ")


def test_one_corpus_is_what_it_was() -> None:
    plain = CalibrationSettings()
    for corpus in ([{"corpus": "python-stdlib", "weight": 0.3}], "python-stdlib"):
        settings = CalibrationSettings.model_validate({"corpus": corpus})
        assert settings == plain
        assert settings.model_dump() == plain.model_dump()
    assert "sequences" not in plain.model_dump()
    assert parts(plain) == [plain]
    assert seen_by_corpus(plain, torch.arange(9)) == {}
    # Of a recipe from before there were mixtures: what builds of today name in their journals.
    assert load_recipe("awq", {"calibration.corpus": corpus}).digest() == load_recipe("awq").digest()


def test_a_recipe_of_a_mixture_is_written_and_read_back() -> None:
    recipe = parse_recipe({"calibration": {"corpus": MIXED, "sequences": "documents"}})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert json.loads(recipe.model_dump_json())["calibration"]["corpus"] == MIXED
    assert recipe.digest() != parse_recipe({"calibration": {"corpus": MIXED[::-1], "sequences": "documents"}}).digest()


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "each once"),
        ([{"corpus": "agent"}, {"corpus": "agent", "weight": 2.0}], "each once"),
        ([{"corpus": "agent", "weight": 0.0}, {"corpus": "text:x"}], "greater than 0"),
        ([{"corpus": "agent", "share": 1.0}], "unknown key"),
    ],
    ids=["none", "twice", "no weight", "unknown"],
)
def test_mixtures_that_are_none(corpus: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"calibration": {"corpus": corpus}})


def test_a_weight_that_gives_nothing_is_named() -> None:
    with pytest.raises(UsageError, match=r"agent, of weight 0\.001, gives none of 10 sequences"):
        build_tokens(text([{"corpus": "python-stdlib"}, {"corpus": "agent", "weight": 0.001}]), BUNDLED)


def test_a_corpus_that_is_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(): return 1\n")
    with pytest.raises(UsageError, match=r"short.txt holds \d+ tokens"):
        build_tokens(text([{"corpus": "python-stdlib"}, {"corpus": f"text:{tmp_path}/short.txt"}]), BUNDLED)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["agent"], "agent"),
        (["0.6*agent"], "agent"),
        (["text:2*3.txt"], "text:2*3.txt"),
        (
            ["0.6*python-stdlib", "agent"],
            [{"corpus": "python-stdlib", "weight": 0.6}, {"corpus": "agent", "weight": 1.0}],
        ),
        ([".5*a", "2*b"], [{"corpus": "a", "weight": 0.5}, {"corpus": "b", "weight": 2.0}]),
    ],
)
def test_the_command_line_says_the_same(given: list[str], expected: object) -> None:
    assert corpus_of(given) == expected


def test_sequences_of_one_document_each(tmp_path: Path) -> None:
    names = ("alpha", "beta", "gamma")
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"{name} = {name}\n" * 40)
    (tmp_path / "short.txt").write_text("short\n")
    values = {"corpus": f"text:{tmp_path}", "tokens": 6 * LENGTH, "sequence_length": LENGTH}
    tokens = build_tokens(TextSettings.model_validate({**values, "sequences": "documents"}), BUNDLED)
    tokenizer = load_tokenizer(BUNDLED)
    held = [[name for name in (*names, "short") if name in tokenizer.decode(row)] for row in tokens.ids]
    assert all(len(one) == 1 for one in held), held
    assert sorted(itertools.chain(*held)) == sorted(2 * names)  # round by round, and what is too short not at all
    assert sorted(tokens.documents) == sorted(f"{name}.txt" for name in names)
    packed = build_tokens(TextSettings.model_validate(values), BUNDLED)
    assert any(len({name for name in names if name in tokenizer.decode(row)}) > 1 for row in packed.ids)


def test_the_report_says_what_experts_saw_of_each(tmp_path: Path, moe: Path) -> None:
    values = {"corpus": MIXED, "tokens": 10 * LENGTH, "sequence_length": LENGTH}
    recipe = load_recipe(
        "awq", {f"calibration.{key}": value for key, value in values.items()} | {"grid.group_size": 32}
    )
    outcome = build(moe, tmp_path / "out", recipe)
    experts = [one for layer in outcome.report["layers"] for one in layer["experts"]]
    assert experts
    for one in experts:
        assert sum(one["tokens_by_corpus"]) == one["tokens"]
    layer = outcome.report["layers"][0]["experts"]
    routed = [one for one in layer if ".experts." in one["module"]]
    chosen = sum(one["tokens"] for one in routed) // (10 * LENGTH)
    # Every token goes to as many experts, and six sequences of ten are the first corpus's.
    totals = [sum(column) for column in zip(*(one["tokens_by_corpus"] for one in routed), strict=True)]
    assert totals == [6 * LENGTH * chosen, 4 * LENGTH * chosen]
    coverage = outcome.report["coverage"]["by_corpus"]
    assert [one["corpus"] for one in coverage] == ["python-stdlib", "agent"]
    for number, one in enumerate(coverage):
        seen = [expert["tokens_by_corpus"][number] for expert in experts if ".experts." in expert["module"]]
        assert (one["least"], one["most"]) == (min(seen), max(seen))
        assert one["without_tokens"] == seen.count(0)
    assert "| agent | 0.4 |" in (outcome.out / "README.md").read_text()
    assert corpus_coverage(CalibrationSettings(), experts) == {}


def test_what_a_mixture_took_is_left_out_of_evaluation(tmp_path: Path, moe: Path) -> None:
    values = {"corpus": MIXED, "tokens": 10 * LENGTH, "sequence_length": LENGTH}
    recipe = load_recipe(
        "awq", {f"calibration.{key}": value for key, value in values.items()} | {"grid.group_size": 32}
    )
    out = build(moe, tmp_path / "out", recipe).out
    alone = part_of(text(MIXED), "python-stdlib")
    assert alone is not None
    assert calibrated_on(out, "python-stdlib", moe) == set(used_documents(alone, load_tokenizer(moe), moe))
    assert not calibrated_on(out, "text:other", moe)
