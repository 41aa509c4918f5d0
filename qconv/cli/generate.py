"""``qconv generate``: what a build says."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from qconv.boundary.printable import printable
from qconv.cli.console import ReaderGone, print_json, say, stderr, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT, SEED, Temperature
from qconv.cli.options import json_option, one_device_option
from qconv.cli.progress import reporting
from qconv.errors import UsageError


@click.command(
    short_help="Let a build write text.",
    epilog=examples(
        "qconv generate BUILD --chat 'Sort a list in place.'",
        "echo 'def add(a, b):' | qconv generate BUILD --max-tokens 40",
    ),
)
@click.argument("build")
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="Text to go on from; repeat it for a batch.")
@click.option("--chat", "messages", metavar="TEXT", multiple=True, help="A user's message, put in the chat template.")
@click.option("--max-tokens", type=COUNT, default=128, show_default=True, help="Most tokens to add.")
@click.option("--temperature", type=Temperature(), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the samples.")
@click.option("--backend", default="auto", show_default=True, help="auto, cpu, cuda or reference.")
@one_device_option(None, "Where to compute: cpu, cuda, cuda:1 or auto; by default a GPU where there is one.")
@click.option("--dtype", help="float32, bfloat16 or float16; by default the model's.")
@json_option
def command(
    build: str,
    prompts: Sequence[str],
    messages: Sequence[str],
    max_tokens: int,
    temperature: float,
    seed: int,
    backend: str,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Let BUILD go on from a prompt, computing from its packed weights.

    BUILD is a folder, a Hub id, or a GGUF file. The prompt comes from standard input if none is given.
    """
    if prompts and messages:
        raise UsageError("--prompt and --chat cannot be mixed.", hint="Give one of them.")
    given = list(prompts or messages) or [_standard_input()]
    with reporting(quiet=True):
        from qconv.chat.templates import ChatTemplates
        from qconv.checkpoint.hub import resolve_build
        from qconv.folders.state import require_finished
        from qconv.runtime.decoding import decoding_settings
        from qconv.runtime.generation import complete, recommended
        from qconv.runtime.loading import load
        from qconv.runtime.tokenizer import load_tokenizer, own_tokenizer

        path = resolve_build(build)
        require_finished(path if path.is_dir() else path.parent)
        tokenizer, own = load_tokenizer(path), own_tokenizer(path)
        texts = given
        if messages:
            with ChatTemplates(tokenizer, path, date=None) as chats:
                texts = [chats.render([{"role": "user", "content": one}], answer=True) for one in messages]
        model = load(path, backend=backend, device=device, dtype=dtype)
        started = time.perf_counter()
        completions = complete(
            model,
            tokenizer,
            texts,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            special_tokens=not messages,
            listener=_write if len(texts) == 1 and not as_json else None,
        )
        seconds = time.perf_counter() - started
    tokens = sum(completion.tokens for completion in completions)
    settings, unused = decoding_settings(max_tokens, temperature, seed=seed), recommended(model)
    if as_json:
        values = [
            {"prompt": one.prompt, "text": one.text, "tokens": one.tokens, "stopped": one.stopped}
            for one in completions
        ]
        told = {"settings": settings, "generation_config_not_applied": unused}
        print_json({"path": str(path), "completions": values, "tokens": tokens, "seconds": seconds, **told})
        return
    if len(completions) == 1:
        _write("\n")
    for text, completion in zip(given, completions, strict=True) if len(completions) > 1 else ():
        say(stdout(), f"> {text}", style="bold")
        say(stdout(), f"{completion.text}\n")
    speed = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second"
    say(
        stderr(), f"{speed}; {'greedy' if temperature == 0 else f'sampled at temperature {temperature:g}'}", style="dim"
    )
    if own is not None:
        say(stderr(), f"tokenizer: the file's own, {own}", style="dim")
    if unused:
        listed = ", ".join(f"{key} {value}" for key, value in unused.items())
        say(stderr(), f"not applied of generation_config.json: {listed}", style="dim")


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise UsageError("no prompt.", hint="Give --prompt TEXT or --chat TEXT, or pipe the prompt in.")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error.reason} at byte {error.start}.") from error


def _write(text: str) -> None:
    """Show a piece of the answer at once; on a terminal nothing in it acts."""
    shown = printable(text, keep="\n\t") if sys.stdout.isatty() else text
    try:
        sys.stdout.write(shown)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None
