"""Other libraries' own plugs, filled with tridrop's functions.

Nothing here imports the other library: what is to be registered with it is registered when it is
imported, or at once where it is imported already.
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
