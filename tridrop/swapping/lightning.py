"""The swap as a callback of Lightning. No other module of tridrop imports this one."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the older name of the same library, which has its own classes
    from pytorch_lightning import Callback

from .core import swap, unswap
from .report import Report
from .rewrite import Levels

logger = logging.getLogger(__name__)


class SwapCallback(Callback):  # type: ignore[misc]
    """Swaps the modules of a LightningModule, as :func:`tridrop.swap` does.

        from tridrop.swapping.lightning import SwapCallback
        trainer = pytorch_lightning.Trainer(callbacks=[SwapCallback()])

    The swap happens in ``setup``, on the modules that exist then, before a strategy wraps them. The
    LightningModule itself keeps its class, whose hooks Lightning calls. So a dropout in a method of
    the LightningModule, rather than in one of its modules, is left, and the report does not list
    it. Checkpoints are the same as without the swap, and load into swapped and other models.

    Args:
        dropout, attention, inside, across, memory: the switches of :func:`tridrop.swap`.
        restore: undo the swap when the trainer is done, except if it ends with an error.

    Attributes:
        reports: the reports of the last swap, by the names of the LightningModule's modules. The
            main process logs them at level INFO.
    """

    def __init__(
        self,
        *,
        dropout: bool = True,
        attention: bool = True,
        inside: bool = True,
        across: bool = True,
        memory: bool = False,
        restore: bool = False,
    ) -> None:
        self.levels = Levels(dropout, attention, inside, across, memory)
        self.restore = restore
        self.reports: dict[str, Report] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.reports:  # Lightning calls setup at every stage
            return
        for name, module in pl_module.named_children():
            self.reports[name] = swap(module, **asdict(self.levels))
            if trainer.is_global_zero:
                logger.info("%s: %s", name, self.reports[name])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not self.restore:
            return
        for name, module in pl_module.named_children():
            if name in self.reports:
                unswap(module)
        self.reports = {}
