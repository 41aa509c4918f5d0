"""A longer context on request: YaRN written into a config.json that has no scaling of its own.

YaRN (Peng et al. 2023, arXiv 2309.00071) rotates long wavelengths ``factor`` times slower, so that positions up to
``factor`` times the original context length look like those that the model was trained on. In a config.json the factor
is static: readers compute every text with it, short ones too, which costs quality there. So nothing writes it unless it
is asked for.

What is written is what readers take it from: ``rope_parameters`` or ``rope_scaling``, whichever the config has, with
``rope_type``, ``factor`` and ``original_max_position_embeddings``; and ``max_position_embeddings`` is raised to their
product, which transformers expects, SGLang takes as the context length as it stands, and llama.cpp's converter copies
as ``context_length``. vLLM multiplies the original length itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qconv.boundary.printable import name_of
from qconv.checkpoint.config import Config, language_part
from qconv.checkpoint.rope import NEW, OLD, THETA, stated_rope
from qconv.errors import UsageError

LARGEST_FACTOR = 64.0
"""More than any model states."""
_LENGTH = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class ExtendedRope:
    """What is asked for.

    Attributes:
        factor: How many times the original context length, more than 1.
        original: That length in tokens; None for ``max_position_embeddings``.
    """

    factor: float
    original: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``yarn:FACTOR`` or ``yarn:FACTOR:ORIGINAL``.

        Raises:
            ValueError: it is neither, or a number is out of range.
        """
        kind, _, rest = text.partition(":")
        factor, colon, original = rest.partition(":")
        if kind != "yarn" or not factor or (colon and not original):
            raise ValueError(f"{name_of(text)!r} is not yarn:FACTOR or yarn:FACTOR:ORIGINAL, such as yarn:4")
        try:
            found = cls(float(factor), int(original) if colon else None)
        except ValueError:
            raise ValueError(f"{name_of(text)!r}: not numbers after yarn:, such as yarn:4") from None
        if not 1.0 < found.factor <= LARGEST_FACTOR:
            raise ValueError(f"a factor of YaRN is above 1 and at most {LARGEST_FACTOR:g}, not {name_of(factor)}")
        if found.original is not None and found.original < 1:
            raise ValueError(f"an original context length is positive, not {found.original}")
        return found

    def is_stated(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json has this very scaling.

        Raises:
            CheckpointError, UsageError: see :func:`qconv.checkpoint.rope.stated_rope`.
        """
        stated = stated_rope(language_part(config))
        same = stated["rope_type"] == "yarn" and stated.get("factor") == self.factor
        return same and self.original in (None, stated.get(_ORIGINAL))

    def __str__(self) -> str:
        """As it is parsed, one spelling for one request."""
        return f"yarn:{self.factor:.12g}" + ("" if self.original is None else f":{self.original}")


def with_extended_rope(config: Mapping[str, Any], asked: str | None) -> dict[str, Any]:
    """A config.json with the YaRN that is asked for; the same one where none is.

    Args:
        config: A whole config.json; of one with a ``text_config``, that part is changed.
        asked: As a recipe's ``rope`` says it, already known to parse; or None.

    Raises:
        UsageError: the model has a scaling already, or no rotary embedding, or no context length to go by; or the
            product is shorter than the model's own context.
        CheckpointError: config.json is malformed, see :func:`qconv.checkpoint.rope.stated_rope`.
    """
    if asked is None:
        return dict(config)
    wanted = ExtendedRope.parse(asked)
    part = language_part(config)
    length = Config(part).integer(_LENGTH, default=0) if part.get(_LENGTH) is not None else 0
    stated = stated_rope(part)
    if stated["rope_type"] != "default":
        raise _refused(
            wanted,
            f"config.json has a scaling already, {name_of(stated['rope_type'])!r}",
            "Leave --rope out: the source's own scaling is kept.",
        )
    if not _rotates(part):
        raise _refused(
            wanted, f"the model ({name_of(str(part.get('model_type')))}) has no rotary embedding", "Leave it out."
        )
    original = wanted.original or length
    if not length:
        raise _refused(wanted, f"config.json lacks {_LENGTH}", "Repair config.json.")
    if original > length:
        raise _refused(
            wanted, f"the original context length {original:,} is more than {_LENGTH} {length:,}", "Give a smaller one."
        )
    longer = math.floor(original * wanted.factor)
    if longer < length:
        raise _refused(
            wanted,
            f"{longer:,} tokens are fewer than the {length:,} that the model has without it",
            "Give a larger factor, or leave it out.",
        )
    scaling = {"rope_type": "yarn", "factor": wanted.factor, _ORIGINAL: original}
    key = NEW if isinstance(part.get(NEW), Mapping) else OLD
    kept = {name: value for name, value in (part.get(key) or part.get(OLD) or {}).items() if name != "type"}
    changed = {**part, key: {**kept, **scaling}, _LENGTH: longer}
    if key == NEW and changed.pop(OLD, None) and THETA in stated:
        changed[NEW].setdefault(THETA, stated[THETA])
    return {**config, "text_config": changed} if part != dict(config) else changed


def _rotates(config: Mapping[str, Any]) -> bool:
    """Whether the model has a rotary embedding: config.json says its base, or transformers' config of the type does."""
    if config.get(THETA) is not None or config.get(NEW) or config.get(OLD):
        return True
    from transformers import AutoConfig

    try:
        made = AutoConfig.for_model(**config)
    except Exception:  # whatever transformers raises on a config that it cannot read
        return False
    return bool(getattr(made, NEW, None) or getattr(made, THETA, None))


def _refused(asked: ExtendedRope, reason: str, hint: str) -> UsageError:
    return UsageError(f"--rope {asked}: {reason}.", hint=hint)
