"""Constants that kernels share."""

from __future__ import annotations

from typing import Any

import triton.language as tl


class Constant(tl.constexpr):  # type: ignore[misc]
    """A global that kernels may read.

    Before each launch Triton compares a kernel's globals with what they were when it was compiled,
    and ``!=`` of two constexpr makes three more: 0.7 us a global, a sixth of the host's part of an
    elementwise launch. Two of these are compared as the numbers they are.
    """

    def __ne__(self, other: Any) -> Any:
        return self.value != other.value if type(other) is Constant else super().__ne__(other)
