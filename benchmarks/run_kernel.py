"""Run one kernel a few times, for a profiler to look at.

    python benchmarks/run_kernel.py attention_dkey 4,16,4096,0,128 --times 3

The families and sizes are those of benchmarks/tune.py, whose --list shows them.
"""

from __future__ import annotations

import argparse
import sys

import torch
from tune_cases import DTYPES, FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("size", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("run_kernel.py: needs a CUDA device")
    family = FAMILIES[options.family]
    call = family.problem(options.size, DTYPES[options.dtype], "cuda", False)
    for _ in range(options.times):
        call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
