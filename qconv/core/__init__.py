"""What the five directions (models, grids, methods, formats, executors) have in common, and all that each may know of
the other four: the directions import this package and nothing of each other.

``architecture`` says what a model consists of: layers, experts, linears and what their inputs are. ``qtensor`` is the
currency, a weight as codes on a declared grid. ``settings`` are the sections of a recipe, each checked as a whole.
``rounding`` is the arithmetic of rounding to integer grids that methods share, ``integer_grid`` the same in C++.
``once`` makes what all threads share.
"""
