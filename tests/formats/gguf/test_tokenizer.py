"""The tokenizer in a GGUF file: each trap that makes llama.cpp refuse, abort or tokenize otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, TokenType

from qconv.errors import CheckpointError, QconvError, UsageError
from qconv.formats.gguf.pre_tokenizers import LLAMA3
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from tests.conftest import BUNDLED

CONFIG = {"eos_token_id": 0}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# o200k's, as gpt-oss's tokenizer.json has it.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model's tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    return tmp_path


def changed(folder: Path, change: Change, name: str = "tokenizer.json") -> Path:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    return folder


def keys_of(folder: Path, rows: int = 2048, config: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata = tokenizer_metadata(folder, rows, CONFIG if config is None else config)
    return {key: value.value for key, value in metadata.items()}


def test_the_bundled_tokenizer(folder: Path) -> None:
    keys = keys_of(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    tokens = keys.pop("tokenizer.ggml.tokens")
    assert [vocabulary[token] for token in tokens] == list(range(2048))
    types = keys.pop("tokenizer.ggml.token_type")
    assert types == [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 2045
    merges = keys.pop("tokenizer.ggml.merges")
    assert merges == [" ".join(pair) for pair in described["model"]["merges"]]
    assert keys.pop("tokenizer.chat_template") == (BUNDLED / "chat_template.jinja").read_text()
    assert keys == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def test_values_have_the_types_that_llama_cpp_reads(folder: Path) -> None:
    metadata = tokenizer_metadata(folder, 2048, CONFIG)
    assert metadata["tokenizer.ggml.eos_token_id"].type == GGUFValueType.UINT32
    assert metadata["tokenizer.ggml.add_bos_token"].type == GGUFValueType.BOOL
    for key in ("tokens", "token_type", "merges"):
        assert metadata[f"tokenizer.ggml.{key}"].type == GGUFValueType.ARRAY


def test_a_vocabulary_is_padded_to_the_embeddings_rows(folder: Path) -> None:
    keys = keys_of(folder, rows=2051)
    assert keys["tokenizer.ggml.tokens"][2048:] == ["[PAD2048]", "[PAD2049]", "[PAD2050]"]
    assert keys["tokenizer.ggml.token_type"][2048:] == [TokenType.UNUSED] * 3


def test_holes_in_a_vocabulary_are_padded_too(folder: Path) -> None:
    def move(values: dict[str, Any]) -> None:
        last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
        values["model"]["vocab"][last] = 2100

    keys = keys_of(changed(folder, move), rows=2101)
    assert keys["tokenizer.ggml.tokens"][2047] == "[PAD2047]"
    assert keys["tokenizer.ggml.token_type"][2100] == TokenType.NORMAL


def test_added_tokens_are_control_or_user_defined(folder: Path) -> None:
    def add(values: dict[str, Any]) -> None:
        for number, special in ((2048, True), (2049, False)):
            values["added_tokens"].append({"id": number, "content": f"<{number}>", "special": special})

    keys = keys_of(changed(folder, add), rows=2050)
    assert keys["tokenizer.ggml.tokens"][2048:] == ["<2048>", "<2049>"]
    assert keys["tokenizer.ggml.token_type"][2048:] == [TokenType.CONTROL, TokenType.USER_DEFINED]


def test_older_merges_are_joined_texts(folder: Path) -> None:
    expected = keys_of(folder)["tokenizer.ggml.merges"]

    def join(values: dict[str, Any]) -> None:
        values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]

    assert keys_of(changed(folder, join))["tokenizer.ggml.merges"] == expected


def test_special_ids_come_from_the_tokenizer_then_the_configs(folder: Path) -> None:
    config = {"eos_token_id": 7, "bos_token_id": 5}
    keys = keys_of(folder, config=config)
    assert [keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [5, 0, 0]
    changed(folder, lambda values: values.update(eos_token=None, pad_token=None), "tokenizer_config.json")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 1}))
    keys = keys_of(folder, config={})
    assert [keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [2, 2, 1]
    assert keys_of(folder, config={"eos_token_id": 7})["tokenizer.ggml.eos_token_id"] == 7


def test_a_special_token_may_be_described_at_length(folder: Path) -> None:
    changed(folder, lambda values: values.update(eos_token={"content": "<|im_end|>"}), "tokenizer_config.json")
    assert keys_of(folder)["tokenizer.ggml.eos_token_id"] == 2


def test_bos_and_eos_are_added_as_the_post_processor_adds_them(folder: Path) -> None:
    def process(values: dict[str, Any]) -> None:
        values["post_processor"] = {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    ],
                    "special_tokens": {"<|im_start|>": {"ids": [1]}, "<|endoftext|>": {"ids": [0]}},
                },
            ],
        }

    changed(folder, process)
    changed(folder, lambda values: values.update(bos_token="<|im_start|>"), "tokenizer_config.json")
    keys = keys_of(folder)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, True)
    changed(folder, lambda values: values.update(bos_token="<|im_end|>"), "tokenizer_config.json")
    with pytest.raises(UsageError, match=r"adds tokens \[1\] around every text"):
        keys_of(folder)


def test_a_chat_template_in_the_configuration_is_found(folder: Path) -> None:
    changed(folder, lambda values: values.update(chat_template="inline"), "tokenizer_config.json")
    assert keys_of(folder)["tokenizer.chat_template"] != "inline"  # the file goes first
    (folder / "chat_template.jinja").unlink()
    assert keys_of(folder)["tokenizer.chat_template"] == "inline"
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    changed(folder, lambda values: values.update(chat_template=several), "tokenizer_config.json")
    keys = keys_of(folder)
    assert keys["tokenizer.chat_template"] == "one"
    assert keys["tokenizer.chat_template.tool_use"] == "two"
    changed(folder, lambda values: values.update(chat_template=5), "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        keys_of(folder)


def test_templates_in_files_of_their_own_are_kept(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    keys = keys_of(folder)
    assert keys["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert keys["tokenizer.chat_template.tool_use"] == "tools"


def test_a_model_without_chat_template_has_none(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in keys_of(folder)


def test_settings_add_nothing_as_in_transformers(folder: Path) -> None:
    settings = {"bos_token": "<|im_start|>", "add_bos_token": True, "add_eos_token": True}
    keys = keys_of(changed(folder, lambda values: values.update(settings), "tokenizer_config.json"))
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


def model(**changes: Any) -> Change:
    return lambda values: values["model"].update(changes)


def pre_tokenizer(described: Any) -> Change:
    return lambda values: values.update(pre_tokenizer=described)


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    described = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [described | changes, byte_level]}


def added(**entry: Any) -> Change:
    return lambda values: values["added_tokens"].append({"id": 2048, "content": "<x>", "special": True} | entry)


def duplicate_word(values: dict[str, Any]) -> None:
    word = next(token for token, number in values["model"]["vocab"].items() if number == 293)
    values["added_tokens"].append({"id": 2048, "content": word, "special": False})


def pad_clash(values: dict[str, Any]) -> None:
    values["added_tokens"].append({"id": 2048, "content": "[PAD2049]", "special": False})


REFUSED: dict[str, tuple[Change, type[QconvError], str]] = {
    "unigram": (model(type="Unigram"), UsageError, "a Unigram tokenizer"),
    "no model": (lambda values: values.pop("model"), UsageError, "a None tokenizer"),
    "bytes of another kind": (model(byte_fallback=True), UsageError, "BPE with byte fallback whose normalizer"),
    "dropout": (model(dropout=0.1), UsageError, "BPE with dropout 0.1"),
    "suffixes": (model(end_of_word_suffix="</w>"), UsageError, "end_of_word_suffix"),
    "lowercase": (
        lambda values: values.update(normalizer={"type": "Lowercase"}),
        UsageError,
        "a normalizer of type Lowercase",
    ),
    "ignored merges": (model(ignore_merges=True), UsageError, "ignore_merges True with pre-tokenizer qwen2"),
    "no merges": (model(merges=[]), UsageError, "a tokenizer without merges"),
    "another pattern": (pre_tokenizer(split(r"\w+|\s+")), UsageError, "none of gpt-2, qwen2, llama-bpe"),
    "removed pattern": (
        pre_tokenizer(split(LLAMA3, behavior="Removed")),
        UsageError,
        "none of gpt-2, qwen2, llama-bpe",
    ),
    "prefix space": (pre_tokenizer({"type": "ByteLevel", "add_prefix_space": True}), UsageError, "none of gpt-2"),
    "no splitting": (
        pre_tokenizer({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        UsageError,
        "none of gpt-2",
    ),
    "metaspace": (pre_tokenizer({"type": "Metaspace"}), UsageError, "none of gpt-2"),
    "no pre-tokenizer": (pre_tokenizer(None), UsageError, "none of gpt-2"),
    "a NUL": (added(content="<\0>"), UsageError, "a token with a NUL"),
    "a stripping token": (added(lstrip=True), UsageError, "added token '<x>' with lstrip"),
    "another post-processor": (
        lambda values: values.update(post_processor={"type": "BertProcessing"}),
        UsageError,
        "a post-processor of type BertProcessing",
    ),
    "a duplicate text": (duplicate_word, CheckpointError, "is there twice, as 293 and as 2048"),
    "a word that is a pad": (pad_clash, CheckpointError, r"token '[PAD2049]' is there twice, as 2048 and as 2049"),
    "a duplicate id": (added(id=5), CheckpointError, "have the same id 5"),
    "an id beyond the rows": (added(id=2050), CheckpointError, "has id 2050, the embedding has 2050 rows"),
    "a negative id": (added(id=-1), CheckpointError, "malformed"),
    "an id of text": (added(id="5"), CheckpointError, "malformed"),
    "a token of number": (added(content=5), CheckpointError, "malformed"),
    "an added text": (lambda values: values["added_tokens"].append("x"), CheckpointError, "malformed"),
    "added tokens that are none": (lambda values: values.update(added_tokens=3), CheckpointError, "are 3, not a list"),
    "a normalizer of text": (lambda values: values.update(normalizer="NFC"), UsageError, "a normalizer of type NFC"),
    "a list of normalizers": (lambda values: values.update(normalizer=["x"]), UsageError, "a normalizer of type ['x']"),
    "no vocabulary": (model(vocab={}), CheckpointError, "no vocabulary"),
    "a merge of three": (model(merges=["a b c"]), CheckpointError, "merge 'a b c' is malformed"),
    "a merge of one": (model(merges=[["a"]]), CheckpointError, "is malformed"),
    "a merge with a space": (model(merges=[["a ", "b"]]), CheckpointError, "is malformed"),
    "a piece of no kind": (
        lambda values: values["post_processor"].update(single=[{"What": 1}]),
        CheckpointError,
        "post-processor piece",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused(name: str, folder: Path) -> None:
    change, kind, what = REFUSED[name]
    with pytest.raises(kind) as caught:
        keys_of(changed(folder, change), rows=2050)
    assert what in caught.value.message


def test_what_is_long_is_cut_in_messages(folder: Path) -> None:
    for change in (model(merges=["a" * 10**6]), added(content="a" * 10**6, id=-1), model(dropout="a" * 10**6)):
        with pytest.raises((CheckpointError, UsageError)) as caught:
            keys_of(changed(folder, change), rows=2050)
        assert len(caught.value.message) < 1000
    assert "tokenizer.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("described", "ignore_merges", "name"),
    [
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "glm4"),
        (split(O200K), False, "gpt-4o"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, False, "starcoder"),
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, False, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": False}, False, "gpt-2"),
    ],
)
def test_other_pre_tokenizers_are_recognized(
    described: dict[str, Any], ignore_merges: bool, name: str, folder: Path
) -> None:
    changed(folder, pre_tokenizer(copy.deepcopy(described)))
    changed(folder, model(ignore_merges=ignore_merges))
    assert keys_of(folder)["tokenizer.ggml.pre"] == name


def test_nfc_is_taken_though_llama_cpp_does_not_normalize(folder: Path) -> None:
    changed(folder, lambda values: values.update(normalizer={"type": "NFC"}))  # as Qwen's has
    assert keys_of(folder)["tokenizer.ggml.pre"] == "qwen2"


def test_an_end_of_sequence_must_be_named(folder: Path) -> None:
    changed(folder, lambda values: values.pop("eos_token"), "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="no end-of-sequence token") as caught:
        keys_of(folder, config={})
    assert "token 11" in str(caught.value)


def test_special_ids_must_exist(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="bos_token_id 2048 is no row"):
        keys_of(folder, config={"bos_token_id": 2048})
    changed(folder, lambda values: values.update(eos_token="<none>"), "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="eos_token '<none>' is no token"):
        keys_of(folder)


def test_tokenizer_json_must_be_there(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such file"):
        keys_of(folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        keys_of(folder)


def test_a_damaged_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot read"):
        keys_of(folder)
