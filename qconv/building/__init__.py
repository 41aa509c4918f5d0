"""Builds are made here: the loops over layers and files, and all that makes them resumable and their bytes certain.

``pipeline`` makes safetensors builds, ``gguf_pipeline`` GGUF files, ``imatrix_pipeline`` importance matrices alone.
Each begins with ``output`` (whose folder it is, what lies in it) and ``inputs`` (fingerprints of all that bytes depend
on, ``arithmetic`` among them); ``committer`` writes a unit, reads it back and compares it with the source;
``scale_range`` finds weights that a format's scales cannot hold; ``report`` and ``gguf_report`` say what was made;
``completion`` deals with a build that is finished already. ``bench`` makes random checkpoints of true shapes to try
scale on.
"""
