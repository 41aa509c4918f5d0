"""A trained dense model: the bundled one with one wide MLP in place of its experts, trained on from there.

Embeddings, attention, norms and head are the bundled model's; each layer's MLP starts as the experts that its router
chooses most. It then learns from standard-library files, those that the scripts here hold out left away. 600,000
tokens, a quarter of an hour on a core; the last digits depend on the machine's arithmetic. As weak as the bundled
model, it ranks ways to quantize a dense one.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

from evals.options import TINY
from evals.quality import CALIBRATION, WINDOW, held_out_text, load
from qconv.calibration.corpus import build_tokens, load_tokenizer
from qconv.calibration.documents import documents

EXPERTS = 4
"""Of each layer that become one MLP: as many as the bundled model's router takes for a token."""
STEPS = 300
BATCH, LENGTH = 8, 256
RATE = 1e-3
HELD_OUT = 65536
"""Tokens of held-out text that are kept out of the training."""
_COMPANIONS = ("tokenizer", "chat_template", "generation_config")


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path, resolve_path=True))
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(out: Path, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    make(out, steps, lambda step, loss: click.echo(f"{step} of {steps}: {loss:.3f}"))


def make(out: Path, steps: int, progress: Any) -> None:
    """Train the model and save it in bf16.

    Args:
        out: A folder; made when all is done.
        steps: Of :data:`BATCH` times :data:`LENGTH` tokens.
        progress: Told the step and the mean loss in nats a token since it was last told.
    """
    model = begun(load(TINY)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    seen = 0.0
    for step, ids in zip(range(steps), batches(training_tokens()), strict=False):
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.49 * (1.0 + math.cos(math.pi * step / steps)))
        logits = model(ids[:, :-1]).logits
        loss: Any = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += loss.item()
        if (step + 1) % 25 == 0:
            progress(step + 1, seen / 25)
            seen = 0.0
    staged = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(staged, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(staged)
    for file in TINY.iterdir():
        if file.name.startswith(_COMPANIONS):
            shutil.copy(file, staged)
    os.replace(staged, out)


@torch.no_grad()
def begun(source: Any) -> Any:
    """The dense model before training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = source.config
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=EXPERTS * shape.moe_intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters=shape.rope_parameters,
        eos_token_id=shape.eos_token_id,
        tie_word_embeddings=False,
    )
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), strict=False)  # all but the MLPs
    ids = build_tokens(CALIBRATION, TINY).ids[:8].long()
    routed = source(ids, output_router_logits=True).router_logits
    for layer, moe, logits in zip(model.model.layers, source.model.layers, routed, strict=True):
        counts = torch.bincount(logits.topk(EXPERTS, dim=-1).indices.flatten(), minlength=logits.shape[-1])
        chosen = counts.argsort(descending=True)[:EXPERTS]
        gates, ups = moe.mlp.experts.gate_up_proj[chosen].chunk(2, dim=1)
        layer.mlp.gate_proj.weight.copy_(gates.flatten(0, 1))
        layer.mlp.up_proj.weight.copy_(ups.flatten(0, 1))
        # Factors of chosen experts sum to one.
        layer.mlp.down_proj.weight.copy_(torch.cat(list(moe.mlp.experts.down_proj[chosen]), dim=1) / EXPERTS)
    return model


def training_tokens() -> Tensor:
    """Tokens of standard-library files that are not held out, int64 [tokens]."""
    tokenizer = load_tokenizer(TINY)
    kept_out = {tuple(ids[0].tolist()) for ids in held_out_text(TINY, HELD_OUT)}
    found: list[int] = []
    for document in documents(CALIBRATION.named, CALIBRATION.seed):
        ids = tokenizer("".join(document.pieces()), split_special_tokens=True, verbose=False).input_ids
        first = tokenizer(next(document.pieces(), ""), split_special_tokens=True, verbose=False).input_ids[:WINDOW]
        if tuple(first) not in kept_out:
            found += ids
    return torch.tensor(found)


def batches(tokens: Tensor) -> Iterator[Tensor]:
    """Windows of :data:`LENGTH` predictions at random places, int64 [BATCH, LENGTH + 1] each, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + LENGTH + 1] for start in starts.tolist()])


if __name__ == "__main__":
    main()
