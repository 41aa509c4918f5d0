"""Mistral without a sliding window is llama.cpp's llama; its files are read as Llama's."""

from dataclasses import replace

from qconv.formats.gguf.forms import llama

FORM = replace(llama.FORM, model_class="MistralForCausalLM", read=False, window=True)
