"""Real models become fused in one line, and back."""

from .core import swap, unswap
from .report import Report, Site

__all__ = ["Report", "Site", "swap", "unswap"]
