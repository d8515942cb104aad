"""The swap as a callback of transformers' Trainer. No other module of tridrop imports this one."""

from __future__ import annotations

import logging
import weakref
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from .core import swap, unswap
from .report import Report
from .rewrite import Levels

logger = logging.getLogger(__name__)

# After one of these has changed the class of a module, or taken its parameters, it is too late.
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


class SwapCallback(TrainerCallback):  # type: ignore[misc]
    """Swaps the model that a Trainer trains, as :func:`tridrop.swap` does.

        from tridrop.swapping.trainer import SwapCallback
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SwapCallback()])

    The swap happens at the end of the Trainer's __init__, before it wraps the model. With a
    ``model_init``, or if the callback is added to a Trainer later, it happens when training begins;
    for FSDP that is too late, and raises an error. Checkpoints are the same as without the swap,
    and load into swapped and other models.

    Args:
        dropout, attention, inside, across, memory: the switches of :func:`tridrop.swap`.
        restore: undo the swap when training ends, except if it ends with an error.

    Attributes:
        report: the report of the last swap. The main process logs it once, at level INFO.
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
        self.report: Report | None = None
        self._swapped: weakref.ref[nn.Module] | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is not None:
            self._swap(model, state)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is None:
            return
        swapped = None if self._swapped is None else self._swapped()
        # The swapped model may have been wrapped since.
        if any(module is swapped for module in model.modules()):
            return
        for module in model.modules():
            if _SHARDED & {kind.__name__ for kind in type(module).__mro__}:
                raise RuntimeError(
                    f"the model is already sharded ({type(module).__name__}), which is too late "
                    "for SwapCallback: pass it to the Trainer as callbacks=[SwapCallback()], or "
                    "call tridrop.swap(model) where the model is created"
                )
        self._swap(model, state)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if not self.restore or model is None:
            return
        try:
            unswap(model)
        except RuntimeError as error:  # the training is done, and must not be lost
            logger.warning("SwapCallback could not restore the model: %s", error)
        else:
            self._swapped = None

    def _swap(self, model: nn.Module, state: Any) -> None:
        first = self.report is None
        self.report = swap(model, **asdict(self.levels))
        self._swapped = weakref.ref(model)
        if first and state.is_world_process_zero:
            logger.info("%s", self.report)
