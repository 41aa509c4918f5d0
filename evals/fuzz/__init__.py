"""Damaged input for every parser: each must say so, soon and in little memory, and never crash (``make fuzz``)."""
