"""What a plan says before any weight is there: types that do not fit, and tokenizers that have no GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from qconv.errors import UsageError
from qconv.formats.gguf.mixture import fallbacks
from qconv.planning.gguf_outline import outline
from qconv.planning.gguf_recipe import GgufRecipe
from tests.conftest import BUNDLED

NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model without its weights."""
    for name in NAMES:
        shutil.copyfile(BUNDLED / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_types_that_do_not_fit_are_counted() -> None:
    wanted = {"a": T.Q4_K, "b": T.Q4_K, "c": T.Q6_K, "d": T.F32}
    assert fallbacks(wanted, wanted) is None
    said = fallbacks(wanted, {"a": T.Q5_0, "b": T.Q4_K, "c": T.Q8_0, "d": T.F32})
    assert said is not None
    assert said.startswith("2 of 4 tensors hold another type than the asked one")
    assert said.endswith("1 x Q4_K -> Q5_0, 1 x Q6_K -> Q8_0")


def test_a_plan_says_which_types_do_not_fit(folder: Path) -> None:
    edit(folder / "config.json", moe_intermediate_size=96)  # which 256 does not divide
    planned = outline(folder, GgufRecipe(type="Q6_K"))
    (notice,) = planned.notices
    assert "-> Q8_0" in notice
    down = next(info for info in planned.tensors if "ffn_down_exps" in info.name)
    assert down.type == T.Q8_0


def test_a_tokenizer_without_a_gguf_is_refused_before_any_weight(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", model=described["model"] | {"type": "Unigram"})
    with pytest.raises(UsageError, match=r"tokenizer\.json: a Unigram tokenizer"):
        outline(folder, GgufRecipe(type="Q8_0"))
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such file"):
        outline(folder, GgufRecipe(type="Q8_0"))


def test_without_a_tokenizer_a_plan_says_what_it_does_not_know(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (notice,) = outline(folder, GgufRecipe(type="Q8_0")).notices
    assert "no tokenizer" in notice
