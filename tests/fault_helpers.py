"""A function that compiles in a moment, for the tests of the cache of compiled loops."""


def add_one(x):
    return x + 1
