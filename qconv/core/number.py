"""What the code of a weight is: known where recipes are read, before anything that computes is imported."""

from __future__ import annotations

from typing import Literal, TypeAlias

Number: TypeAlias = Literal["int", "e4m3", "e2m1"]
"""What a code is: an unsigned integer, an E4M3 float, or an E2M1 float."""
