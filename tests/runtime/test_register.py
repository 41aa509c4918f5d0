"""``AutoModelForCausalLM.from_pretrained`` on builds that transformers has no loader for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qconv
from qconv.errors import UsageError
from qconv.registration import register_with_transformers
from qconv.runtime.modules import PackedExperts, PackedLinear
from qconv.runtime.register import register
from tests.conftest import FAMILIES, build, random_model, save_model, small_recipe

IDS = torch.arange(40).view(2, 20)


def logits(model: Any) -> Tensor:
    """[sequences, length, vocabulary]."""
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


@pytest.mark.parametrize(("family", "output_format"), [(f, "awq") for f in FAMILIES] + [("qwen3_moe", "gptq")])
def test_transformers_loads_what_qconv_loads(family: str, output_format: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_model(random_model(family), tmp_path / "model")
    out = build(source, tmp_path / "build", small_recipe("rtn", output_format)).out
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert any(isinstance(module, PackedExperts) for module in model.modules()) == (
        "moe" in family or family == "mixtral"
    )
    wanted = logits(qconv.load(out, dtype=torch.float32))
    assert float((logits(model) - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())
    assert not model.hf_quantizer.is_serializable()


def test_unquantized_models_load_as_ever(moe: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    assert not any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())


def test_a_model_is_not_spread_over_devices(awq_build: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(UsageError, match="one device"):
        AutoModelForCausalLM.from_pretrained(awq_build, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("order", ["import qconv, transformers", "import transformers, qconv"])
def test_whichever_is_imported_first(order: str) -> None:
    code = f"{order}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
    code += "assert known['awq'].__name__ == 'PackedAwqQuantizer', known['awq']\n"
    code += "assert known['fp8'].__name__ == 'FineGrainedFP8HfQuantizer'\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    register()
    register_with_transformers()
    assert before == AUTO_QUANTIZER_MAPPING
