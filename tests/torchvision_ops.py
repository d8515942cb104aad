"""What torchvision needs to be imported on a CPU build of torch where only its CUDA build is.

timm imports torchvision, and so does much of transformers where it finds it. torchvision gives two
operators of its compiled extension a shape function as it is imported, and fails where the
extension could not be loaded. No test calls them: it is enough that they are declared. Programs
that tests run in an interpreter of their own import this file first, with tests/ on their path.
"""

import importlib.util
from pathlib import Path

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as it does
OPERATORS = ("nms", "qnms")


def declare() -> None:
    """Declare the operators, unless torchvision's own extension brings them."""
    found = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or found is None or found.origin is None:
        return
    for extension in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            continue
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare()
