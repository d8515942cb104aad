"""Loops that numba compiles. Importing one of these modules imports numba."""
