"""How the weights of a checkpoint are stored, by its config.json, and whether qconv reads them so.

The one place that decides: what ``inspect`` calls readable is what ``generate`` runs and ``verify`` checks. A layout
that is not read is no damage, and is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.boundary.printable import name_of
from qconv.checkpoint.config import quantization_of, without_quantization
from qconv.checkpoint.fp8 import Fp8Scheme
from qconv.checkpoint.reader import in_config, read_json
from qconv.errors import CheckpointError, UnreadLayoutError
from qconv.formats import Format, detect, formats
from qconv.formats.auto_round import in_their_words
from qconv.formats.base import EXPRESSION
from qconv.formats.mlx import KEY

GPTQ_CONFIG, AWQ_CONFIG = "quantize_config.json", "quant_config.json"
"""Where AutoGPTQ and AutoAWQ once wrote what newer builds have in config.json."""

MLX = "mlx"
"""What is called the method of a config.json that tells of quantization in MLX's words, which name none."""
MAX_EXPRESSIONS = 1000
"""Of a config: tools write a handful, and a model of 90,000 linears takes a while with each."""
_TELLING = ("quant_method", "quant_algo", "format", "packing_format", "version", "load_in_4bit", "load_in_8bit")
"""The keys by which a ``quantization_config`` is called."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How weights are stored, in a way that qconv reads.

    Attributes:
        section: What config.json, or an older tool's file beside it, says of quantization; None for dense weights.
        format: The format whose words the section uses, if it is one that builds are verified in.
        scheme: Which elements of an FP8 weight share a scale; None for what is not FP8.
    """

    section: dict[str, Any] | None
    format: Format | None = None
    scheme: Fp8Scheme | None = None

    @property
    def name(self) -> str | None:
        """What it is called; None for dense weights."""
        if self.format is not None:
            return self.format.name
        return None if self.scheme is None else f"FP8 in {self.scheme}"


def layout_of(folder: Path, config: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint.

    Args:
        folder: Where it lies.
        config: Its config.json.

    Raises:
        UnreadLayoutError: one that qconv does not read; says which.
        CheckpointError: what should describe it is malformed.
    """
    section = quantization_section(folder, config)
    if section is None:
        return Layout(None)
    section = in_their_words(section)
    _require_few(folder, section)
    found = detect({"quantization_config": section})
    problem: CheckpointError | None = None
    try:
        with in_config(folder):
            scheme = Fp8Scheme.parse(section)
    except CheckpointError as error:  # FP8 of several schemes at once is no source, and yet may be a build
        scheme, problem = None, error
    if found is not None:
        try:
            with in_config(folder):
                found.read_config(section, torch.bfloat16)
            return Layout(section, found, scheme)
        except CheckpointError as error:
            problem = problem or error
    if scheme is not None:  # FP8 that is read, though in the words of no format of qconv's own
        return Layout(section, None, scheme)
    if problem is not None:
        raise UnreadLayoutError(problem.message, hint=problem.hint) from problem
    raise _unread(folder, f"quantization_config is of a kind that qconv does not run: {_described(section)}", section)


def quantization_section(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config``, or what other tools call it or write beside config.json; None if there is none.

    Raises:
        CheckpointError: it is not an object.
    """
    section = quantization_of(config)
    mlx = config.get("quantization")  # MLX may repeat it as quantization_config, where it names no method
    if isinstance(mlx, dict) and (section is None or section == mlx):
        return {"quant_method": MLX} | mlx
    if section is None:
        section = config.get("compression_config")
    for method, name in (("gptq", GPTQ_CONFIG), ("awq", AWQ_CONFIG)):
        if section is None and (folder / name).is_file():
            section = {"quant_method": method} | read_json(folder / name)
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config is no object.", hint="Repair config.json."
        )
    _require_few(folder, section)
    return section


def _require_few(folder: Path, section: Mapping[str, Any] | None) -> None:
    """Check that a section holds no more regular expressions than every module can be held against.

    Raises:
        CheckpointError: it does.
    """
    expressions = _expressions(section)
    if expressions > MAX_EXPRESSIONS:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config holds {expressions:,} regular expressions; at most "
            f"{MAX_EXPRESSIONS:,} are read.",
            hint="Name modules, or several in one expression.",
        )


def _expressions(section: Mapping[str, Any] | None) -> int:
    """The regular expressions among exceptions and targets of a section, each of which every module is held against."""
    groups = (section or {}).get("config_groups")
    lists = [
        *((section or {}).get(key) for key in ("ignore", "modules_to_not_convert")),
        *(one.get("targets") for one in (groups.values() if isinstance(groups, dict) else ()) if isinstance(one, dict)),
    ]
    entries = (entry for one in lists if isinstance(one, list) for entry in one)
    return sum(isinstance(entry, str) and entry.startswith(EXPRESSION) for entry in entries)


def strip_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without its quantization section, by any name."""
    said = ("compression_config", KEY)
    return {key: value for key, value in without_quantization(config).items() if key not in said}


def _described(section: Mapping[str, Any]) -> str:
    """What a section calls itself, in a few words."""
    told = {key: section[key] for key in _TELLING if section.get(key) not in (None, False, {}, [])}
    groups = section.get("config_groups")
    for group in list(groups.values())[:1] if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        told |= {key: weights[key] for key in ("num_bits", "type") if isinstance(weights, dict) and key in weights}
    told |= {key: section[key] for key in ("bits", "group_size") if key in section}
    return ", ".join(f"{key} {name_of(repr(value), 60)}" for key, value in told.items()) or "it does not say which"


def _unread(folder: Path, what: str, section: Mapping[str, Any]) -> UnreadLayoutError:
    hint = f"It reads {', '.join(formats())} and GGUF."
    if section.get("quant_method") == MLX:
        hint = "Convert it first: qconv convert --to compressed-tensors, or --to bf16."
    return UnreadLayoutError(f"{folder / 'config.json'}: {what}.", hint=hint)
