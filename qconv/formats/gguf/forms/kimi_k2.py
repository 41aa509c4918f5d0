"""Kimi-K2 is DeepSeek-V3 under another name."""

from dataclasses import replace

from qconv.formats.gguf.forms import deepseek_v3

FORM = replace(deepseek_v3.FORM, read=False)
