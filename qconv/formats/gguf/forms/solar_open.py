"""Solar Open is llama.cpp's glm4moe without dense layers; its files are read as GLM's."""

from dataclasses import replace

from qconv.formats.gguf.forms import glm4_moe

FORM = replace(glm4_moe.FORM, model_class="SolarOpenForCausalLM", read=False, rotated=lambda config: 1.0)
