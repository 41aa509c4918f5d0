"""GPTQ on any grid: scales fixed by the grid's own search, columns compensated, then refined.

problem.py      the second moments of an input, and a weight rounded for them, never worse than by the grid itself
columns.py      columns rounded one after the other, each taking up the errors before it
host.py         grids that round on the host what lies on a device
refinement.py   descent over codes and scales from there
"""
