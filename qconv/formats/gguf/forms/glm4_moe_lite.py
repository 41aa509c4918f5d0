"""GLM-4.7-Flash is llama.cpp's deepseek2; its files are read as DeepSeek-V3's."""

from dataclasses import replace

from qconv.formats.gguf.forms import deepseek_v3
from qconv.formats.gguf.forms.base import routing

FORM = replace(deepseek_v3.FORM, model_class="Glm4MoeLiteForCausalLM", read=False, stated=routing(scale=1.8, norm=True))
