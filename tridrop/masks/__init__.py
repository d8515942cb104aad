"""tridrop's masks for other frameworks: files to copy, each of which needs only its framework.

``numpy_mask.py``, ``jax_mask.py``, ``tensorflow_mask.py``, ``keras_mask.py`` and the header
``tridrop_mask.h`` have ``keep_mask``, ``attention_keep_mask`` and ``fold_in`` with tridrop's own
arguments and bits; ``onnx_mask.py`` adds them to a graph. tridrop does not import these files, and
they do not import tridrop. docs/masks-elsewhere.md and docs/export.md show how to use each.
"""
