"""tridrop's functions for the extension points of other libraries.

Nothing here imports another library. What has to be registered with a library is registered when
that library is imported, or at once if it is imported already.
"""

from .imports import when_imported


def _register_with_transformers() -> None:
    from . import transformers

    transformers.register()


def _register_flops() -> None:
    from . import flops

    flops.register()


when_imported("torch.utils.flop_counter", _register_flops)
when_imported("transformers.modeling_utils", _register_with_transformers)
