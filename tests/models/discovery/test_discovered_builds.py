"""Types without a family file through the whole of qconv: quantized, verified, loaded, streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evals.families import BOUND, METHODS, VOCABULARY, built, folded
from evals.model_types import save_random
from qconv.artifacts.source import Source
from qconv.building.gguf_pipeline import gguf_target
from qconv.errors import UsageError
from qconv.planning.gguf_recipe import parse_gguf_recipe
from tests.models.discovery.test_fitting import FITTING

EVERY_TIME = ("deepseek_v3", "glm4_moe", "gpt_oss", "laguna", "llama4_text", "minimax_m2", "mistral", "qwen3_next")
"""Of each kind one; the others take minutes, and `make families` goes through them, too."""
KINDS = [pytest.param(one, marks=() if one in EVERY_TIME else pytest.mark.slow) for one in FITTING]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random checkpoint of a type, as transformers saves it; made once for each dtype."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (model_type, dtype) not in made:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            made[model_type, dtype] = save_random(model_type, folder, dtype, VOCABULARY)
        return made[model_type, dtype]

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", KINDS)
def test_a_build_computes_what_its_dequantized_weights_do(
    source: Callable[..., Path], tmp_path: Path, model_type: str, method: str
) -> None:
    assert built(source(model_type), tmp_path, method) <= BOUND


@pytest.mark.parametrize("model_type", KINDS)
def test_folding_alone_moves_no_logit(source: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    assert folded(source(model_type, torch.float32), tmp_path) <= BOUND


@pytest.mark.parametrize("model_type", ["granite"])
def test_a_gguf_is_refused_for_what_it_is_and_not_for_a_detail(
    source: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    with pytest.raises(UsageError, match=f"family {model_type} has no GGUF form"):
        gguf_target(Source.open(source(model_type)), parse_gguf_recipe({"type": "Q8_0"}), tmp_path, "", lambda _: None)
    assert not [*tmp_path.iterdir()]
