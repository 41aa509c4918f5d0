"""Builds are made here: the loop over layers, and all that makes it resumable and its bytes certain.

``run`` is the loop, for one build or several of one calibration; ``target`` says what it asks of each: safetensors
(``safetensors_target``), GGUF (``gguf_target``, its calibrated layers in ``gguf_stages``) or an importance matrix alone
(``imatrix_pipeline``; ``collecting`` looks at layers for both). ``pipeline``, ``gguf_pipeline`` and
``several_pipeline`` make them from a model and recipes. A run begins with ``output`` and ``several`` (whose folder it
is, what lies in it) and ``inputs`` (fingerprints of all that bytes depend on, ``arithmetic`` among them); ``committer``
writes a unit, reads it back and compares it with the source; ``scale_range`` finds weights that a format's scales
cannot hold; ``report`` and ``gguf_report`` say what was made; ``completion`` deals with a build that is finished
already. ``bench`` makes random checkpoints of true shapes to try scale on.
"""
