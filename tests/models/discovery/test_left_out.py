"""What transformers' model leaves out by its own word: real layers never, unknown names never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from evals.model_types import config_of
from qconv.models import architecture
from qconv.models.discovery import left_out
from tests.conftest import FAMILIES, SIZES

EH, FC = "eh_proj.weight", "mtp.fc.weight"


def found(model_type: str, names: list[str], changes: Mapping[str, Any] | None = None) -> dict[str, str]:
    config = config_of(model_type).to_dict() | dict(changes or {})
    config.pop("num_mtp_layers", None)  # as transformers calls what checkpoints call num_nextn_predict_layers
    return left_out(config, architecture(config), names)


def test_the_layers_behind_the_model_s_are_counted_by_the_config() -> None:
    names = [f"model.layers.{number}.{EH}" for number in (1, 2, 3, 4, 5, 46, 47, 92, 920)]
    # transformers names the layers of the published models, 46 and 92; config_of has 3 layers.
    said = {f"model.layers.{number}.{EH}": "MTP" for number in (46, 92)}
    assert found("glm4_moe", names, {"num_nextn_predict_layers": 0}) == said
    assert found("glm4_moe", names, {"num_nextn_predict_layers": 1}) == said | {f"model.layers.3.{EH}": "MTP"}
    two = {f"model.layers.{number}.{EH}": "MTP" for number in (3, 4)}
    assert found("glm4_moe", names, {"num_nextn_predict_layers": 2}) == said | two


def test_a_real_layer_is_none_of_them() -> None:
    config = config_of("glm4_moe").to_dict() | {"num_hidden_layers": 48, "num_nextn_predict_layers": 1}
    names = [f"model.layers.{number}.{EH}" for number in (46, 47, 48)]
    # The pattern says 46, which is one of 48 layers here.
    assert left_out(config, architecture(config), names) == {f"model.layers.48.{EH}": "MTP"}


@pytest.mark.parametrize(
    "name",
    [
        f"layers.3.{EH}",
        f"model.layers.03x.{EH}",
        f"other.model.layers.3.{EH}",
        f"model.layers.².{EH}",
        "model.unknown.weight",
        FC,
    ],
)
def test_what_no_class_lists_is_unknown(name: str) -> None:
    assert found("glm4_moe", [name]) == {}


def test_names_without_layers() -> None:
    assert found("ernie4_5_moe", ["model.mtp_block.0.mlp.weight", "model.visual.weight"]) == {
        "model.mtp_block.0.mlp.weight": "MTP"
    }


def test_a_class_without_a_list_leaves_nothing_out() -> None:
    config = SIZES | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"}
    assert left_out(config, architecture(config), [FC, "model.visual.patch_embed.weight"]) == {}
    assert left_out(config, architecture(config), []) == {}
