"""The Triton backend: importing it needs triton, running it a GPU or Triton's interpreter."""

from .launch import backward, forward, interpreting, keep_mask, target, why_not

__all__ = ["backward", "forward", "interpreting", "keep_mask", "target", "why_not"]
