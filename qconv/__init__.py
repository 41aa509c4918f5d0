"""Quantize very large mixture-of-experts language models layer by layer, in bounded memory."""

__version__ = "0.1.0"
