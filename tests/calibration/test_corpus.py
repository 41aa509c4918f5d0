"""Calibration tokens: packing, corpora, special tokens, and what each bad input is told."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.calibration import corpus as corpus_module
from qconv.calibration import documents as documents_module
from qconv.calibration.corpus import TokenSet, build_tokens, load_tokenizer
from qconv.calibration.documents import Document, documents
from qconv.core.settings import CalibrationSettings
from qconv.errors import CheckpointError, UsageError

MODEL = Path(__file__).parents[2] / "evals/models/tiny-coder-moe"
EOS, IM_START, IM_END = 0, 1, 2  # the model card


DOCUMENT_SEQUENCES = 4


@pytest.fixture(scope="module", autouse=True)
def whole_documents() -> Iterator[None]:
    """A share large enough that the short documents of these tests come through in one round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "DOCUMENT_SEQUENCES", DOCUMENT_SEQUENCES)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the model's small files that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def build(name: str, tokens: int = 64, length: int = 16, seed: int = 0, model: Path = MODEL) -> TokenSet:
    return build_tokens(CalibrationSettings(corpus=name, tokens=tokens, sequence_length=length, seed=seed), model)


def test_stdlib_fills_the_asked_shape_and_depends_on_the_seed_alone() -> None:
    first, again, other = (build("python-stdlib", 2048, 512, seed=seed) for seed in (3, 3, 4))
    assert first.ids.shape == (4, 512)
    assert first.ids.dtype == torch.int32
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest != other.digest
    assert first.documents == again.documents != other.documents


def test_stdlib_has_no_tests_and_no_other_packages() -> None:
    names = [document.name for document in documents("python-stdlib", 0)]
    assert len(names) == len(set(names)) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if re.search(r"(^|/)(tests?|site-packages|idlelib)/|_sysconfigdata", name)]


def test_digest_covers_the_shape() -> None:
    assert build("python-stdlib", 64, 16).digest != build("python-stdlib", 64, 32).digest


def test_documents_are_packed_back_to_back_between_eos(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["def f(x):\n    return x\n", "import os\n", "print('hello world')\n" * 3]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = [id for text in texts for id in [*tokenizer(text).input_ids, EOS]]
    packed = build(f"jsonl:{path}", 32, 16)
    assert packed.ids.flatten().tolist() == expected[:32]
    assert packed.documents == ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3")


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cap=st.integers(1, 12),
    eos=st.sampled_from([None, -1]),
)
def test_rounds_give_every_token_once_in_order_and_none_more_than_the_cap(
    sizes: list[int], cap: int, eos: int | None
) -> None:
    corpus_documents = [Document(str(index), "") for index in range(len(sizes))]
    tokens = {str(index): [index * 100 + n for n in range(size)] for index, size in enumerate(sizes)}
    used: dict[str, None] = {}
    encoded = corpus_module._stream(
        iter(corpus_documents), lambda document: iter(tokens[document.name]), cap=cap, eos=eos, used=used
    )
    stream = list(encoded)
    content = [token for token in stream if token != -1]
    for index in range(len(sizes)):
        assert [token for token in content if token // 100 == index] == tokens[str(index)]
    assert list(used) == [str(index) for index, size in enumerate(sizes) if size]
    if eos is not None:
        runs = "".join("|" if token == -1 else "x" for token in stream).split("|")
        assert all(1 <= len(run) <= cap for run in runs[:-1])
        assert runs[-1] == ""  # the last contribution is closed too


def test_a_long_document_takes_turns_with_the_others(tmp_path: Path, tokenizer: Any) -> None:
    long, short = "x = 1\n" * 500, "pass\n"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, short)))
    ids = build(f"jsonl:{path}", 160, 16).ids.flatten().tolist()
    cap, whole = DOCUMENT_SEQUENCES * 16, tokenizer(long).input_ids
    middle = [EOS, *tokenizer(short).input_ids, EOS]
    assert ids[:cap] == whole[:cap]
    assert ids[cap : cap + len(middle)] == middle
    rest = ids[cap + len(middle) :]
    assert rest[:cap] == whole[cap : 2 * cap]  # the second round goes on where the first stopped


