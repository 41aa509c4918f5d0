"""Text from packed weights: cache, batch, chat template, ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qconv
from qconv.errors import UsageError
from qconv.runtime.generation import complete, recommended
from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import BUNDLED, build, small_recipe

PROMPTS = ["class Node:\n    def __init__(self, value, left=None", "import", "def add(a, b):\n    return"]
"""The first does not end soon."""
CONFIG: Any = transformers.GenerationConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled model in 4 bits, computing in float32."""
    out = build(BUNDLED, tmp_path_factory.mktemp("generation") / "build", small_recipe()).out
    return qconv.load(out, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Its tokenizer."""
    return load_tokenizer(BUNDLED)


def test_a_cache_changes_nothing(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    wanted = tokenizer.decode(ids[0]).removeprefix(PROMPTS[0])
    assert complete(model, tokenizer, PROMPTS[:1], max_tokens=10)[0].text == wanted


def test_padding_changes_nothing(model: Any, tokenizer: Any) -> None:
    batch = complete(model, tokenizer, PROMPTS, max_tokens=8)
    alone = [complete(model, tokenizer, [prompt], max_tokens=8)[0] for prompt in PROMPTS]
    assert batch == alone
    assert len({completion.text for completion in batch}) == 3


def test_pieces_are_told_as_they_come(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    (completion,) = complete(model, tokenizer, PROMPTS[:1], max_tokens=12, listener=pieces.append)
    assert "".join(pieces) == completion.text
    assert len([piece for piece in pieces if piece]) > 2
    assert (completion.tokens, completion.stopped) == (12, "length")


def test_a_seed_fixes_the_samples(model: Any, tokenizer: Any) -> None:
    def sampled(seed: int, temperature: float = 1.5) -> str:
        return complete(model, tokenizer, PROMPTS[:1], max_tokens=8, temperature=temperature, seed=seed)[0].text

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(1, 1e-4) == complete(model, tokenizer, PROMPTS[:1], max_tokens=8)[0].text


def test_an_end_ends_it(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    second = int(model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [second])
    (completion,) = complete(model, tokenizer, PROMPTS[:1], max_tokens=8)
    assert (completion.tokens, completion.stopped) == (2, "end")


@pytest.mark.parametrize(
    "stated",
    [
        {"repetition_penalty": 50.0},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        {"suppress_tokens": list(range(5, 2000)), "forced_bos_token_id": 4},
        {"min_new_tokens": 5, "max_length": 3, "no_repeat_ngram_size": 1},
    ],
)
def test_greedy_is_greedy_whatever_the_model_recommends(
    model: Any, tokenizer: Any, stated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = complete(model, tokenizer, PROMPTS[:1], max_tokens=8)
    config = CONFIG(**stated, eos_token_id=model.generation_config.eos_token_id)
    monkeypatch.setattr(model, "generation_config", config)
    assert complete(model, tokenizer, PROMPTS[:1], max_tokens=8) == wanted
    assert model.generation_config is config
    assert recommended(model).keys() <= stated.keys()
    assert recommended(model)


def test_sampling_is_from_the_whole_distribution(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """top_k 1 would make every sample the greedy one."""
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5, "seed": 1}
    wanted = complete(model, tokenizer, PROMPTS[:1], **options)
    monkeypatch.setattr(model, "generation_config", CONFIG(top_k=1, top_p=0.1))
    assert complete(model, tokenizer, PROMPTS[:1], **options) == wanted


@pytest.mark.parametrize("special_tokens", [True, False])
def test_a_rendered_prompt_gets_no_second_beginning(model: Any, tokenizer: Any, special_tokens: bool) -> None:
    """The bundled tokenizer adds no token of its own; this one puts token 5 before each prompt."""

    class Beginning:
        def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
            encoded = tokenizer(text, add_special_tokens=False)
            encoded.input_ids[:0] = [5] if add_special_tokens else []
            return encoded

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    options: dict[str, Any] = {"max_tokens": 8, "special_tokens": special_tokens}
    (answer,) = complete(model, Beginning(), PROMPTS[:1], **options)
    ids = ([5] if special_tokens else []) + tokenizer(PROMPTS[0]).input_ids
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_prompts_that_cannot_be_continued(model: Any, tokenizer: Any) -> None:
    for prompts, error in (
        ([], "no prompt"),
        (["x", ""], "prompt 2 is empty"),
        (["\ud800"], "surrogate"),
        (["a b " * 4000], "has room for 4088"),
    ):
        with pytest.raises(UsageError, match=error):
            complete(model, tokenizer, prompts, max_tokens=8)


def test_the_tokenizer_of_nothing(tmp_path: Path) -> None:
    from qconv.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
