"""How to start an engine on a build so that tools arrive and come back: the parser that fits its chat template.

Names as vLLM's and SGLang's documentation lists them in August 2026.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconv.engines.subject import Deployment, Subject


@dataclass(frozen=True, slots=True)
class Parser:
    """A form of tool calls.

    Attributes:
        mark: Text by which a template of that form is known.
        vllm, sglang: What each calls its parser.
    """

    mark: str
    vllm: str
    sglang: str


PARSERS = (
    Parser("<function=", "qwen3_coder", "qwen3_coder"),
    Parser("<arg_key>", "glm45", "glm45"),
    Parser("<|tool_call_begin|>", "kimi_k2", "kimi_k2"),
    Parser("<minimax:tool_call>", "minimax_m2", "minimax-m2"),
    Parser("<\uff5ctool\u2581call\u2581begin\uff5c>", "deepseek_v31", "deepseekv31"),
    Parser("<|channel|>commentary", "openai", "gpt-oss"),
    Parser("<tool_call>", "hermes", "qwen"),
)
"""The first whose mark is in the template counts."""


def tool_parser(template: str | None) -> Parser | None:
    """The form of tool calls of a chat template; None where it has none that is known."""
    return next((one for one in PARSERS if template is not None and one.mark in template), None)


def command(engine: str, build: str, subject: Subject, deployment: Deployment) -> str | None:
    """The command line that serves a build, with its tool parser; None for an engine that is no server."""
    parser = tool_parser(subject.template)
    match engine:
        case "vllm":
            parts = ["vllm serve", build]
            if deployment.tp > 1:
                parts.append(f"--tensor-parallel-size {deployment.tp}")
            if deployment.ep > 1:
                parts.append("--enable-expert-parallel")
            if parser is not None:
                parts.append(f"--enable-auto-tool-choice --tool-call-parser {parser.vllm}")
        case "sglang":
            parts = ["python -m sglang.launch_server --model-path", build]
            if deployment.tp > 1:
                parts.append(f"--tp-size {deployment.tp}")
            if deployment.ep > 1:
                parts.append(f"--ep-size {deployment.ep}")
            if parser is not None:
                parts.append(f"--tool-call-parser {parser.sglang}")
        case "tensorrt-llm":
            parts = ["trtllm-serve", build]
            if deployment.tp > 1:
                parts.append(f"--tp_size {deployment.tp}")
            if deployment.ep > 1:
                parts.append(f"--ep_size {deployment.ep}")
        case "llamacpp":
            parts = ["llama-server --jinja -m", build]
        case "mlx":
            parts = ["mlx_lm.server --model", build]
        case _:
            return None
    return " ".join(parts)
