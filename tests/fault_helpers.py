"""Functions that compile in a moment, for the tests of the cache of compiled loops."""

import numpy as np

MANY = np.ones(1 << 18)  # too many numbers for numba to keep them with the code


def add_one(x):
    return x + 1


def add_many(x):
    return x + MANY[x]
