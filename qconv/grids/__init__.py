"""Grids: which values a weight can take, and how the scales of a weight are found. The first of them are two.

``e4m3`` are the floats of FP8, whose scales belong to blocks, rows or whole weights; ``ggml`` are the block types of
llama.cpp, from Q4_0 to IQ2_XXS, each with the search that its encoder makes. Integer grids have their arithmetic in
:mod:`qconv.core.rounding`, since methods are written in terms of it.

A grid knows no file: names, order and bytes of what is stored are a format's, except that ggml's types are defined by
the bytes of their blocks. A grid knows no statistics either: those come to it as weights of columns.
"""
