"""The reference backend: plain torch on any device, readable enough to be the specification."""

from .elementwise import backward, forward, keep_mask, why_not

__all__ = ["backward", "forward", "keep_mask", "why_not"]
