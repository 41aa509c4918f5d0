"""A build of a size in one run: the same bytes however often it is stopped, and what it says of its choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconv.building import sized_pipeline
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.pipeline import quantize
from qconv.building.sensitivity_pipeline import measure_sensitivity
from qconv.building.sized_pipeline import quantize_to_size
from qconv.core.settings import TextSettings
from qconv.errors import Interrupted, StaleJournalError, UsageError
from qconv.folders.journal import WORK_FOLDER
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.planning.recipe import Recipe, parse_recipe
from qconv.sensitivity.allocating import Request, Target
from qconv.sensitivity.palettes import AnyRecipe
from tests.conftest import folder_bytes, random_model, save_model

TEXT: dict[str, Any] = {"tokens": 256, "sequence_length": 32}
QUIET: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
GGUF = parse_gguf_recipe({"type": "Q4_K_M", "calibration": TEXT, "output": {"max_shard_size": 10**6}})
W4A16 = parse_recipe({"format": "w4a16", "method": "gptq", "calibration": TEXT})
BUILDS: dict[str, tuple[AnyRecipe, Request]] = {
    "gguf": (GGUF, Request(Target(bits=4.5))),
    "gguf without gradients": (GGUF, Request(Target(size=1_500_000), ("IQ*",), gradients=False)),
    "w4a16": (W4A16, Request(Target(bits=4.6))),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every type and group fits."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_experts": 4}
    made = random_model("qwen3_moe", norm_topk_prob=True, **sizes)
    return save_model(made, tmp_path_factory.mktemp("sized") / "model", "4MB")


@pytest.fixture(scope="module", params=BUILDS)
def case(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, a request and the folder of an undisturbed run; do not write to it."""
    recipe, wanted = BUILDS[request.param]
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize_to_size(model, out, recipe, wanted, **QUIET)
    return recipe, wanted, out


def report_of(model: Path, out: Path, recipe: AnyRecipe, wanted: Request) -> dict[str, Any]:
    """Of a finished build, which is found to be whole."""
    outcome = quantize_to_size(model, out, recipe, wanted, **QUIET)
    assert outcome.already_complete
    return outcome.report


def test_stopped_at_every_step_it_ends_with_the_same_bytes(case: Any, model: Path, tmp_path: Path) -> None:
    recipe, wanted, undisturbed = case
    stopped: set[str] = set()

    def progress(what: str, done: int, total: int) -> None:
        if what not in stopped:
            stopped.add(what)
            raise Interrupted(2)

    for _ in range(100):
        try:
            quantize_to_size(model, tmp_path / "out", recipe, wanted, **(QUIET | {"progress": progress}))
        except Interrupted:
            continue
        break
    assert {"forward through layer 1", "choosing grids"} <= stopped
    assert ("back through layer 0" in stopped) == wanted.gradients
    assert len(stopped) > 8
    assert folder_bytes(tmp_path / "out") == folder_bytes(undisturbed)
    assert not (tmp_path / "out" / WORK_FOLDER).exists()


def test_the_recipe_makes_the_same_weights_without_the_choice(case: Any, model: Path, tmp_path: Path) -> None:
    recipe, wanted, undisturbed = case
    values = report_of(model, undisturbed, recipe, wanted)["recipe"]
    if isinstance(recipe, Recipe):
        quantize(model, tmp_path / "out", parse_recipe(values), **QUIET)
    else:
        quantize_gguf(model, tmp_path / "out", parse_gguf_recipe(values), **QUIET)
    one, other = (folder_bytes(folder) for folder in (undisturbed, tmp_path / "out"))
    assert one.keys() == other.keys()
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"README.md", "SHA256SUMS", "qconv-report.json"}


def test_the_report_says_what_was_chosen_and_why(case: Any, model: Path) -> None:
    recipe, wanted, undisturbed = case
    found = report_of(model, undisturbed, recipe, wanted)["allocation"]
    assert found["excluded_types"] == list(wanted.excluded)
    assert found.get("target_bits") == wanted.target.bits
    assert found.get("target_size") == wanted.target.size
    assert ("predicted_kld" in found) == wanted.gradients
    assert ("predicted_relative_error" in found) != wanted.gradients
    assert "## Choice" in (undisturbed / "README.md").read_text()
    # Every layer and role once, and all together what the linears of the layers have.
    shown = report_of(model, undisturbed, recipe, wanted)["bits_by_layer"]
    assert [layer["layer"] for layer in shown] == [0, 1]
    assert all(2.0 < bits < 9.0 for layer in shown for bits in layer["roles"].values())
    assert len({bits for layer in shown for bits in layer["roles"].values()}) > 1
    files = [*undisturbed.glob("*.safetensors"), *undisturbed.glob(f"{model.name}*.gguf")]
    total = sum(file.stat().st_size for file in files)
    if wanted.target.size is not None:
        assert 0.97 * wanted.target.size < total <= wanted.target.size  # eleven tensors, some of a tenth of the model


