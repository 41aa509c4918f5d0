"""Models on disk, opened for reading, each known to be what its config.json says.

``source`` is a checkpoint of a known architecture that reads as dense weights; ``storage`` knows how these may be
stored (``packed``: compressed-tensors' integers), ``separation`` takes joined experts apart, ``verbatim`` is what is
only copied. ``build`` is a quantized checkpoint, with its format, grid and folded scales; ``layout`` decides how
weights are stored and whether that is read; ``reported`` is the report that a build carries, read with suspicion.
``inspection`` tells what any checkpoint consists of, known or not. ``gguf_tensors`` gives a source's tensors as GGUF
has them: renamed, merged, in llama.cpp's order, encoded.

Files are opened here, tensors are read by :mod:`qconv.checkpoint`, and nothing is written.
"""
