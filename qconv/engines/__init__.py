"""What engines (vLLM, SGLang, transformers ...) do with builds, as data, with the version that was looked at and where.

``rules`` is the table: which engine reads a format, and what it refuses or computes otherwise. ``plan`` and
``quantize`` tell of each build what is known here. No engine is imported; what runs them to measure is
:mod:`qconv.evaluation.engines`.
"""
