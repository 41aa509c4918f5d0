"""Where calibration text comes from: a corpus name resolves to a stream of documents, read only as far as consumed.

=============================================  ====================================================================
``python-stdlib``                              the running interpreter's own standard library; offline
``agent``                                      by turns one of its files, and a conversation with tools about one
``text:PATH``                                  a text file, or every text file of a folder
``jsonl:PATH[:FIELD]``                         one document a line: the string or chat in FIELD (default ``text``)
``hf:DATASET[:CONFIG][:SPLIT][:FIELD]``        streamed from the Hub (``pip install qconv[hf]``); parts may be empty,
                                               as in ``hf:NAME::train:content``
=============================================  ====================================================================

Files of a folder and of the standard library come in an order drawn from the seed; lines and rows come in their own
order, since shuffling them would need all of them.
"""

from __future__ import annotations

import codecs
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qconv.boundary.reading import parse_json
from qconv.calibration.agent_corpus import TOOLS, conversation
from qconv.errors import QconvError, UsageError

STDLIB = "python-stdlib"
AGENT = "agent"
DEFAULT_FIELD = "text"
DEFAULT_SPLIT = "train"

PIECE_SIZE = 1 << 14
"""Bytes (or characters) of one piece of a document. A piece ends with a line, for tokens rarely reach across one."""

LONGEST_LINE = 64 << 20
"""Bytes of one line of a ``jsonl`` file, which is read whole."""

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".tex", ".html", ".sh", ".py", ".js", ".jsx", ".ts", ".tsx", ".java", ".kt", ".scala", ".c"}
    | {".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".rs", ".rb", ".php", ".swift", ".lua", ".r", ".jl", ".sql"}
)

_NOT_CODE_TO_LEARN_FROM = frozenset(
    # Tests and other people's packages are not the library; encodings is generated character tables.
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "encodings"}
)
# Written when the interpreter was built, with that machine's paths: the corpus would differ from machine to machine.
_BUILD_PREFIXES = ("_sysconfigdata", "config-")


_SAYING = frozenset({"content", "tool_calls"})
"""A turn has one of these, or it is no turn: ``{"from": ..., "value": ...}`` would be rendered as nothing."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: What errors and reports call it: a relative path, ``file.jsonl:3``.
        content: A file, a text, or a chat as a list of ``{"role": ..., "content": ...}``; a turn that only calls tools
            has ``tool_calls`` and no content.
    """

    name: str
    content: Path | str | list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] | None = None
    """What a chat may call, in OpenAI's form."""

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about PIECE_SIZE that end with a line, read as they are asked for.

        Raises:
            UsageError: the file cannot be read or is not UTF-8.
            TypeError: the document is a chat; only a tokenizer's template turns one into text.
        """
        if isinstance(self.content, Path):
            return _file_pieces(self.content)
        if isinstance(self.content, str):
            return _text_pieces(self.content)
        raise TypeError(f"{self.name} is a chat")


def documents(corpus: str, seed: int) -> Iterator[Document]:
    """The documents of a corpus in the order in which calibration uses them; the same seed gives the same order.

    Raises:
        UsageError: unknown corpus, missing or unreadable file, a bad line or row, the ``hf`` extra not installed.
    """
    kind, colon, rest = corpus.partition(":")
    if corpus == STDLIB:
        return _stdlib(seed)
    if corpus == AGENT:
        return _agent(seed)
    if colon and rest:
        if kind == "text":
            return _text(Path(rest), seed)
        if kind == "jsonl":
            return _jsonl(*_split_field(rest))
        if kind == "hf":
            return _hub(rest)
    raise UsageError(
        f"unknown calibration corpus {corpus!r}.",
        hint=f"Choose {STDLIB}, {AGENT}, text:PATH, jsonl:PATH[:FIELD] or hf:DATASET[:CONFIG][:SPLIT][:FIELD].",
    )


def _stdlib(seed: int) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _shuffled(_files(root, frozenset({".py"}), _NOT_CODE_TO_LEARN_FROM, _BUILD_PREFIXES), seed):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(path.relative_to(root).as_posix(), text)


def _agent(seed: int) -> Iterator[Document]:
    """Files of the standard library: every other one that a conversation can be about gives one instead."""
    talks = False
    for document in _stdlib(seed):
        assert isinstance(document.content, str)
        chat = conversation(document.name, document.content, seed) if talks else None
        yield document if chat is None else Document(f"conversation about {document.name}", chat, TOOLS)
        talks = chat is None


def _text(path: Path, seed: int) -> Iterator[Document]:
    if path.is_file():
        yield Document(path.name, path)
        return
    if not path.is_dir():
        raise UsageError(f"calibration text: no such file or folder: {path}.", hint="Check the path after 'text:'.")
    files = _files(path, TEXT_SUFFIXES)
    if not files:
        raise UsageError(
            f"calibration text: no text file in {path}.",
            hint=f"Files counted as text end with one of: {' '.join(sorted(TEXT_SUFFIXES))}.",
        )
    for file in _shuffled(files, seed):
        yield Document(file.relative_to(path).as_posix(), file)


def _jsonl(path: Path, name: str) -> Iterator[Document]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE + 1), b""), start=1):
                where = f"calibration file {path}, line {number}"
                if len(line) > LONGEST_LINE:
                    raise UsageError(
                        f"{where}: longer than {LONGEST_LINE >> 20} MiB.",
                        hint="Give one document a line, or text:PATH.",
                    )
                if line.strip():
                    row = parse_json(line, where, UsageError, hint="Repair or remove the line.")
                    yield Document(f"{path.name}:{number}", _field(row, name, where))
    except OSError as error:
        raise UsageError(
            f"cannot read calibration file {path}: {error.strerror}.", hint="Check the path after 'jsonl:'."
        ) from error


def _hub(spec: str) -> Iterator[Document]:
    parts = spec.split(":")
    if len(parts) > 4:
        raise UsageError(f"hf:{spec}: too many parts.", hint="Write hf:DATASET[:CONFIG][:SPLIT][:FIELD].")
    dataset, config, split, name = parts + [""] * (4 - len(parts))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"corpus hf:{spec} needs the datasets package.", hint="Install it with: pip install 'qconv[hf]'."
        ) from error
    try:
        rows = load_dataset(dataset, config or None, split=split or DEFAULT_SPLIT, streaming=True)
        for number, row in enumerate(rows):
            where = f"{dataset}[{number}]"
            yield Document(where, _field(row, name or DEFAULT_FIELD, f"data set {where}"))
    except QconvError:
        raise
    # What datasets and what it reads with raise: not found, no network, a bad config or split, a damaged file.
    except Exception as error:
        raise UsageError(
            f"cannot stream data set {dataset}: {error}.", hint="Check its name, config, split and the network."
        ) from error


def _field(row: Any, name: str, where: str) -> str | list[dict[str, Any]]:
    """The text or chat in a row's field.

    Raises:
        UsageError: not an object, no such field, or a field that is neither text nor chat.
    """
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {type(row).__name__}, not an object with fields.", hint="Repair the line.")
    if name not in row:
        raise UsageError(
            f"{where}: no field {name!r}; its fields are: {', '.join(map(repr, row)) or 'none'}.",
            hint="Name the field after the corpus, as in jsonl:PATH:FIELD.",
        )
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return value
    raise UsageError(
        f"{where}: field {name!r} is neither a string nor a list of {{role, content}}.", hint="Choose another field."
    )


def _is_turn(value: Any) -> bool:
    """Whether this is a turn of a chat: by someone, and with content or calls of tools, if only null."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and not _SAYING.isdisjoint(value)


