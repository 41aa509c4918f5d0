"""GGUF files for llama.cpp: what they hold, which type each tensor gets, and the files themselves.

``container``, ``header`` and ``reader`` write and read files, one or a set; ``names`` are the tensors, and those of the
checkpoint that each is made of, ``changes`` what is done to them; ``forms`` has a file a family of what llama.cpp makes
of it; ``mixture`` says which type each gets under a file type; ``metadata``, ``rope``,
``sampling``, ``tokenizer``, ``special`` and ``pre_tokenizers`` are the key/values, ``keys`` and ``config`` the way back
to a config.json; ``imatrix`` reads and writes importance matrices.

The values of a block are :mod:`qconv.grids.ggml`'s; here types have names, ids and sizes alone.
"""
