"""The reference backend: plain torch on any device, readable enough to be the specification."""

from .elementwise import backward, forward, keep_mask, why_not
from .norm import norm_backward, norm_forward

__all__ = ["backward", "forward", "keep_mask", "norm_backward", "norm_forward", "why_not"]
