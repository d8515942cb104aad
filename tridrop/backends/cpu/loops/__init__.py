"""The loops that numba compiles. Importing a module of this folder imports numba."""
