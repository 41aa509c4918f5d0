"""What is asked of a HumanEval task, as a suite writes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qconv.evaluation.engines.base import Sampling
from qconv.evaluation.humaneval.prompts import Style, stop_strings
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.suites import FolderName

PROBLEMS = 164


class HumanEvalSettings(BaseModel):
    """A HumanEval task: greedy by default, with one answer a problem."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["humaneval"] = "humaneval"
    name: FolderName = "humaneval"
    prompt: Style = "completion"
    """``chat`` puts an instruction through the model's chat template and takes the code out of the answer."""
    problems: Annotated[int, Field(strict=True, ge=1, le=PROBLEMS)] = PROBLEMS
    """Only the first so many."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 512
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    samples: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    k: Annotated[tuple[Annotated[int, Field(strict=True, ge=1)], ...], Field(min_length=1, max_length=1000)] = (1,)
    """Which pass@k are estimated."""
    cpu_seconds: Annotated[int, Field(strict=True, ge=1, le=3600)] = 4
    """Processor time of one candidate."""
    memory_mib: Annotated[int, Field(strict=True, ge=128, le=1 << 20)] = 512
    """Address space of one candidate."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> HumanEvalSettings:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs at least as many samples, not {self.samples}")
        if self.temperature == 0.0 and self.samples > 1:
            raise ValueError(f"{self.samples} samples at temperature 0 are all the same")
        return self

    def limits(self) -> Limits:
        """Of one candidate. On the clock it has five times its processor time: a machine may be busy."""
        return Limits(self.cpu_seconds, 5.0 * self.cpu_seconds, memory=self.memory_mib << 20)

    def sampling(self, seed: int) -> Sampling:
        """How the engine completes the prompts."""
        stop = stop_strings(self.prompt)
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.samples, stop, seed)
