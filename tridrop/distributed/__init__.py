"""More than one device: masks that do not depend on how the work is split.

Ops on DTensors need nothing of this: each process computes its piece with the masks of the whole.
What is here is for seeds, for batches that are split outside of DTensors, and for pipelines. See
docs/distributed.md.
"""

from ..contract.seeds import batch_slice
from .agreement import agree, check_seed, checking, mesh_seed
from .pipeline import number_microbatches

__all__ = ["agree", "batch_slice", "check_seed", "checking", "mesh_seed", "number_microbatches"]
