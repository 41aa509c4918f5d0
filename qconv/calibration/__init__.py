"""Calibration data, one layer's forward pass at a time, and the statistics that methods need.

``documents`` and ``corpus`` make tokens of text; ``activations`` and ``stream`` keep what flows between layers on disk;
``forward``, ``mlp`` and ``routing`` compute one layer on real weights with transformers' own modules, every expert with
the tokens that the router sends it; ``statistics`` and ``squares`` keep what methods and importance matrices need of
inputs; ``attention`` and ``experts`` are the two halves of a layer, looked at (``mlp_inputs``) and passed on once for
all builds; ``attention_build``, ``mlp_build`` and ``rounding`` are each build's part, searched and rounded; ``layer``
and ``run`` put them together, ``imatrix`` keeps what was seen.
"""
