"""The parts of benchmarks/gpu.py: pieces of work, a budget, an archive, a cache of kernels."""
