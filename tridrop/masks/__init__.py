"""tridrop's masks for other frameworks: files to copy, each of which needs its framework alone.

``numpy_mask.py``, ``jax_mask.py``, ``tensorflow_mask.py``, ``keras_mask.py`` and the header
``tridrop_mask.h`` have ``keep_mask``, ``attention_keep_mask`` and ``fold_in`` with tridrop's own
arguments and bits; ``onnx_mask.py`` puts them into a graph. Nothing of tridrop imports them, and
they import nothing of it. docs/masks-elsewhere.md and docs/export.md show each.
"""
