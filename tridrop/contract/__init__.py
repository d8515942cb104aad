"""The mask contract: the only place of tridrop where a bit is drawn.

Masks are functions of a seed and coordinates (``mask.py``, ``choice.py``, ``noise.py``), and seeds
belong to calls (``seeds.py``, ``recomputation.py``). The compiled loops and the Triton kernels have
twins of these functions, which tests hold to them bit for bit.
"""
