"""Quantizers of transformers that load AWQ and GPTQ builds as qconv does where transformers itself cannot.

transformers 5 needs gptqmodel for both, and even with it leaves the experts of a fused sparse block random, without a
word. Each class here is transformers' own and behaves as such where that works: with gptqmodel, on dense models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qconv.checkpoint.maps import SharedMaps
from qconv.core.architecture import Moe
from qconv.errors import UsageError
from qconv.runtime.backends import get_backend
from qconv.runtime.files import open_files
from qconv.runtime.packed import DenseWeight
from qconv.runtime.skeleton import Installer

METHODS = ("awq", "gptq")


def register() -> None:
    """Put the quantizers in transformers' registry; twice does no harm."""
    from transformers.quantizers import auto

    for method in METHODS:
        original = auto.AUTO_QUANTIZER_MAPPING[method]
        if not getattr(original, "qconv", False):
            del auto.AUTO_QUANTIZER_MAPPING[method]
            auto.register_quantizer(method)(_quantizer(original))


def _quantizer(original: Any) -> Any:
    """A subclass of a quantizer of transformers that packs where the original cannot load."""
    from transformers.quantizers.base import HfQuantizer

    class PackedQuantizer(original):  # type: ignore[misc]  # the base is known at run time only
        qconv = True
        packs = False

        def __init__(self, quantization_config: Any, **options: Any) -> None:
            try:
                super().__init__(quantization_config, **options)
            except ImportError:
                HfQuantizer.__init__(self, quantization_config, **options)
                self.packs = self.pre_quantized
                if not self.packs:
                    raise

        def validate_environment(self, *arguments: Any, **options: Any) -> None:
            try:
                if not self.packs:
                    super().validate_environment(*arguments, **options)
            except (ImportError, RuntimeError):
                if not self.pre_quantized:
                    raise
                self.packs = True

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            updated: torch.dtype = dtype if self.packs else super().update_dtype(dtype)
            return updated

        def preprocess_model(self, model: Any, dtype: Any = None, **options: Any) -> None:
            if self.pre_quantized and _has_experts(model):
                self.packs = True
            if not self.packs:
                super().preprocess_model(model, dtype=dtype, **options)
                return
            model.is_quantized = True
            model.quantization_method = self.quantization_config.quant_method
            with torch.device("cpu"):  # transformers calls from within the meta device
                install_packed(model, options["checkpoint_files"], dtype, options.get("device_map"))

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            return model if self.packs else super()._process_model_after_weight_loading(model, **options)

        def is_serializable(self, *arguments: Any, **options: Any) -> bool:
            return not self.packs and bool(super().is_serializable(*arguments, **options))

        @property
        def is_trainable(self) -> bool:
            return not self.packs and bool(super().is_trainable)

    PackedQuantizer.__name__ = PackedQuantizer.__qualname__ = f"Packed{original.__name__}"
    return PackedQuantizer


def install_packed(model: Any, checkpoint_files: Sequence[str], dtype: torch.dtype, device_map: Any) -> None:
    """Replace what is packed in transformers' empty model; what is dense it loads itself afterwards.

    Args:
        model: On the meta device.
        checkpoint_files: The shards, in the build's folder.
        dtype: The dtype of what is not packed.
        device_map: transformers' own; all of the model on one device.

    Raises:
        CheckpointError: the build is damaged.
        UsageError: the model is to be spread over devices.
    """
    files = open_files(Path(checkpoint_files[0]).parent, SharedMaps())
    installer = Installer(model, files, get_backend("auto", _device(device_map)), dtype)
    for layer in files.architecture.layers:
        for linear in layer.linears():
            # Experts come together below.
            if ".experts." not in linear.name and not isinstance(files.weight(linear), DenseWeight):
                installer.linear(linear)
        if isinstance(layer.mlp, Moe):
            installer.experts(layer.mlp)
    # The packed tensors' names mean nothing to the model that is left.
    leaves = r"\.(qweight|qzeros|scales|g_idx)$"
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = known | {leaves, r"\.experts\.\d+\."}


def _has_experts(model: Any) -> bool:
    return any(hasattr(module, "gate_up_proj") and hasattr(module, "num_experts") for module in model.modules())


def _device(device_map: Any) -> torch.device:
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    if len(places) > 1 or places & {"auto", "balanced", "disk"}:
        raise UsageError("device_map: a packed model stays on one device.", hint='Give device_map="cpu" or "cuda:0".')
    place = places.pop()
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
