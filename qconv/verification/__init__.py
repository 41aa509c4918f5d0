"""Whether a build is what it claims: its checksums, its structure, its values, and its distance from the source.

``build`` verifies safetensors, ``gguf`` GGUF files; ``outcome`` is what either came to. ``checksums`` and
``companions`` look at files, ``structure`` and ``keys`` at what they declare, ``values`` at numbers that cannot be,
``weights`` and ``rows`` at each weight beside the source's, by the floors of ``floors`` and ``blocks``.
"""
