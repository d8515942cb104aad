"""The functions of torch's own library that kernels call, by their addresses.

``GOMP_parallel`` is OpenMP's: see threads.py. By the others kernels ask where a tensor's elements
are, see loops/operands.py. They are torch's C interface, in
torch/csrc/inductor/aoti_torch/c/shim.h, whose binary interface torch keeps stable, and one function
of C++, ``bool at::native::is_neg(const Tensor&)``, which that interface lacks. All are looked for
on Linux alone, where they were tried.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_QUESTIONS = ("get_device_type", "is_contiguous", "get_dtype", "get_storage_offset",
              "get_storage_size", "get_data_ptr", "get_dim", "get_sizes")  # fmt: skip
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_ANSWERS = ("device_type_cpu", "dtype_float32", "dtype_bfloat16", "dtype_float16", "dtype_int64")
# The columns of the table: the addresses of the questions, then the answers as numbers.
(DEVICE, CONTIGUOUS, DTYPE, OFFSET, BYTES, ADDRESS, DIM, SIZES, NEG,
 CPU, FP32, BF16, FP16, INT64, COLUMNS) = range(15)  # fmt: skip

# What a kernel reads of a tensor: numbers of these kinds.
STORED, NUMBERS, SEED = range(3)  # fp32, bf16 or fp16; fp32; int64
# The columns of an operand's description, behind which its sizes follow: the kind, the number of
# elements, and, of a tensor that must be as it was saved, its dtype's answer and its dimensions. Of
# other tensors the dimensions are -1.
KIND, COUNT, OF_DTYPE, OF_DIM, DESCRIBED = range(5)


def _library() -> ctypes.CDLL | None:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not sys.platform.startswith("linux") or not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _address(library: ctypes.CDLL | None, name: str) -> int:
    """The address of a function; 0 if the library has none of this name."""
    found = getattr(library, name, None)
    return ctypes.cast(found, ctypes.c_void_p).value or 0 if found is not None else 0


def _make_table(library: ctypes.CDLL | None) -> ctypes.Array[ctypes.c_int64] | None:
    names = (*(f"aoti_torch_{name}" for name in _QUESTIONS), _IS_NEG)
    questions = [_address(library, name) for name in names]
    answers = [getattr(library, f"aoti_torch_{name}", None) for name in _ANSWERS]
    found = [answer() for answer in answers if answer is not None]
    if 0 in questions or len(found) < len(answers):
        return None
    return (ctypes.c_int64 * COLUMNS)(*questions, *found)


_opened = _library()
_table = _make_table(_opened)  # kept, since kernels read it by its address
gomp_parallel = _address(_opened, "GOMP_parallel")
table = 0 if _table is None else ctypes.addressof(_table)  # 0 where kernels cannot ask


def dtype_number(dtype: torch.dtype) -> int:
    """torch's number for a dtype that kernels read; -1 for other dtypes, and without a table."""
    column = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.int64: INT64}
    return _table[column[dtype]] if _table is not None and dtype in column else -1
