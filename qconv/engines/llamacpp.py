"""llama.cpp: what it reads, refuses and computes wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES

from qconv.engines import common
from qconv.engines.rule import Effect, Engine, Rule
from qconv.engines.subject import GGUF, Deployment, Subject

VERSION = "llama.cpp b11549"
_RUN = "loaded with files that lack it"
_TOKENS, _MODEL = "tokenizer.ggml.tokens", "tokenizer.ggml.model"
_LEAD = "GGUF must hold it"


def _arch(subject: Subject) -> str:
    return str((subject.keys or {}).get("general.architecture", ""))


def _key(subject: Subject, name: str) -> Any:
    return (subject.keys or {}).get(f"{_arch(subject)}.{name}")


def _lacks(name: str, *, where: str | None = None) -> common.Breaches:
    """Files without a key of the architecture, of those with a tensor whose name holds ``where``."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        if subject.layout != GGUF or (where is not None and not any(where in one for one in subject.tensors)):
            return
        if _key(subject, name) is None:
            yield f"{_arch(subject)}.{name}"

    return found


def _lacks_tokens(key: str, *models: str) -> common.Breaches:
    """Files without a key of the tokenizer, of those with a vocabulary of these kinds."""

    def found(subject: Subject, deployment: Deployment) -> Iterator[str]:
        keys = subject.keys or {}
        if subject.layout == GGUF and keys.get(_MODEL) in models and keys.get(key) is None:
            yield key

    return found


def _key_length(subject: Subject, deployment: Deployment) -> Iterator[str]:
    hidden, heads = _key(subject, "embedding_length"), _key(subject, "attention.head_count")
    query = _rows_of(subject, "blk.0.attn_q.weight")
    if query is None or not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
        return
    if _key(subject, "attention.key_length") is None and query != hidden // heads * heads:
        yield f"{_arch(subject)}.attention.key_length: attn_q has {query} rows for {heads} heads of {hidden}"


def _rows_of(subject: Subject, name: str) -> int | None:
    """The rows of a tensor; None if it is not there or has none."""
    stored = subject.tensors.get(name)
    return stored.shape[0] if stored is not None and stored.shape else None


def _rows(subject: Subject, deployment: Deployment) -> Iterator[str]:
    tokens, rows = _tokens(subject), _rows_of(subject, "token_embd.weight")
    if tokens and rows is not None and len(tokens) != rows:
        yield f"{len(tokens)} tokens, {rows} rows of token_embd.weight"


