"""The local engine against transformers itself: logits, and greedy and sampled completions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qconv.errors import UsageError
from qconv.evaluation.engines import open_engine
from qconv.evaluation.engines.base import Prompt, Sampling, stop_at
from qconv.evaluation.engines.local import LocalEngine

PROMPTS = [Prompt("import os\n"), Prompt("def add(a, b):\n    return"), Prompt("class A:\n    def f(self)")]


@pytest.fixture(scope="module")
def engine(bundled: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(bundled, rows=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(bundled: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundled)


def test_logits_are_those_of_each_sequence_alone(engine: LocalEngine, model: Any) -> None:
    sequences = [list(range(5, 5 + length)) for length in (7, 30, 12)]
    found = list(engine.logits(sequences))
    assert [one.shape for one in found] == [(7, 2048), (30, 2048), (12, 2048)]
    assert found[0].dtype == np.float32
    with torch.inference_mode():
        for ids, logits in zip(sequences, found, strict=True):
            # Padding and the other rows change the order of float32 sums over logits of up to 15.
            np.testing.assert_allclose(logits, model(torch.tensor([ids])).logits[0].numpy(), atol=2e-4)


def test_the_same_call_gives_the_same_bits(engine: LocalEngine) -> None:
    sequences = [list(range(40)), list(range(100, 130)), list(range(9))]
    for first, second in zip(engine.logits(sequences), engine.logits(sequences), strict=True):
        np.testing.assert_array_equal(first, second)


def test_greedy_completions_are_those_of_transformers(engine: LocalEngine, model: Any, tokenizer: Any) -> None:
    found = list(engine.complete(PROMPTS, Sampling(max_tokens=24)))
    assert [(one.prompt, one.sample) for one in found] == [(0, 0), (1, 0), (2, 0)]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        expected = expected[: expected.index(0)] if 0 in expected else expected
        assert list(completion.tokens) == expected
        assert completion.text == tokenizer.decode(expected, clean_up_tokenization_spaces=False)


def test_a_stop_string_ends_and_is_left_out(engine: LocalEngine) -> None:
    (whole,) = engine.complete(PROMPTS[1:2], Sampling(max_tokens=24))
    stop = whole.text[2:4]
    (cut,) = engine.complete(PROMPTS[1:2], Sampling(max_tokens=24, stop=("never seen", stop)))
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert len(cut.tokens) < len(whole.tokens)
    assert cut.tokens == whole.tokens[: len(cut.tokens)]


def test_samples_depend_on_seed_prompt_and_number_alone(bundled: Path, engine: LocalEngine) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.95, samples=3, seed=5)
    found = {(one.prompt, one.sample): one.tokens for one in engine.complete(PROMPTS, sampling)}
    assert len(found) == 9
    assert len(set(found.values())) > 6
    # In another order and with other neighbours, the same draws.
    reversed_ = {(2 - one.prompt, one.sample): one.tokens for one in engine.complete(PROMPTS[::-1], sampling)}
    assert reversed_ == found
    other = Sampling(max_tokens=12, temperature=0.8, top_p=0.95, samples=3, seed=6)
    assert {one.tokens for one in engine.complete(PROMPTS, other)} != set(found.values())


def test_samples_follow_the_nucleus(engine: LocalEngine, model: Any, tokenizer: Any) -> None:
    """First tokens of many samples against the exact truncated distribution."""
    prompt, temperature, top_p, draws = Prompt("import "), 1.5, 0.6, 200
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, samples=draws)
    tokens = [one.tokens[0] if one.tokens else 0 for one in engine.complete([prompt], sampling)]
    with torch.inference_mode():
        logits = model(tokenizer(prompt.text, return_tensors="pt").input_ids).logits[0, -1]
    probabilities, ids = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    kept = int((probabilities.cumsum(0) < top_p).sum()) + 1
    assert set(tokens) <= set(ids[:kept].tolist())
    assert kept > 5
    expected = probabilities[:kept] / probabilities[:kept].sum()
    seen = torch.tensor([tokens.count(one) / draws for one in ids[:kept].tolist()])
    # Five standard errors of the most probable token's share.
    assert float((seen - expected).abs().max()) < 5 * float((expected[0] * (1 - expected[0]) / draws) ** 0.5)


def test_a_build_computes_its_dequantized_weights(rtn_build: Path, moe: Path, tmp_path: Path) -> None:
    from qconv.runtime.dense import write_dense

    write_dense(rtn_build, tmp_path / "dense", torch.float32)
    sequences = [list(range(50, 80))]
    (build,), (dense,), (source,) = (
        list(LocalEngine(path).logits(sequences)) for path in (rtn_build, tmp_path / "dense", moe)
    )
    np.testing.assert_allclose(build, dense, atol=2e-4)
    assert np.abs(build - source).max() > 0.1


def test_identity_tells_dtype_and_rows(bundled: Path) -> None:
    float32 = open_engine("local", bundled, dtype="float32", device="cpu", rows=2)
    bfloat16 = open_engine("local", bundled, dtype="bfloat16", device="cpu", rows=2)
    assert float32.identity["torch"] == torch.__version__
    assert float32.identity != bfloat16.identity
    assert next(iter(bfloat16.logits([[1, 2, 3]]))).dtype == np.float32


def test_an_unknown_engine_is_named(bundled: Path) -> None:
    with pytest.raises(UsageError, match="'fast'"):
        open_engine("fast", bundled, dtype="float32", device="cpu", rows=1)


def test_the_earliest_stop_string_counts() -> None:
    assert stop_at("abcdef", ["ef", "cd", ""]) == ("ab", True)
    assert stop_at("abcdef", ["x"]) == ("abcdef", False)


def test_a_small_model_computes_on_one_thread_and_leaves_torch_as_it_was(bundled: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = LocalEngine(bundled, rows=2)
        assert made.identity["device"].endswith(", 1 threads")
        seen: list[tuple[float, int]] = []
        answers = list(made.complete(PROMPTS[:2], Sampling(max_tokens=5), lambda share: seen.append((share, _count()))))
        assert seen == [(share, 1) for share in (0.2, 0.4, 0.6, 0.8, 1.0)], "a step for every token of the batch"
        assert len(answers) == 2
        assert _count() == 2
    finally:
        torch.set_num_threads(before)


def test_a_large_model_shares_its_work_between_threads(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconv.evaluation.engines.local.LEAST_SHARED", 256)
    assert LocalEngine(bundled).identity["device"].endswith(f", {_count()} threads")


def _count() -> int:
    return torch.get_num_threads()


def test_half_a_surrogate_pair_in_a_prompt_is_replaced(engine: LocalEngine) -> None:
    broken, replaced = engine.complete([Prompt("x = '\ud800'"), Prompt("x = '\ufffd'")], Sampling(max_tokens=4))
    assert broken.tokens == replaced.tokens
    broken.text.encode()
