"""Chats as text. A chat template is a program of somebody else's: it runs apart, bounded in time and memory.

``files`` knows where a model's folder keeps its templates, ``templates`` renders chats by them, in the process that
``worker`` is.
"""
