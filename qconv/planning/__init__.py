"""From a recipe and a config.json to everything that a build will hold, before any weight is read.

``recipe`` and ``gguf_recipe`` are what the user asks for, from a packaged or an own YAML file and the command line;
``fitting`` checks whether recipe, format and model go together, and says what would; ``plan`` and ``gguf_plan`` are the
result: units, shards, tensors, types. ``estimate`` and ``gguf_outline`` are what ``qconv plan`` shows, from config.json
and the index alone.

A plan decides bytes: the same recipe and config give the same plan on any machine.
"""
