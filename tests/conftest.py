"""Without a CUDA device the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os

import torch

# The tensors are small, and torch's threads waiting for each other slow parallel workers badly.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read when the kernels are defined, so before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
