"""The command line: one file a command, imported when it is asked for. The only place that prints or exits.

Command modules import torch and the library inside their functions, so that ``--help`` and a wrong argument answer at
once.
"""
