"""All engines that there are rules about, and which of them a build is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from qconv.engines import llamacpp, mlx, sglang, tensorrt_llm, transformers, vllm
from qconv.engines.rule import Judgement, judge
from qconv.engines.subject import Deployment, Subject

ENGINES = {
    engine.name: engine
    for engine in (
        vllm.ENGINE,
        sglang.ENGINE,
        tensorrt_llm.ENGINE,
        llamacpp.ENGINE,
        transformers.ENGINE,
        mlx.ENGINE,
    )
}
"""By name, in the order in which they are shown."""


def judgements(subject: Subject, names: Sequence[str], deployment: Deployment) -> list[Judgement]:
    """What each of the named engines makes of a build; of all where none is named."""
    return [judge(ENGINES[name], subject, deployment) for name in names or ENGINES]
