"""Fuses the dropouts of an existing model in one line, and undoes it."""

from .core import swap, unswap
from .report import Report, Site

__all__ = ["Report", "Site", "swap", "unswap"]