def _duplicates(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (repr(token) for token, count in Counter(map(str, _tokens(subject))).items() if count > 1)


def _nul(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (repr(token) for token in _tokens(subject) if isinstance(token, str) and "\0" in token)


def _tokens(subject: Subject) -> Sequence[Any]:
    found = (subject.keys or {}).get(_TOKENS)
    return found if isinstance(found, (list, tuple)) else ()


def _unknown_architecture(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.layout == GGUF and _arch(subject) not in MODEL_ARCH_NAMES.values():
        yield f"general.architecture is {_arch(subject)!r}"


def _half_yarn(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if _key(subject, "rope.scaling.type") == "yarn":
        for name in ("rope.scaling.factor", "rope.scaling.original_context_length"):
            if _key(subject, name) is None:
                yield f"{_arch(subject)}.{name}"


def _other_chunks(subject: Subject, deployment: Deployment) -> Iterator[str]:
    count, used = _key(subject, "expert_count"), _key(subject, "expert_used_count")
    if isinstance(count, int) and count and not isinstance(used, int):
        yield f"{_arch(subject)}.expert_used_count"


def _not_gguf(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from () if subject.layout == GGUF else ("the build is safetensors",)


RULES = (
    Rule(
        "llamacpp/safetensors",
        Effect.REFUSED,
        "run",
        "llama-server reads GGUF",
        "reads no safetensors",
        "qconv quantize SOURCE --fmt gguf:Q4_K_M",
        _not_gguf,
    ),
    Rule(
        "llamacpp/rope-base",
        Effect.WRONG,
        "run",
        f"{_RUN}: KL divergence 0.35",
        "takes 10,000 for the base of rotary embeddings where the file says none",
        f"{_LEAD}: write rope.freq_base",
        _lacks("rope.freq_base", where="attn_q"),
    ),
    Rule(
        "llamacpp/pre-tokenizer",
        Effect.WRONG,
        "run",
        _RUN,
        "cuts text in its default way where tokenizer.ggml.pre says none: other tokens than the model's",
        f"{_LEAD}: write tokenizer.ggml.pre",
        _lacks_tokens("tokenizer.ggml.pre", "gpt2"),
    ),
    Rule(
        "llamacpp/end",
        Effect.WRONG,
        "run",
        f"{_RUN}: token 11 becomes the end",
        "takes token 11 for the end of text where the file names none",
        f"{_LEAD}: write tokenizer.ggml.eos_token_id",
        _lacks_tokens("tokenizer.ggml.eos_token_id", "gpt2"),
    ),
    Rule(
        "llamacpp/nul",
        Effect.WRONG,
        "run",
        "a vocabulary with such a token",
        "cuts a token at a NUL, so that it is another",
        "there is none: this tokenizer has no GGUF",
        _nul,
    ),
    Rule(
        "llamacpp/half-yarn",
        Effect.WRONG,
        "read",
        "src/llama-model.cpp: rope_scaling defaults to factor 1 and the context's length",
        "scales by YaRN with numbers of its own where the file leaves one out",
        f"{_LEAD}: write rope.scaling.factor and original_context_length",
        _half_yarn,
    ),
    Rule(
        "llamacpp/experts-used",
        Effect.REFUSED,
        "read",
        "src/llama-model.cpp requires n_expert_used > 0",
        "refuses experts without the number that is used",
        f"{_LEAD}: write expert_used_count",
        _other_chunks,
    ),
    Rule(
        "llamacpp/epsilon",
        Effect.REFUSED,
        "run",
        _RUN,
        "refuses a file without the norms' epsilon",
        f"{_LEAD}: write attention.layer_norm_rms_epsilon",
        _lacks("attention.layer_norm_rms_epsilon", where="attn_norm"),
    ),
    Rule(
        "llamacpp/key-length",
        Effect.REFUSED,
        "run",
        _RUN,
        "takes the width over the heads for a head's size, and refuses other shapes",
        f"{_LEAD}: write attention.key_length and value_length",
        _key_length,
    ),
    Rule(
        "llamacpp/expert-width",
        Effect.REFUSED,
        "run",
        _RUN,
        "refuses experts of another width than feed_forward_length",
        f"{_LEAD}: write expert_feed_forward_length",
        _lacks("expert_feed_forward_length", where="_exps"),
    ),
    Rule(
        "llamacpp/merges",
        Effect.REFUSED,
        "run",
        _RUN,
        "refuses a BPE vocabulary without merges",
        f"{_LEAD}: write tokenizer.ggml.merges",
        _lacks_tokens("tokenizer.ggml.merges", "gpt2"),
    ),
    Rule(
        "llamacpp/rows",
        Effect.REFUSED,
        "run",
        _RUN,
        "refuses another number of tokens than of rows of the embedding",
        "fill up with unused tokens (qconv does)",
        _rows,
    ),
    Rule(
        "llamacpp/duplicate-token",
        Effect.REFUSED,
        "run",
        "the process aborts",
        "aborts on a token that is there twice",
        "give the tokens names of their own (qconv does)",
        _duplicates,
    ),
    Rule(
        "llamacpp/architecture",
        Effect.REFUSED,
        "read",
        "gguf 0.19.0: MODEL_ARCH_NAMES",
        "does not know this architecture",
        "serve the safetensors build with another engine",
        _unknown_architecture,
    ),
    common.no_template(
        "llamacpp", "run", "llama-server without tokenizer.chat_template", "takes ChatML for the template"
    ),
)
ENGINE = Engine("llamacpp", VERSION, {GGUF: "run"}, RULES)
