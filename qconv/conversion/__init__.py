"""One layout to another without rounding again: the same codes and scales under other names, dtypes and words.

``weights`` is a build as the float32 weights that it stands for; ``exact`` decides whether a format holds the same
numbers, and gives the weight in it; ``dense`` is the layout without codes; ``target`` is a build that is written from
another one by the same loop, journal and checks as every build, and must equal it bit for bit; ``pipeline`` is the
whole of ``qconv convert`` for safetensors, ``gguf`` splits and merges GGUF.
"""
