"""Corpora as evaluations read them: one BOS at most, and of a long text only what is of use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.calibration.corpus import build_tokens
from qconv.evaluation import text as text_module
from qconv.evaluation.suites import TextSettings
from qconv.evaluation.text import calibrated_on, windowed_text
from qconv.evaluation.windows import WindowedText
from qconv.planning.gguf_recipe import GgufCalibrationSettings, GgufRecipe
from tests.conftest import BUNDLED

BOS = 2
QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}


@pytest.fixture
def bos_model(tmp_path: Path) -> Path:
    """The bundled tokenizer with token 2 as a BOS that it puts before every text, and whose template writes it too."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Thirty chats."""
    path = tmp_path / "chats.jsonl"
    rows = ([{"role": "user", "content": f"{number} " + "value = compute(value)\n" * 30}] for number in range(30))
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows))
    return path


def windows_of(model: Path, corpus: str, **changes: Any) -> WindowedText:
    values = {"kind": "text", "name": "t", "corpus": corpus, "context": 64, "stride": 32, "tokens": 1500, **changes}
    return windowed_text(TextSettings.model_validate(values), model, 0)


@pytest.mark.parametrize("rule", ["documents", "llama.cpp"])
def test_a_chat_that_writes_bos_gets_one_that_is_never_scored(rule: str, bos_model: Path, chats: Path) -> None:
    text = windows_of(bos_model, f"jsonl:{chats}:messages", rule=rule)
    for window in text.windows:
        assert BOS not in window.targets
        assert BOS not in window.ids[1:]
    assert text.windows[0].ids[0] == BOS
    scored = sum(int(window.nbytes.sum()) for window in text.windows)
    assert scored == pytest.approx(1500 * 4, rel=0.5)  # bytes of text alone


@pytest.mark.parametrize("rule", ["documents", "llama.cpp"])
def test_a_template_s_bos_is_not_scored_where_the_tokenizer_adds_none(rule: str, bos_model: Path, chats: Path) -> None:
    tokenizer = json.loads((bos_model / "tokenizer.json").read_text()) | {"post_processor": None}
    (bos_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = windows_of(bos_model, f"jsonl:{chats}:messages", rule=rule)
    assert not any(BOS in window.targets for window in text.windows)
    # A document of its own begins as the model was taught; a stream has no place for it.
    assert bool(text.windows[0].ids[0] == BOS) is (rule == "documents")


def test_of_a_long_document_only_what_is_of_use_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"total_{number} += {number}\n" for number in range(5000)))
    wanted = {
        rule: windows_of(BUNDLED, f"text:{path}", rule=rule, document_tokens=1500)
        for rule in ("documents", "llama.cpp")
    }
    monkeypatch.setattr(text_module, "LARGE", 1 << 10)
    for rule, whole in wanted.items():
        found = windows_of(BUNDLED, f"text:{path}", rule=rule)
        assert found.scored >= 1499
        for one, other in zip(found.windows, whole.windows, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.nbytes, other.nbytes)


@pytest.fixture
def gguf_moe(moe_copy: Path, edit_json: Callable[..., None]) -> Path:
    """A model that llama.cpp knows too."""
    edit_json(moe_copy / "config.json", norm_topk_prob=True)
    return moe_copy


@pytest.mark.parametrize("method", [("gptq",), ("rtn",)])
def test_a_gguf_build_s_own_calibration_text_is_left_out(
    method: tuple[str, ...], gguf_moe: Path, tmp_path: Path
) -> None:
    """Whether it rounded by the text or took an importance matrix from it; the folder has no config.json to go by."""
    text = GgufCalibrationSettings(tokens=256, sequence_length=32)
    recipe = GgufRecipe(type="Q4_0", method=method, calibration=text)
    quantize_gguf(gguf_moe, tmp_path / "out", recipe, **QUIET)
    (file,) = (one for one in (tmp_path / "out").glob("*.gguf") if one.name != "imatrix.gguf")
    used = set(build_tokens(text, gguf_moe).documents)
    assert used
    assert calibrated_on(tmp_path / "out", text.named, gguf_moe) == used
    assert calibrated_on(file, text.named, file) == used
    assert not calibrated_on(tmp_path / "out", "text:/elsewhere", gguf_moe)


def test_a_build_without_calibration_leaves_nothing_out(rtn_build: Path, gguf_moe: Path, tmp_path: Path) -> None:
    quantize_gguf(gguf_moe, tmp_path / "out", GgufRecipe(type="Q4_0"), **QUIET)
    for build in (rtn_build, tmp_path / "out", gguf_moe):
        assert not calibrated_on(build, GgufCalibrationSettings().named, gguf_moe)
