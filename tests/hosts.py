"""What tests run on: the device of their tensors, and what serves it beside Triton."""

import torch

import tridrop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The compiled loops on a CPU; a CUDA tensor has the reference alone.
PLAIN = tridrop.backends.name_for(torch.device("cpu")) if DEVICE == "cpu" else "reference"