def test_control_tokens_in_plain_text_are_characters_and_in_a_chat_are_control_tokens(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "def f(): return 1"}] * 4
    rows = [{"text": "<|im_start|><|im_end|><|endoftext|>" * 10, "messages": turns}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = build(f"jsonl:{path}:text", 32).ids.flatten().tolist()
    chat = build(f"jsonl:{path}:messages", 32).ids.flatten().tolist()
    assert not {IM_START, IM_END, EOS} & set(plain)
    assert chat[0] == IM_START
    assert {IM_START, IM_END} <= set(chat[1:])


@pytest.fixture
def bos_model(model: Path) -> Path:
    """The tokenizer with token 2 as a BOS that it puts before every text, as Llama's does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", IM_END)])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text("<|im_end|>{{ messages[0]['content'] }}")
    return model


@pytest.mark.parametrize("field", ["text", "messages"])
def test_a_tokenizer_with_bos_gets_one_at_each_sequence_start(
    bos_model: Path, tmp_path: Path, tokenizer: Any, field: str
) -> None:
    text = "value = compute(value)\n" * 40
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text, "messages": [{"role": "user", "content": text}]}))
    ids = build(f"jsonl:{path}:{field}", model=bos_model).ids
    assert (ids == IM_END).nonzero().tolist() == [[row, 0] for row in range(4)]
    assert ids[:, 1:].flatten().tolist() == [*tokenizer(text).input_ids[:60]]


def test_text_folder_is_read_recursively_in_seeded_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.md", "sub/c.py", "sub/d.txt", "image.png"):
        (tmp_path / name).write_text(f"# the file {name}\n" * 3)
    orders = {tuple(document.name for document in documents(f"text:{tmp_path}", seed)) for seed in range(8)}
    assert {frozenset(order) for order in orders} == {frozenset({"a.txt", "b.md", "sub/c.py", "sub/d.txt"})}
    assert len(orders) > 1


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), max_size=300), repeats=st.integers(1, 400)
)
def test_pieces_of_a_file_or_text_put_together_are_the_text(
    text: str, repeats: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = text * repeats
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(whole.encode())
    assert "".join(Document("file", path).pieces()) == whole
    assert "".join(Document("text", whole).pieces()) == whole


def test_a_large_file_is_read_only_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.txt"
    path.write_text("total += 1\n" * 100_000)
    read: list[str] = []

    def counted(document: Document) -> Iterator[str]:
        for piece in original(document):
            read.append(piece)
            yield piece

    original = Document.pieces
    monkeypatch.setattr(Document, "pieces", counted)
    build(f"text:{path}")
    assert len(read) == 1  # of 68


def test_a_path_with_a_colon_that_exists_wins_over_a_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl:code"
    path.write_text(json.dumps({"text": "return self\n" * 40, "code": "x"}))
    assert build(f"jsonl:{path}").documents == ("rows.jsonl:code:1",)
    assert build(f"jsonl:{path}:text").documents == ("rows.jsonl:code:1",)


def test_blank_lines_are_skipped_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"text": "return self\n" * 40}) + "\n\n")
    assert build(f"jsonl:{path}").documents == ("rows.jsonl:2",)


def test_text_shorter_than_asked_says_how_much_there_is(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "short.txt"
    path.write_text("print(1)\n" * 10)
    count = len(tokenizer(path.read_text()).input_ids) + 1  # and EOS
    with pytest.raises(UsageError, match=rf"holds {count} tokens in 1 documents, and 4,096 were asked for") as caught:
        build(f"text:{path}", 4096, 16)
    assert caught.value.exit_code == 2
    assert f"at most {count // 16 * 16} tokens" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"rows\.jsonl, line 2: cannot be read as JSON"),
        (b'"\xff"', r"rows\.jsonl, line 2: cannot be read as JSON"),
        (b"[1]", r"rows\.jsonl, line 2: a list, not an object"),
        (b'{"body": 1, "id": 2}', r"rows\.jsonl, line 2: no field 'text'; its fields are: 'body', 'id'"),
        (b"{}", r"its fields are: none"),
        (b'{"text": 3}', r"line 2: field 'text' is neither a string nor a list"),
        (b'{"text": [{"role": "user"}]}', r"line 2: field 'text' is neither a string nor a list"),
        (b'{"text": [{"from": "human", "value": "hi"}]}', r"line 2: field 'text' is neither a string nor a list"),
        (b'{"text": [{"role": 5, "content": "hi"}]}', r"line 2: field 'text' is neither a string nor a list"),
        (b'{"text": []}', r"line 2: field 'text' is neither a string nor a list"),
        (b'{"text": "a \\ud800 b"}', r"line 2: cannot be read as JSON: a string holds half"),
        (b"[" * 100_000, r"line 2: cannot be read as JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=message):
        build(f"jsonl:{path}")


@pytest.mark.parametrize(
    "name",
    ["", "stdlib", "text", "text:", "csv:a.csv", "hf:", "hf:a:b:c:d:e", "text:missing.txt", "jsonl:missing.jsonl"],
)
def test_unusable_corpora_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name)
    assert caught.value.hint


def test_a_folder_without_text_and_a_file_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="no text file in"):
        build(f"text:{tmp_path}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ol\xe9\n")
    with pytest.raises(UsageError, match=r"latin\.txt is not UTF-8 near byte 3"):
        build(f"text:{tmp_path}")


def test_a_chat_without_a_template_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: the tokenizer cannot render this chat"):
        build(f"jsonl:{path}", model=model)


TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({% for key, value in c.function.arguments | items %}{{ key }}={{ value }}{% endfor %})"
    "{% endfor %}{% endfor %}"
)
"""As Qwen3-Coder's: arguments of calls are objects."""


@pytest.mark.parametrize("turn", [{}, {"content": None}])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_a_turn_that_only_calls_tools_is_rendered(
    turn: dict[str, Any], arguments: object, model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    (model / "chat_template.jinja").write_text(TOOLS)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    chat = [{"role": "assistant", "tool_calls": calls, **turn}, {"role": "user", "content": "return self\n" * 40}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": chat}) + "\n")
    ids = build(f"jsonl:{path}", 64, 64, model=model).ids.flatten().tolist()
    assert tokenizer.decode(ids).startswith("<assistant>weather(city=Rome)<user>return self")


def test_content_in_parts_is_read_where_the_template_wants_a_text(model: Path, tmp_path: Path, tokenizer: Any) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    )
    parts = [{"type": "text", "text": "return self\n"}, {"type": "text", "text": "value = 1\n" * 30}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": [{"role": "user", "content": parts}]}))
    ids = build(f"jsonl:{path}", 64, 64, model=model).ids.flatten().tolist()
    assert tokenizer.decode(ids).startswith("<user>return self\nvalue = 1\n")


def test_what_is_no_object_in_a_call_is_refused_with_the_line(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TOOLS)
    calls = [{"function": {"name": "f", "arguments": "not json"}}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": [{"role": "assistant", "tool_calls": calls}]}))
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: the tokenizer cannot render this chat"):
        build(f"jsonl:{path}", model=model)


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "a" * (1 << 21))
    with pytest.raises(UsageError, match="line 1: longer than 1 MiB"):
        build(f"jsonl:{path}")


def test_missing_tokenizer_names_the_files_looked_for(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of tokenizer\.json, tokenizer\.model"):
        build("python-stdlib", model=model)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_is_a_checkpoint_error(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        build("python-stdlib", model=model)


def test_tokenizer_larger_than_the_vocabulary_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 300}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gives token \d+, but config\.json has vocab_size 300"):
        build("python-stdlib", model=model)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("[", "cannot be read as JSON"), ("[]", "not a JSON object"), ("{}", "lacks vocab_size")],
)
def test_unusable_config_is_a_checkpoint_error(model: Path, content: str | None, message: str) -> None:
    path = model / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        build("python-stdlib", model=model)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[Any] | Exception) -> list[tuple[Any, ...]]:
    """A stand-in for the optional package; returns the list of calls that it receives."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[Any]:
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_data_sets_are_streamed_with_config_split_and_field(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "a = 1\n" * 50, "code": "b = 2\n" * 50}])
    assert build("hf:org/name").documents == ("org/name[0]",)
    first, second = build("hf:org/name:python:test:code"), build("hf:org/name:::code")
    assert first.digest == second.digest
    assert calls == [
        ("org/name", None, "train", True),
        ("org/name", "python", "test", True),
        ("org/name", None, "train", True),
    ]


def test_hub_data_set_problems_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"body": "a"}])
    with pytest.raises(UsageError, match=r"data set org/name\[0\]: no field 'text'; its fields are: 'body'"):
        build("hf:org/name")
    fake_datasets(monkeypatch, FileNotFoundError("no such data set"))
    with pytest.raises(UsageError, match=r"cannot stream data set org/name: no such data set"):
        build("hf:org/name")


def test_hub_corpus_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(UsageError, match=r"qconv\[hf\]"):
        build("hf:org/name")