def in_plain_form(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat of OpenAI's form in the one that most templates are written for.

    Arguments of tool calls are objects and not their JSON text, and content is a text and not a list of parts of it.
    """
    return [_in_plain_form(turn) for turn in chat]


def _in_plain_form(turn: dict[str, Any]) -> dict[str, Any]:
    calls, content, plain = turn.get("tool_calls"), turn.get("content"), dict(turn)
    if isinstance(calls, list):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            plain["content"] = "".join(map(str, texts))
    return plain


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        parsed = parse_json(arguments, "arguments", UsageError)
    except UsageError:
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _split_field(rest: str) -> tuple[Path, str]:
    """``PATH[:FIELD]``; a file whose own name has the colon wins."""
    path, colon, name = rest.rpartition(":")
    if not colon or not name or Path(rest).exists():
        return Path(rest), DEFAULT_FIELD
    return Path(path), name


def _files(
    root: Path, suffixes: frozenset[str], skip: frozenset[str] = frozenset(), skip_prefixes: tuple[str, ...] = ()
) -> list[Path]:
    """Files below ``root`` with those suffixes, sorted by relative path; links to folders are not followed.

    Raises:
        UsageError: a folder cannot be listed.
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_unlistable):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(skip_prefixes)]
        kept = (name for name in names if not name.startswith(skip_prefixes))
        found += (Path(folder, name) for name in kept if Path(name).suffix.lower() in suffixes)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _unlistable(error: OSError) -> None:
    raise UsageError(
        f"cannot list calibration folder {error.filename}: {error.strerror}.", hint="Check its permissions."
    ) from error


def _shuffled(paths: list[Path], seed: int) -> list[Path]:
    random.Random(seed).shuffle(paths)
    return paths


def _text_pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE_SIZE - 1, start + 2 * PIECE_SIZE)
        stop = newline + 1 if newline >= 0 else start + 2 * PIECE_SIZE
        yield text[start:stop]
        start = stop


def _file_pieces(path: Path) -> Iterator[str]:
    """Opened anew for each piece: many documents may be half-read at once, and a file may be larger than memory."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    while True:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(PIECE_SIZE)
                data += file.readline(PIECE_SIZE)
            text = decoder.decode(data, final=not data)
        except OSError as error:
            raise UsageError(f"cannot read calibration text {path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UsageError(
                f"calibration text {path} is not UTF-8 near byte {offset + error.start}.",
                hint="Convert the file to UTF-8 or leave it out.",
            ) from error
        if not data:
            return
        offset += len(data)
        yield text
