"""A GGUF file that llama.cpp's code wrote: ggml's encoders, the gguf package's names, keys and container.

llama.cpp's own conversion script is in no package, so its steps are taken here with the package's functions. qconv must
compute what transformers computes with the weights that the package itself decodes, and what llama.cpp computes up to
the rounding of its activations to eight bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qconv
from tests.conftest import random_model, save_model
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

IDS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
TYPES: dict[str, tuple[str, str]] = {
    "self_attn.q_proj": ("Q4_K", "Q4_0"),
    "self_attn.k_proj": ("Q5_K", "Q4_1"),
    "self_attn.v_proj": ("Q6_K", "Q5_0"),
    "self_attn.o_proj": ("Q8_0", "Q5_1"),
    "mlp.experts.gate_proj": ("IQ4_XS", "Q4_K"),
    "mlp.experts.up_proj": ("Q3_K", "Q4_K"),
    "mlp.experts.down_proj": ("Q2_K", "Q6_K"),
}
"""ggml's type of each linear, in the first and in the second layer."""
OUTER = {"model.embed_tokens": "Q5_K", "lm_head": "Q6_K"}
Array = Any


def weights_of(model: Any) -> dict[str, Tensor]:
    """By the names of the checkpoint, the experts of one projection stacked, as llama.cpp has them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True):
                tensors[f"{name.removesuffix('gate_up_proj')}{part}.weight"] = half
        else:
            tensors[f"{name}.weight" if name.endswith("down_proj") else name] = tensor
    return tensors


def type_of(name: str) -> str:
    """ggml's type of a tensor."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return OUTER[module]
    _, _, layer, part = module.split(".", 3) if module.startswith("model.layers.") else ("", "", "0", "")
    return TYPES[part][int(layer)] if part in TYPES else "F32"


def write(config: Any, encoded: Mapping[str, tuple[str, Array]], path: Path) -> None:
    """A file with keys and names by the package's own functions."""
    writer: Any = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, (type, data) in encoded.items():
        renamed = names.get_name(name, try_suffixes=(".weight",))
        assert renamed is not None, name
        writer.add_tensor(renamed, data, raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_ggmls_encoders(client: Client, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4}
    source = random_model("qwen3_moe", **sizes, norm_topk_prob=True)
    save_model(source, tmp_path / "source", "1GB")
    plain = {name: tensor.detach().numpy() for name, tensor in weights_of(source).items()}
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in plain.items() if type_of(name) != "F32"}
    np.savez(tmp_path / "request.npz", **rows)  # type: ignore[arg-type]  # names of arrays are taken for an option
    types = sorted({type_of(name) for name in rows})
    client("ggml", "ggml_quantize", tmp_path / "request.npz", tmp_path / "answer.npz", *types)
    answer = np.load(tmp_path / "answer.npz")
    encoded: dict[str, tuple[str, Array]] = {}
    decoded: dict[str, Tensor] = {}
    for name, array in plain.items():
        type = type_of(name)
        if type == "F32":
            encoded[name], decoded[name] = (type, array), torch.from_numpy(array)
            continue
        data = answer[f"{type}/{name}"]
        encoded[name] = type, data.reshape(*array.shape[:-1], data.shape[-1])
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type])
        decoded[name] = torch.from_numpy(values.reshape(array.shape).copy())
    write(source.config, encoded, tmp_path / "model.gguf")

    exact = with_weights(AutoModelForCausalLM, tmp_path / "source", decoded, tmp_path / "dense")
    packed = qconv.load(tmp_path / "model.gguf", dtype=torch.float32)
    with torch.no_grad():
        wanted, got = exact(IDS).logits, packed(IDS).logits
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(IDS)
    assert torch.equal(packed.generate(IDS, **options), exact.generate(IDS, **options))

    request, found = tmp_path / "request.json", tmp_path / "found.npz"
    request.write_text(json.dumps({"sequences": IDS.tolist()}))
    client("llamacpp", "llamacpp", tmp_path / "model.gguf", request, found)
    theirs = torch.from_numpy(np.stack([np.load(found)[f"logits/{index}"] for index in range(len(IDS))]))
    # Measured 0.02, with all activations rounded to eight bits there.
    ours = got.log_softmax(-1)
    assert float((ours.exp() * (ours - theirs.log_softmax(-1))).sum(-1).mean()) < 0.06


def with_weights(loader: Any, source: Path, decoded: Mapping[str, Tensor], out: Path) -> Any:
    """transformers' model of the source's config with other weights, the experts apart again, in float32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in decoded.items():
        before, experts, part = name.partition(".experts.")
        if experts:
            tensors |= {f"{before}.experts.{index}.{part}": one.contiguous() for index, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    model, info = loader.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
