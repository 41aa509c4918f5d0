"""AutoRound's own words (``quant_method: auto-round``), told in those of the layouts that it packs in.

``packing_format`` says whose layout the tensors have: ``auto_round:auto_gptq``, ``auto_round:auto_awq``, or
``auto_round:llm_compressor`` for MXFP4 and NVFP4; ``extra_config`` lists what is quantized otherwise or not at all, by
names or regular expressions (auto-round 0.15.1: export/export_to_autoround).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qconv.core.architecture import HEAD

METHODS = ("auto-round", "intel/auto-round")
_PLAIN_BITS = 16
_FLOATS = {
    "mx_fp": ("mxfp4-pack-quantized", "group", 32, True),
    "nv_fp": ("nvfp4-pack-quantized", "tensor_group", 16, "local"),
}
"""By data type: compressed-tensors' format and strategy, the group size, and how inputs are dynamic."""
_LITERAL = re.compile(r"(?:\.\*)?((?:[\w-]|\\\.)+)(?:\.\*)?")


def in_their_words(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in the words of the layout that it names; one of another tool, or that cannot be told so, as it is."""
    plain = _plain(section.get("extra_config"))
    if section.get("quant_method") not in METHODS or plain is None:
        return dict(section)
    bits, size, kind = (section.get(key) for key in ("bits", "group_size", "packing_format"))
    if kind == "auto_round:auto_gptq":
        rules: dict[str, dict[str, Any]] = {f"-:{name}": {} for name in plain}
        said = {"bits": bits, "group_size": size, "sym": section.get("sym", True), "desc_act": False, "dynamic": rules}
        return {"quant_method": "gptq", "checkpoint_format": "gptq", **said}
    if kind == "auto_round:auto_awq":
        names = [found[1].replace("\\.", ".") for found in map(_LITERAL.fullmatch, plain) if found is not None]
        if len(names) == len(plain):
            said = {"bits": bits, "group_size": size, "zero_point": True, "version": "gemm"}
            return {"quant_method": "awq", **said, "modules_to_not_convert": [HEAD, *names]}
    if kind == "auto_round:llm_compressor" and section.get("data_type") in _FLOATS and bits == 4:
        return _compressed(section, plain)
    return dict(section)


def _compressed(section: Mapping[str, Any], plain: list[str]) -> dict[str, Any]:
    """Of MXFP4 or NVFP4, with or without rounded inputs."""
    layout, strategy, size, dynamic = _FLOATS[str(section.get("data_type"))]
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    weights["group_size"] = section.get("group_size", size)
    rounds = section.get("act_bits", _PLAIN_BITS) != _PLAIN_BITS
    inputs = weights | {"num_bits": section.get("act_bits"), "dynamic": dynamic} if rounds else None
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": [HEAD, *(f"re:{name}" for name in plain)],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def _plain(extra: Any) -> list[str] | None:
    """What is left unquantized, by regular expressions; None where something is quantized in other ways."""
    if extra is None:
        return []
    if not isinstance(extra, dict):
        return None
    for options in extra.values():
        if not isinstance(options, dict) or not isinstance(options.get("bits"), int) or options["bits"] < _PLAIN_BITS:
            return None
    return [name if _is_expression(name) else f"{re.escape(name)}$" for name in extra]


def _is_expression(name: str) -> bool:
    return any(character in name for character in "*\\^$[(+?|")
