"""The functions of torch's own library that kernels call, by their addresses.

``GOMP_parallel`` is OpenMP's: see threads.py. By the others kernels ask where a tensor's elements
are, see loops/operands.py, and have torch multiply matrices, see loops/products.py. They are
torch's C interface, in torch/csrc/inductor/aoti_torch/c/shim.h and ../generated/c_shim_cpu.h, whose
binary interface torch keeps stable, and one function of C++, ``bool at::native::is_neg(const
Tensor&)``, which that interface lacks. All are looked for on Linux alone, where they were tried.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

_QUESTIONS = (
    "get_device_type",
    "is_contiguous",
    "get_dtype",
    "get_storage_offset",
    "get_storage_size",
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
)
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_ACTIONS = "create_tensor_from_blob", "delete_tensor_object", "cpu_addmm_out"
_CONSTANTS = "device_type_cpu", "dtype_float32"
# The words of the table: the addresses of the questions and of the actions, then the answers of a
# tensor on the CPU and of one in fp32.
(DEVICE, CONTIGUOUS, DTYPE, OFFSET, BYTES, ADDRESS, DIM, SIZES, STRIDES, NEG,
 CREATE, DELETE, ADD_PRODUCT, CPU, FLOAT) = range(15)  # fmt: skip

# The words of an operand's description: torch's numbers for the dtypes that a kernel takes, by
# their codes; the bytes of their elements; how many elements it reads; and the dimensions that a
# tensor must have, -1 for any. Where it must be as it was saved, its sizes follow.
CODES = 3
DTYPES, WIDTHS, NUMEL, OF_DIM, DESCRIBED = 0, CODES, 2 * CODES, 2 * CODES + 1, 2 * CODES + 2
NO_DTYPE = -2  # -1 is the answer where a question is not answered


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
    questions, actions, constants = (
        [f"aoti_torch_{name}" for name in names] for names in (_QUESTIONS, _ACTIONS, _CONSTANTS)
    )
    words = [_address(library, name) for name in (*questions, _IS_NEG, *actions)]
    answers = [getattr(library, name, None) for name in constants]
    if 0 in words or None in answers:
        return None
    words.extend(answer() for answer in answers if answer is not None)
    return (ctypes.c_int64 * len(words))(*words)


_opened = _library()
_table = _make_table(_opened)  # kept, since kernels read it by its address
gomp_parallel = _address(_opened, "GOMP_parallel")
table = 0 if _table is None else ctypes.addressof(_table)  # 0 where kernels cannot ask


@cache
def dtype_number(dtype: torch.dtype) -> int:
    """torch's number for a dtype in its C interface; NO_DTYPE where that has none."""
    name = f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}"
    number = getattr(_opened, name, None)
    return NO_DTYPE if number is None else number()
