"""What a model's layers consist of, read off transformers' own model instead of being declared.

The model is built from config.json on the meta device, whole and at its true size, where it costs nothing, and a few
tokens run through it: ``tracing`` follows a tensor through everything that leaves its rows as they are, so that two
linears that read one tensor are seen to, and so is the norm that made it. Experts, whose tokens depend on data that
the meta device does not have, are replaced by a stand-in. Names in the checkpoint are those that transformers saves
under; ``left_out`` knows what it leaves out. No code that comes with a checkpoint is ever run.
"""

from qconv.models.discovery.left_out import left_out
from qconv.models.discovery.structure import Discovery, FusedExperts, LayerStructure, ReadTensor, discover

__all__ = ["Discovery", "FusedExperts", "LayerStructure", "ReadTensor", "discover", "left_out"]
