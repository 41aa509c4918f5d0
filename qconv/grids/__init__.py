"""Grids: which values a weight can take, and how it is put on them.

A grid fits a weight's scales by a search of its own; they are fixed from then on, so that columns can be rounded in any
order, each from wherever compensation has moved it. What is rounded is packed into the form that files hold.

    base.py         what every grid and every fitted weight offers
    nearest.py      the nearest whole numbers, short floats, values of a codebook
    scales.py       scales and bases by group and row, and what can become of them for given codes
    steps.py        weights rounded one by one: integers, floats, ggml's affine and scaled types
    lattices.py     weights rounded eight at a time: IQ2 and IQ3
    blocks.py       ggml's types
    fp4.py          NVFP4 and MXFP4
    elements.py     integer and E4M3 grids
"""
