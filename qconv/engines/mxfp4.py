"""Rules about gpt-oss's layout: what engines make of experts that do not lie in it as they expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from qconv.engines.common import of_layout
from qconv.engines.rule import Effect, Known, Rule
from qconv.engines.subject import Deployment, Subject

LAYOUT = "mxfp4"
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_BLOCK, _BYTES = 32, 16
_CONVERT = "qconv convert --to gpt-oss writes it"


def _stems(subject: Subject) -> Iterator[str]:
    """The tensors of all experts of a layer that have codes, without what tells codes from scales."""
    yield from (name.removesuffix(_BLOCKS) for name in subject.tensors if name.endswith(f"_proj{_BLOCKS}"))


def _each(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (name for name in subject.tensors if ".experts." in name and name.endswith("_proj.weight_blocks"))


def _without_scales(subject: Subject, deployment: Deployment) -> Iterator[str]:
    yield from (stem + _SCALES for stem in _stems(subject) if stem + _SCALES not in subject.tensors)


def _without_bias(subject: Subject, deployment: Deployment) -> Iterator[str]:
    if subject.model_type == "gpt_oss":
        yield from (stem + _BIAS for stem in _stems(subject) if stem + _BIAS not in subject.tensors)


def _misshapen(subject: Subject, deployment: Deployment) -> Iterator[str]:
    for stem in _stems(subject):
        blocks, scales = subject.tensors[stem + _BLOCKS].shape, subject.tensors.get(stem + _SCALES)
        if scales is not None and blocks != (*scales.shape, _BYTES):
            yield stem + _BLOCKS


def _rule(
    key: str,
    effect: Effect,
    known: Known,
    source: str,
    what: str,
    breaches: Callable[[Subject, Deployment], Iterable[str]],
    remedy: str = _CONVERT,
) -> Rule:
    return Rule(key, effect, known, source, what, remedy, of_layout(LAYOUT)(breaches))


_RUN = "loaded on CPU with tiny builds of gpt_oss"
TRANSFORMERS = (
    _rule(
        "transformers/mxfp4-experts",
        Effect.WRONG,
        "run",
        _RUN,
        "knows an expert's own blocks by no name, and computes with random experts",
        _each,
    ),
    _rule(
        "transformers/mxfp4-bias",
        Effect.WRONG,
        "run",
        _RUN,
        "makes up biases of experts where they are missing",
        _without_bias,
    ),
    _rule(
        "transformers/mxfp4-scales",
        Effect.REFUSED,
        "run",
        _RUN,
        "finds blocks without scales",
        _without_scales,
        "download the checkpoint again",
    ),
    _rule(
        "transformers/mxfp4-shape",
        Effect.REFUSED,
        "run",
        _RUN,
        f"takes blocks of {_BLOCK} codes along an axis of their own alone, a scale for each",
        _misshapen,
    ),
)
_LOADER = "model_executor/models/gpt_oss.py: _load_weights_mxfp4 passes over names that it has no parameter for"
VLLM = (
    _rule(
        "vllm/mxfp4-experts",
        Effect.WRONG,
        "read",
        _LOADER,
        "passes over an expert's own blocks, and computes with what memory held",
        _each,
    ),
    _rule(
        "vllm/mxfp4-parts",
        Effect.WRONG,
        "read",
        "model_loader/default_loader.py: of a quantized model nobody asks whether every parameter was loaded",
        "computes with what memory held where blocks have no scales, or experts no biases",
        lambda subject, deployment: (*_without_scales(subject, deployment), *_without_bias(subject, deployment)),
        "download the checkpoint again",
    ),
)
