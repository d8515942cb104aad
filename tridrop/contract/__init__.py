"""The mask contract: how every mask follows from a seed.

A mask is a function of a seed and of coordinates (``mask.py``, ``choice.py``, ``noise.py``).
``seeds.py`` gives each call its seed, and ``recomputation.py`` gives a recomputation in backward
the seed of its forward. The compiled loops and the Triton kernels have twins of these functions,
which tests compare with them bit for bit.
"""
