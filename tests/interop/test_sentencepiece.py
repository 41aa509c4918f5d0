"""A real llama.cpp tokenizes as transformers with SentencePiece's BPE, unknown letters as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import random_model, save_model
from tests.interop.conftest import Client
from tests.interop.test_gguf import Llama, texts, write

pytestmark = pytest.mark.interop

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SCHEMES: dict[str, dict[str, Any]] = {
    "prepended": {"normalizer": LEGACY},
    "replaced": {"normalizer": normalizers.Replace(" ", "▁")},
    "first": {"pre_tokenizer": pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)},
}


def trained(scheme: str, path: Path) -> None:
    """Train on the tests' texts, then merge every pair that makes a token, as a conversion from SentencePiece does."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    learner.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    # Merged tokens as they were learned, then letters; some letters stay out, and are bytes.
    letters = [token for token in learned if len(token) == 1 and token != "\0"]
    pieces = [token for token in learned if len(token) > 1] + letters[:-40]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges = [
        (token[:place], token[place:])
        for token in pieces
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    for name, value in SCHEMES[scheme].items():
        setattr(made, name, value)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokenization_is_that_of_transformers(
    scheme: str, client: Client, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    from transformers import AutoTokenizer

    model = save_model(random_model("mixtral"), tmp_path / "model")
    trained(scheme, model)
    edit_json(model / "config.json", eos_token_id=2, bos_token_id=1)
    (file,) = write(model, tmp_path / "f16", "F16")
    given = [*texts(), "one</s>two", "<tool_call>x<tool_call> y"]
    if scheme == "first":  # where llama.cpp puts a space all the same: qconv.formats.gguf.sentencepiece
        special = (*SPECIAL, "<tool_call>")
        given = [text for text in given if not text.startswith(" ") and not any(one in text for one in special)]
        assert len(given) > 140
    answer = Llama(client, tmp_path)(file, texts=given)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert answer.tokens == [tokenizer(text)["input_ids"] for text in given]
    assert len({token for tokens in answer.tokens for token in tokens if 3 <= token < 259}) > 20, "bytes are among them"
    assert answer.special[:2] == [1, 2]
    read = load_tokenizer(file)
    assert answer.tokens == [read(text)["input_ids"] for text in given]
