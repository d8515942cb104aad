"""The timings behind ``tridrop bench``: tridrop against eager PyTorch and torch.compile.

>>> from tridrop.commands import bench
>>> bench.run(bench.Options.of("cpu", ops=["softmax"]))
Traceback (most recent call last):
    ...
ValueError: op 'softmax' is not known; known: dropout, activation_dropout, dropout_add, ...
"""

from __future__ import annotations

from .options import Options
from .run import run
from .steps import StepOptions
from .steps import run as run_steps

__all__ = ["Options", "StepOptions", "run", "run_steps"]