def test_another_request_is_not_continued(case: Any, model: Path, tmp_path: Path) -> None:
    recipe, wanted, undisturbed = case
    other = Request(Target(bits=7.0), wanted.excluded, wanted.gradients)
    without = Request(wanted.target, ("int4-g32",) if recipe is W4A16 else ("Q6_K",), wanted.gradients)

    def stop(what: str, done: int, total: int) -> None:
        if what == "choosing grids":
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        quantize_to_size(model, tmp_path / "out", recipe, wanted, **(QUIET | {"progress": stop}))
    for out in (undisturbed, tmp_path / "out"):
        with pytest.raises(StaleJournalError, match="recipe"):
            quantize_to_size(model, out, recipe, other, **QUIET)
        with pytest.raises(StaleJournalError, match="recipe"):
            quantize_to_size(model, out, recipe, without, **QUIET)
    again = quantize_to_size(model, tmp_path / "out", recipe, other, restart=True, **QUIET)
    assert again.report["allocation"]["target_bits"] == 7.0


def test_what_was_chosen_is_not_chosen_again(
    case: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, wanted, undisturbed = case

    def stop(what: str, done: int, total: int) -> None:
        if what in ("layer-00001", "calibrating layer 1"):
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        quantize_to_size(model, tmp_path / "out", recipe, wanted, **(QUIET | {"progress": stop}))
    kept = {path.name for path in (tmp_path / "out" / WORK_FOLDER / "sensitivity").iterdir()}
    assert kept == {".qconv-files", "journal.jsonl"}, "what the pass kept is gone once its choice is safe"

    def never(*_: object) -> None:
        raise AssertionError("chosen again")

    monkeypatch.setattr(sized_pipeline, "allocate", never)
    monkeypatch.setattr(sized_pipeline, "sweep", never)
    quantize_to_size(model, tmp_path / "out", recipe, wanted, **QUIET)
    assert folder_bytes(tmp_path / "out") == folder_bytes(undisturbed)


def test_a_given_sensitivity_is_an_input(model: Path, tmp_path: Path) -> None:
    text, request = TextSettings(**TEXT), Request(Target(bits=4.5))
    for seed in (0, 1):
        measure_sensitivity(model, tmp_path / f"s{seed}", text.model_copy(update={"seed": seed}), **QUIET)
    given = quantize_to_size(model, tmp_path / "given", GGUF, request, sensitivity=tmp_path / "s0", **QUIET)
    itself = quantize_to_size(model, tmp_path / "itself", GGUF, request, **QUIET)
    assert given.report["recipe"] == itself.report["recipe"]
    assert given.report["allocation"]["predicted_kld"] == itself.report["allocation"]["predicted_kld"]
    with pytest.raises(StaleJournalError, match="sensitivity"):
        quantize_to_size(model, tmp_path / "given", GGUF, request, sensitivity=tmp_path / "s1", **QUIET)


@pytest.mark.parametrize("recipe", [GGUF, W4A16], ids=["gguf", "w4a16"])
def test_rows_that_the_usual_blocks_and_groups_do_not_divide(recipe: AnyRecipe, tmp_path: Path) -> None:
    """As SmolLM2: a dense model, hidden size 576, its head the embedding."""
    sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 192, "head_dim": 64, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    source = save_model(random_model("llama", **sizes, **heads), tmp_path / "model", "4MB")
    outcome = quantize_to_size(source, tmp_path / "out", recipe, Request(Target(bits=5.5)), **QUIET)
    counted = "bits_per_weight" if recipe is GGUF else "quantized_bits_per_weight"
    assert 5.2 < outcome.report[counted] <= 5.5
    assert quantize_to_size(source, tmp_path / "out", recipe, Request(Target(bits=5.5)), **QUIET).already_complete


def test_what_cannot_be_is_said_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    for recipe in (GGUF, W4A16):
        with pytest.raises(UsageError, match="the smallest build of these types has"):
            quantize_to_size(model, tmp_path / "out", recipe, Request(Target(size=100_000)), **QUIET)
    with pytest.raises(UsageError, match="is none of"):
        quantize_to_size(model, tmp_path / "out", W4A16, Request(Target(bits=4.5), ("IQ*",)), **QUIET)
    with pytest.raises(UsageError, match="holds no sensitivity"):
        quantize_to_size(model, tmp_path / "out", GGUF, Request(Target(bits=4.5)), sensitivity=tmp_path, **QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds no mixture of integers"):
        quantize_to_size(model, tmp_path / "out", parse_recipe({"format": "awq"}), Request(Target(bits=4.5)), **QUIET)
