"""More than one device: masks that do not depend on how the work is split.

Ops on DTensors need nothing from here: each process computes its piece with the mask of the whole
tensor. This package is for seeds, for batches that are split without DTensors, and for pipelines.
See docs/distributed.md.
"""

from ..contract.seeds import batch_slice
from .agreement import agree, check_seed, checking, mesh_seed
from .pipeline import number_microbatches

__all__ = ["agree", "batch_slice", "check_seed", "checking", "mesh_seed", "number_microbatches"]
