"""What vLLM, SGLang, TensorRT-LLM, llama.cpp, transformers and mlx-lm do with builds, as rules with their source.

``subject`` is a build as an engine sees it: config, headers, keys, and no model that qconv knows. ``rule`` is what a
rule is, and how rules come to a verdict; each engine's module holds its rules, ``common`` what several ask alike,
``names`` how each matches lists of exceptions, ``topology`` how linears divide over ranks, ``launch`` how to start each
with the right tool parser. ``table`` lists the engines; ``readers`` says which of them the documentation names for a
format.

No engine is imported; what runs them to measure is :mod:`qconv.evaluation.engines`.
"""
